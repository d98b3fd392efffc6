"""The decoder of a rank: batches that grow, rows that differ, what does not fit. One lane, no process group."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.lane_graph.lane_files import TABLES_FILE
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.torch_dist.run.cached_decoder import CachedDecoder
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.capture import capture
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.cache import PAST, POSITIONS, SLOTS
from kraken_compiler.passes.lower import lower
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.verify.prefixes import expected
from kraken_compiler.verify.replay import replay, split_lengths
from tests.fuzz.decoding import VOCABULARY
from tests.fuzz.model import build
from tests.fuzz.recipe import Recipe
from tests.zoo import SUPPORTED, logits_of, random_tokens

pytestmark = pytest.mark.slow

IDS = random_tokens(97, 3, 13)


@lru_cache(maxsize=2)
def program(name: str = "llama") -> tuple[RankProgram, Tensor]:
    """A model as one lane, and its logits for IDS."""
    model = SUPPORTED[name]()
    captured = capture(model, example_inputs={"input_ids": IDS[:2]})
    lanes, _ = lower(captured.program, 1, "standard")
    rank = RankProgram.from_program(lanes, captured.store.read, communicator=NoCommunication(0, 1))
    return rank, logits_of(model, IDS)


def close(have: Tensor, want: Tensor) -> None:
    assert (have - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bloom"])
def test_ragged_rows(name: str) -> None:
    rank, logits = program(name)
    close(replayed(rank.decoder(3, 16), IDS), expected(logits, *split_lengths(*IDS.shape)))


def test_a_model_without_positions_is_stored_without_tables(tmp_path: Path) -> None:
    """From nothing but positions follows nothing then; torch saves no graph without a result."""
    model = build(Recipe(layers=1, positions="none"))
    captured = capture(model, example_inputs=(IDS[:2] % VOCABULARY,))
    lanes, _ = lower(captured.program, 1, "standard")
    source = Source(kind="module", name="no positions")
    made = write_artifact(lanes, captured.store.read, tmp_path / "made", source=source, backends=[TorchBackend()])
    assert not (made / TABLES_FILE).exists()
    rank = RankProgram.load(open_artifact(made), 0, communicator=NoCommunication(0, 1))
    ids = IDS % VOCABULARY
    close(replayed(rank.decoder(3, 16), ids), expected(model(ids).detach(), *split_lengths(*ids.shape)))


@pytest.mark.parametrize("name", ["mistral", "bloom"])
def test_compiled_steps_are_the_same(name: str) -> None:
    rank, logits = program(name)
    close(replayed(rank.decoder(3, 16, compiled=True), IDS), expected(logits, *split_lengths(*IDS.shape)))


def test_rows_of_one_length_see_their_past_without_a_mask() -> None:
    """On every device: a step is given the slots that are filled, and says that it stands behind all of them."""
    rank, logits = program()
    decoder = rank.decoder(3, 16)
    seen: list[tuple[int, int, int]] = []
    run = decoder._steps[0]

    def noted(*operands: Tensor) -> tuple[Tensor, ...]:
        feeds = dict(zip(reversed(decoder._names), reversed(operands)))
        seen.append((len(feeds[POSITIONS]), len(feeds[SLOTS]), len(feeds[PAST])))
        return run(*operands)

    decoder._steps = [noted]
    decoder.prefill(IDS[:, :9].numpy(), np.full(3, 9))
    for at in range(9, 12):
        close(torch.from_numpy(decoder.step(IDS[:, at].numpy())), logits[:, at])
    assert seen == [(1, 9, 0), (1, 10, 9), (1, 11, 10), (1, 12, 11)]
    decoder.reset()
    decoder.prefill(IDS[:, :9].numpy(), np.array([9, 3, 5]))
    decoder.step(IDS[:, 0].numpy())
    assert seen[-1] == (3, 10, 0), "of rows of different lengths the positions say where they stand"


def test_a_second_prefill_goes_on_where_the_rows_end() -> None:
    rank, logits = program()
    decoder = rank.decoder(3, 16)
    first, second = torch.tensor([4, 2, 3]), torch.tensor([3, 5, 1])
    decoder.prefill(IDS[:, :4].numpy(), first.numpy())
    more = torch.stack([row.roll(-int(start))[:5] for row, start in zip(IDS, first)])
    found = torch.from_numpy(decoder.prefill(more.numpy(), second.numpy()))
    assert decoder.lengths == (7, 7, 4)
    close(found, logits[torch.arange(3), first + second - 1])


def test_reset_forgets() -> None:
    rank, logits = program()
    decoder = rank.decoder(3, 16)
    for _ in range(2):
        close(torch.from_numpy(decoder.prefill(IDS.numpy(), np.full(3, 13))), logits[:, -1])
        decoder.reset()
    assert decoder.lengths == (0, 0, 0)


def test_it_goes_back_and_on_from_there() -> None:
    rank, logits = program()
    decoder = rank.decoder(3, 16)
    decoder.prefill(IDS[:, :9].numpy(), np.full(3, 9))
    decoder.rewind(4)
    assert decoder.lengths == (4, 4, 4)
    close(torch.from_numpy(decoder.prefill(IDS[:, 4:].numpy(), np.full(3, 9))), logits[:, -1])
    with pytest.raises(AssertionError):
        decoder.rewind(14)


def test_what_does_not_fit_is_said() -> None:
    rank, _ = program()
    decoder = rank.decoder(3, 14)
    with pytest.raises(UsageError, match="holds 14 tokens and 15 are needed"):
        decoder.prefill(random_tokens(97, 3, 15).numpy(), np.full(3, 15))
    decoder.prefill(IDS.numpy(), np.array([13, 2, 5]))
    decoder.step(IDS[:, 0].numpy())
    with pytest.raises(UsageError, match="the KV cache is full: it holds 14 tokens and 15 are needed; ask for fewer"):
        decoder.step(IDS[:, 0].numpy())
    assert decoder.lengths == (14, 3, 6), "a step that fails leaves the rows alone"


def test_wrong_calls_are_refused() -> None:
    rank, _ = program()
    decoder = rank.decoder(3, 14)
    with pytest.raises(UsageError, match="prompt to prefill first"):
        decoder.step(IDS[:, 0].numpy())
    with pytest.raises(UsageError, match="and 3 lengths"):
        decoder.prefill(IDS[:2].numpy(), np.array([1, 1]))
    with pytest.raises(UsageError, match="bring 1 to 13 tokens"):
        decoder.prefill(IDS.numpy(), np.array([0, 14, 2]))


@pytest.mark.parametrize(("name", "capacity"), [("gpt2", 65), ("gptj", 65)])
def test_a_capacity_beyond_the_positions_is_refused(name: str, capacity: int) -> None:
    """GPT-2 has a table of positions whose rows are counted; of GPT-J's one only sees that it ends."""
    with pytest.raises(UsageError, match=f"{capacity} tokens"):
        decoder_of(name, capacity)


def replayed(decoder: CachedDecoder, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(replay(decoder, ids.numpy()))


def decoder_of(name: str, capacity: int) -> CachedDecoder:
    return program(name)[0].decoder(1, capacity)
