"""Generation: the loop itself, the worker on real ranks, and what reaches standard output."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.lane_graph.run_graph import on_host
from kraken_compiler.backends.load import load
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.decoder import Array, Decoder, RecomputingDecoder
from kraken_compiler.generate.loop import generate, pack
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.generate.worker import main
from kraken_compiler.ir.program import InputSpec
from kraken_compiler.lanes.logits import logits_function
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.ranks.run_ranks import run_ranks
from tests.generation_functions import continuation
from tests.test_cli_compile import save_model
from tests.toy_lane_program import write_toy
from tests.zoo import SUPPORTED, logits_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("generate") / "toy.kraken", 2)


def count_up(ids: Array) -> Array:
    """A model that says the next number."""
    return np.eye(100, dtype=np.float32)[ids + 1]


def counting(batch: int, capacity: int = 30) -> Decoder:
    return RecomputingDecoder(count_up, batch, capacity)


# the loop ------------------------------------------------------------------------------------------------------------


def test_a_batch_grows_by_a_token_a_row() -> None:
    assert list(generate(counting(1), [[3, 7]], 4)) == [[8], [9], [10], [11]]
    assert list(generate(counting(2), [[3, 7], [40]], 3)) == [[8, 41], [9, 42], [10, 43]]
    assert list(generate(counting(1), [[7]], 0)) == []
    assert list(generate(counting(1), [[7]], 2, agree=lambda choice: choice + 5)) == [[13], [19]]


def test_every_row_ends_by_itself() -> None:
    assert list(generate(counting(1), [[7]], 4, eos={10})) == [[8], [9]]
    steps = list(generate(counting(3), [[7], [8], [30]], 4, eos={10, 33}))
    assert steps == [[8, 9, 31], [9, None, 32]]
    assert list(generate(counting(2), [[7], [30]], 3, eos={9, 99})) == [[8, 31], [None, 32], [None, 33]]


def test_a_decoder_can_be_used_again() -> None:
    decoder = counting(2)
    assert list(generate(decoder, [[3, 4, 5], [4]], 1)) == list(generate(decoder, [[5], [8, 4]], 1)) == [[6, 5]]
    decoder.reset()
    assert decoder.prefill(np.array([[1, 2], [5, 0]]), np.array([2, 1])).argmax(-1).tolist() == [3, 6]


def test_values_of_tensors_leave_the_device_as_they_are() -> None:
    for dtype, kept in ((torch.bfloat16, np.float32), (torch.float64, np.float64), (torch.int64, np.int64)):
        values = on_host(torch.tensor([1, 2], dtype=dtype))
        assert (values.dtype, values.tolist()) == (kept, [1, 2])


def test_what_does_not_fit() -> None:
    assert len(list(generate(counting(2, 5), [[1], [1, 2]], 3))) == 3
    with pytest.raises(UsageError, match="room for 6 tokens, there is room for 5; shorten the prompt"):
        generate(counting(2, 5), [[1], [1, 2]], 4)
    with pytest.raises(UsageError, match="the prompt has no tokens"):
        generate(counting(2), [[1], []], 4)
    decoder = counting(1, 2)
    with pytest.raises(UsageError, match="room for 3 tokens, there is room for 2"):
        decoder.prefill(np.array([[1, 2, 3]]), np.array([3]))
    decoder.prefill(np.array([[1, 2]]), np.array([2]))
    with pytest.raises(UsageError, match="room for 3 tokens, there is room for 2"):
        decoder.step(np.array([3]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=20, seed=3)])
def test_ragged_rows_are_the_rows_alone(name: str, sampling: Sampling) -> None:
    """Row 0 alone has the random numbers of row 0 in a batch; the others are compared without chance."""
    model = SUPPORTED[name]()
    prompts = [[5, 6, 40, 8, 9], [7], [20, 21, 22]]

    def rows(prompts: list[list[int]]) -> list[list[int | None]]:
        decoder = RecomputingDecoder(
            lambda ids: on_host(logits_of(model, torch.from_numpy(ids)).detach()), len(prompts), 20
        )
        return [list(row) for row in zip(*generate(decoder, prompts, 6, sampling=sampling))]

    together = rows(prompts)
    assert together[0] == rows(prompts[:1])[0]
    if not sampling.temperature:
        assert together == [rows([prompt])[0] for prompt in prompts]
        assert together[0] == continuation(lambda ids: logits_of(model, ids), prompts[0], 6)


def say_the_sum(ids: Array) -> Array:
    """A model that says the sum of the whole text, tokens behind a position included, and how long it is."""
    return np.eye(100, dtype=np.float32)[np.broadcast_to((ids + 1).sum(axis=1, keepdims=True), ids.shape)]


@pytest.mark.parametrize("takes_fewer_rows", [True, False])
def test_rows_never_notice_those_beside_them(takes_fewer_rows: bool) -> None:
    """Programs without a cache often have none because they are not causal, or depend on the length."""
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    seen: set[tuple[int, ...]] = set()

    def whole(ids: Array) -> Array:
        seen.add(ids.shape)
        return say_the_sum(ids)

    decoder = RecomputingDecoder(whole, 4, 20, takes_fewer_rows=takes_fewer_rows)
    alone = [list(generate(RecomputingDecoder(say_the_sum, 1, 20), [prompt], 3)) for prompt in prompts]
    together = zip(*generate(decoder, prompts, 3))
    assert [list(row) for row in together] == [[token for (token,) in row] for row in alone]
    if takes_fewer_rows:
        assert (2, 1) in seen, "rows of one length run together"
    else:
        assert {batch for batch, _ in seen} == {4}


def test_a_model_that_gives_the_last_logits_only() -> None:
    decoder = RecomputingDecoder(lambda ids: count_up(ids)[:, -1:], 2, 20)
    assert list(generate(decoder, [[3, 7, 8], [40]], 3)) == [[9, 41], [10, 42], [11, 43]]


def test_ranks_choose_the_same_although_their_logits_differ() -> None:
    first, second = run_ranks("tests.generation_functions:choose_near_ties", 2)
    assert first[:2] == second[:2]
    assert first[0] == [[3, 3]] * 20
    assert len({token for step in first[1] for token in step}) > 5
    # Without agreement the last bit decides: that the ranks' logits are different was no illusion.
    assert (first[2], second[2]) == ([[3, 3]] * 20, [[4, 4]] * 20)


def test_ranks_of_one_machine_have_the_bits_that_are_promised(tmp_path: Path) -> None:
    """Where it is promised that logits are identical, no choice is sent around; so the promise must hold."""
    save_model("llama", tmp_path / "llama", tokenizer=False)
    artifacts = []
    for form in ("standard", "kraken"):
        compile_model(tmp_path / "llama", tmp_path / form, degree=2, form=form, verify=False)
        artifacts.append(str(tmp_path / form))
    first, second = run_ranks("tests.generation_functions:logits_of_ranks", 2, {"artifacts": artifacts})
    assert all(promise for promise, _ in first.values())
    assert first == second


# packing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "packed", "lengths"),
    [
        (None, [[5, 6, 7], [8, 9, 4]], [3, 3]),
        ([[1, 1, 0], [1, 1, 1]], [[5, 6, 0], [8, 9, 4]], [2, 3]),
        ([[0, 1, 1], [0, 0, 1]], [[6, 7], [4, 0]], [2, 1]),
        ([[0, 1, 0], [1, 1, 0]], [[6, 0], [8, 9]], [1, 2]),
    ],
)
def test_pack(mask: list[list[int]] | None, packed: list[list[int]], lengths: list[int]) -> None:
    ids = np.array([[5, 6, 7], [8, 9, 4]], np.int32)
    for dtype in (np.int64, np.bool_, np.float32):
        found = pack(ids, None if mask is None else np.array(mask, dtype))
        assert [part.tolist() for part in found] == [packed, lengths]
        assert [part.dtype for part in found] == [np.int64] * 2


def test_pack_refuses() -> None:
    ids = np.ones((2, 4))
    with pytest.raises(UsageError, match="row 1 has a hole"):
        pack(ids, np.array([[0, 1, 1, 0], [1, 0, 1, 0]]))
    with pytest.raises(UsageError, match="row 1 has no token"):
        pack(ids, np.array([[1, 1, 1, 1], [0, 0, 0, 0]]))
    with pytest.raises(UsageError, match=r"not \[2, 4\] and \[2, 3\]"):
        pack(ids, np.ones((2, 3)))


# on ranks ------------------------------------------------------------------------------------------------------------


def expected(artifact: Path, prompt: list[int], count: int) -> str:
    module = load(artifact)
    assert isinstance(module, LaneModule)
    manifest = open_artifact(artifact).manifest
    logits_of = logits_function(manifest.inputs, manifest.call, module.run_flat)
    return ",".join(map(str, continuation(logits_of, prompt, count)))


def test_only_the_result_reaches_standard_output(artifact: Path) -> None:
    program = (
        "from kraken_compiler.ranks.launch import launch\n"
        f"launch(2, [{str(artifact)!r}, '--input-ids', '5,6,7', '--max-new-tokens', '6'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == expected(artifact, [5, 6, 7], 6) + "\n"
    assert done.stderr == ""


def test_torchrun_does_the_same(artifact: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "localhost", "--master-port", str(port), "-m", "kraken_compiler.generate.worker"]
    arguments = [str(artifact), "--input-ids", "9", "--input-ids", "5,6", "--max-new-tokens", "3"]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(artifact, [9], 3) + "\n" + expected(artifact, [5, 6], 3) + "\n"


def test_the_worker_alone_says_how_to_start_it(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main([str(artifact), "--input-ids", "1"])
    with pytest.raises(SystemExit, match="2"):
        main([str(artifact), "--input-ids", "1", "--top-k", "2"])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: RANK is not set; start this through kraken-run or torchrun")
    assert second.startswith("error: --top-k and --top-p need a --temperature above 0")


def test_inputs_that_follow_from_the_ids(artifact: Path) -> None:
    call = open_artifact(artifact).manifest.call
    ids = InputSpec("input_ids", "input_ids", "int64", ("batch", "length"))
    mask = InputSpec("mask", "attention_mask", "int64", ("batch", "length"))
    positions = InputSpec("positions", "position_ids", "int64", ("batch", "length"))
    cache = InputSpec("cache", "cache_position", "int64", ("length",))
    given: list[Tensor] = []

    def run_flat(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        given.extend(inputs)
        return torch.zeros(2, 3, 5), torch.zeros(2, 3, 4)

    logits = logits_function([mask, ids, positions, cache], call, run_flat)(torch.full((2, 3), 8))
    assert logits.shape == (2, 3, 5)
    assert [tensor.tolist() for tensor in given] == [[[1] * 3] * 2, [[8] * 3] * 2, [[0, 1, 2]] * 2, [0, 1, 2]]
    only = replace(ids, name="tokens", parameter="tokens")
    assert logits_function([only], call, run_flat)(torch.zeros(2, 3)).shape == (2, 3, 5)
    pixels = InputSpec("pixels", "pixel_values", "float32", ("batch", 3))
    with pytest.raises(UsageError, match="also needs the input 'pixel_values'"):
        logits_function([ids, pixels], call, run_flat)
    with pytest.raises(UsageError, match="no language model"):
        logits_function([ids], call, lambda _: (torch.zeros(2, 5),))(torch.zeros(2, 3))
