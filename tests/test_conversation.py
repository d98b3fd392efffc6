"""What a decoder has read it does not read again, and when it reads tokens as two halves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kraken_compiler.artifact.read import MEASURED_FILE
from kraken_compiler.generate import split_threshold as threshold_module
from kraken_compiler.generate.decoder import Array, CacheDecoder
from kraken_compiler.generate.engine import Engine, GenerationRequest
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.generate.split_threshold import LENGTHS, split_threshold
from kraken_compiler.ranks import halves_timing
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks

VOCABULARY = 500


class Counting:
    """A decoder that says the next number, and notes what it was asked to do."""

    identical_on_all_ranks = True
    split_from: int | None = None

    def __init__(self, batch: int = 1, capacity: int = 200, *, can_split: bool = False) -> None:
        self.batch, self.capacity, self.can_split = batch, capacity, can_split
        self.read: list[list[int]] = [[] for _ in range(batch)]
        self.calls: list[Any] = []

    def reset(self) -> None:
        self.rewind(0)

    def rewind(self, tokens: int) -> None:
        assert all(len(row) >= tokens for row in self.read)
        self.calls.append(("rewind", tokens))
        self.read = [row[:tokens] for row in self.read]

    def prefill(self, ids: Array, lengths: Array, cut: int | None = None) -> Array:
        self.calls.append(("prefill", ids.shape[1], self.split_from))
        for row, new, length in zip(self.read, ids.tolist(), lengths.tolist()):
            row += new[:length]
        return self._logits()

    def step(self, tokens: Array) -> Array:
        for row, token in zip(self.read, tokens.tolist()):
            row.append(token)
        return self._logits()

    def _logits(self) -> Array:
        return np.eye(VOCABULARY, dtype=np.float32)[[row[-1] + 1 for row in self.read]]


class Model:
    vocabulary, positions, first_seconds, setting = VOCABULARY, 10_000, 0.0, "test"

    def __init__(self, *, can_split: bool = False) -> None:
        self.can_split = can_split
        self.decoders: list[Counting] = []

    def decoder(self, batch: int, capacity: int) -> Counting:
        self.decoders.append(Counting(batch, capacity, can_split=self.can_split))
        return self.decoders[-1]


def ranks() -> Ranks:
    return Ranks(Place.alone(), StatusWriter(0, None), None)


def engine(model: Model, directory: Path = Path("absent")) -> Engine:
    manifest = SimpleNamespace(inputs=(), call=SimpleNamespace(sizes=()), cache=object(), weights=(), degree=1)
    return Engine(SimpleNamespace(manifest=manifest, directory=directory), model, ranks())  # type: ignore[arg-type]


def answers(one: Engine, prompt: list[int], count: int = 3, capacity: int = 200) -> list[int | None]:
    request = GenerationRequest([prompt], count, capacity, Sampling())
    return [tokens[0] for tokens in one._carry_out(request)]


def test_a_conversation_goes_on_where_it_was() -> None:
    model = Model()
    one = engine(model)
    assert answers(one, [1, 2, 3]) == [4, 5, 6]
    # The last token of an answer was said, not read.
    assert answers(one, [1, 2, 3, 4, 5, 6, 90, 91]) == [92, 93, 94]
    (decoder,) = model.decoders
    assert decoder.calls == [("rewind", 0), ("prefill", 3, None), ("rewind", 5), ("prefill", 3, None)]
    assert decoder.read == [[1, 2, 3, 4, 5, 6, 90, 91, 92, 93]]


def test_what_differs_is_read_again() -> None:
    model = Model()
    one = engine(model)
    answers(one, [1, 2, 3])
    assert answers(one, [1, 2, 7]) == [8, 9, 10]
    assert answers(one, [5]) == [6, 7, 8]
    assert [call for call in model.decoders[0].calls if call[0] == "rewind"] == [
        ("rewind", 0),
        ("rewind", 2),
        ("rewind", 0),
    ]


def test_the_same_prompt_again_reads_its_last_token() -> None:
    """There are no logits without something to read."""
    model = Model()
    one = engine(model)
    for _ in range(2):
        assert answers(one, [1, 2, 3]) == [4, 5, 6]
    assert model.decoders[0].calls[-2:] == [("rewind", 2), ("prefill", 1, None)]


def test_an_answer_that_was_not_heard_to_its_end_is_read_again() -> None:
    model = Model()
    one = engine(model)
    next(one._carry_out(GenerationRequest([[1, 2, 3]], 3, 200, Sampling())))
    answers(one, [1, 2, 3, 4])
    assert model.decoders[0].calls[-2:] == [("rewind", 0), ("prefill", 4, None)]


def test_other_room_is_another_decoder() -> None:
    model = Model()
    one = engine(model)
    answers(one, [1, 2, 3])
    answers(one, [1, 2, 3, 4], capacity=50)
    assert [decoder.calls[0] for decoder in model.decoders] == [("rewind", 0)] * 2


# halves --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only moves when somebody computes."""
    state = {"now": 0.0}
    monkeypatch.setattr(threshold_module.time, "perf_counter", lambda: state["now"])

    def work(seconds: float) -> None:
        state["now"] += seconds

    return work


class Timed(Counting):
    """Whole prefills take a millisecond a token; halves 0.02 seconds and half of that."""

    def __init__(self, work: Callable[[float], None], capacity: int = 2000) -> None:
        super().__init__(1, capacity, can_split=True)
        self._work = work

    def prefill(self, ids: Array, lengths: Array, cut: int | None = None) -> Array:
        self._work(0.001 * ids.shape[1] if self.split_from is None else 0.02 + 0.0005 * ids.shape[1])
        return super().prefill(ids, lengths, cut)


def test_the_threshold_is_measured_once_and_kept(tmp_path: Path, clock: Callable[[float], None]) -> None:
    decoder = Timed(clock)
    assert isinstance(decoder, CacheDecoder)
    assert split_threshold(decoder, LENGTHS, ranks(), tmp_path, "here") == 64
    assert decoder.read == [[]]
    (entry,) = json.loads((tmp_path / MEASURED_FILE).read_text()).values()
    assert entry == {"split_from": 64, "seconds": [[64, pytest.approx(0.064), pytest.approx(0.052)]]}
    measured = len(decoder.calls)
    assert split_threshold(decoder, LENGTHS, ranks(), tmp_path, "here") == 64
    assert len(decoder.calls) == measured, "it was looked up"
    assert split_threshold(decoder, LENGTHS, ranks(), tmp_path, "elsewhere") == 64
    assert len(decoder.calls) > measured
    assert len(json.loads((tmp_path / MEASURED_FILE).read_text())) == 2


def test_halves_that_are_never_faster(tmp_path: Path, clock: Callable[[float], None]) -> None:
    decoder = Timed(lambda seconds: clock(0.01))
    assert split_threshold(decoder, LENGTHS[:3], ranks(), tmp_path, "here") is None
    (entry,) = json.loads((tmp_path / MEASURED_FILE).read_text()).values()
    assert [tokens for tokens, *_ in entry["seconds"]] == [64, 128, 256]


def test_a_slow_machine_does_not_measure_for_ever(tmp_path: Path, clock: Callable[[float], None]) -> None:
    decoder = Timed(lambda seconds: clock(2.0))
    assert split_threshold(decoder, LENGTHS, ranks(), tmp_path, "here") is None
    (entry,) = json.loads((tmp_path / MEASURED_FILE).read_text()).values()
    assert [tokens for tokens, *_ in entry["seconds"]] == [64]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', '{"x": {"split_from": "many"}}', "\x00"])
def test_a_damaged_record_is_measured_again(tmp_path: Path, content: str, clock: Callable[[float], None]) -> None:
    (tmp_path / MEASURED_FILE).write_text(content)
    assert split_threshold(Timed(clock), LENGTHS, ranks(), tmp_path, "here") == 64
    assert "here" in (tmp_path / MEASURED_FILE).read_text()


def test_an_artifact_that_cannot_be_written_to_is_measured_every_time(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    for _ in range(2):
        decoder = Timed(clock)
        assert split_threshold(decoder, LENGTHS, ranks(), tmp_path / "absent", "here") == 64
        assert decoder.calls


def test_only_long_prompts_are_worth_measuring(tmp_path: Path) -> None:
    model = Model(can_split=True)
    one = engine(model, tmp_path)
    answers(one, [1, 2, 3])
    assert [call for call in model.decoders[0].calls if call[0] == "prefill"] == [("prefill", 3, None)]
    prompt = [*range(1, 101)]
    assert answers(one, prompt) == [101, 102, 103]
    ways = [call[2] for call in model.decoders[0].calls if call[:2] == ("prefill", 64)]
    assert ways == [None, 1] * (1 + halves_timing._ROUNDS)
    assert model.decoders[0].read[0][: len(prompt)] == prompt
    assert (tmp_path / MEASURED_FILE).exists()
