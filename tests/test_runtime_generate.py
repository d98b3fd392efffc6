"""Generation: the loop itself, the worker on real ranks, and what reaches standard output."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.single.lane_module import LaneModule
from kraken_compiler.backends.torch_dist.load import load
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import InputSpec
from kraken_compiler.runtime.generate import greedy
from kraken_compiler.runtime.logits import logits_function
from kraken_compiler.runtime.session import Session
from kraken_compiler.runtime.status import StatusWriter
from kraken_compiler.runtime.worker import _print_text, main
from tests.toy_lane_program import write_toy

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("generate") / "toy.kraken", 2)


def count_up(ids: Tensor) -> Tensor:
    """A model that says the next number."""
    return torch.nn.functional.one_hot(ids + 1, 100).float()


def test_greedy() -> None:
    assert list(greedy(count_up, [3, 7], 4)) == [8, 9, 10, 11]
    assert list(greedy(count_up, [7], 4, eos={10})) == [8, 9]
    assert list(greedy(count_up, [7], 0)) == []
    assert list(greedy(count_up, [7], 2, agree=lambda choice: choice + 5)) == [13, 19]


def expected(artifact: Path, prompt: list[int], count: int) -> str:
    module = load(artifact)
    assert isinstance(module, LaneModule)
    manifest = open_artifact(artifact).manifest
    logits_of = logits_function(manifest.inputs, manifest.call, module.run_flat)
    return ",".join(map(str, greedy(logits_of, prompt, count)))


def test_only_the_result_reaches_standard_output(artifact: Path) -> None:
    program = (
        "from kraken_compiler.runtime.launch import launch\n"
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
    torchrun += ["--master-addr", "localhost", "--master-port", str(port), "-m", "kraken_compiler.runtime.worker"]
    arguments = [str(artifact), "--input-ids", "9", "--max-new-tokens", "3"]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(artifact, [9], 3) + "\n"


def test_the_worker_alone_says_how_to_start_it(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="kraken-run or torchrun"):
        main([str(artifact), "--input-ids", "1"])


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


def test_text_grows_by_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes of a character that several tokens share are held back until it is whole."""
    pieces = [b" Pa", b"ris ", "é".encode()[:1], "é".encode()[1:], b"!"]
    session = Session(0, 1, torch.device("cpu"), StatusWriter(0, None))
    seen: list[str] = []

    def tokens() -> Iterator[int]:
        for token in range(len(pieces)):
            yield token
            seen.append(capsys.readouterr().out)

    _print_text(tokens(), lambda ids: b"".join(pieces[token] for token in ids).decode(errors="replace"), session)
    assert seen == [" Pa", "ris ", "", "é", "!"]
    assert capsys.readouterr().out == "\n"
    _print_text(iter([0]), lambda ids: "silent", Session(1, 2, session.device, session.status))
    assert capsys.readouterr().out == ""
