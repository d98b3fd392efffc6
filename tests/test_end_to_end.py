"""One real run of every backend: a model becomes an artifact, checked on ranks, and processes continue its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli_command import run_process
from tests.generation_functions import continuation
from tests.passes.models import Gpt

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end, pytest.mark.timeout(240)]

PROMPT, NEW = [5, 6, 40, 8], 6


def save(model: nn.Module, path: Path) -> None:
    """As a torch.export archive for any batch and sequence."""
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}
    ids = torch.zeros(2, 8, dtype=torch.int64)
    torch.export.save(torch.export.export(model, (ids,), dynamic_shapes=(sizes,)), path)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_model_is_compiled_and_run(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Gpt(2).eval()
    save(model, tmp_path / "model.pt2")
    artifact = tmp_path / "model.kraken"
    form = ("--degree", "2", "--form", "standard")
    printed = run_process("compile", tmp_path / "model.pt2", *form, "--backend", backend, "-o", artifact).stdout
    assert "against the lanes in one process" in printed
    ids = ",".join(map(str, PROMPT))
    answer = run_process("run", artifact, "--input-ids", ids, "--max-new-tokens", str(NEW)).stdout
    with torch.no_grad():
        assert list(map(int, answer.split(","))) == continuation(model, PROMPT, NEW)
