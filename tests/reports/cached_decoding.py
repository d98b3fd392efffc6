"""A model's cached decode beside the model itself, in one process: what tests of the KV cache's kinds share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kraken_compiler.capture import capture
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.passes.lower import lower
from kraken_compiler.verify.compare import errors
from tests.lane_decoder import LaneDecoder
from tests.reports.small_models import EXAMPLE, TOLERANCE, logits, tokens


def lowered(model: nn.Module, degree: int = 2, example: Any = EXAMPLE) -> tuple[LaneProgram, SourceReader]:
    """The lane program of a model in standard form, and its weights."""
    captured = capture(model, example_inputs=example)
    program, _ = lower(captured.program, degree, "standard")
    return program, captured.store.read


def check_decode(
    model: nn.Module,
    program: LaneProgram,
    read: SourceReader,
    *,
    batch: int = 3,
    prompt: int = 4,
    positional: bool = False,
) -> None:
    """Prompt, then token after token, at capacities beyond the sequence: the model's forward on every prefix.

    With `positional`, every row has its own positions, as in a batch of prompts of different lengths.
    """
    total = prompt + 5
    ids = tokens(batch, total)
    limit = program.cached.plan.limit if program.cached is not None else None
    for capacity in (total + 3, min(90, limit or 90)):
        decoder = LaneDecoder(program, read, batch, capacity)
        places = torch.arange(total).expand(ids.shape)
        bounds = [(0, prompt), *((at, at + 1) for at in range(prompt, total))]
        parts = [decoder.run(ids[:, a:b], places[:, a:b], positional=positional) for a, b in bounds]
        want = torch.stack([expected(model, ids[:, : length + 1]) for length in range(prompt - 1, total)], 1)
        have = torch.cat([parts[0][:, -1:], *parts[1:]], 1)
        assert errors(have, want)[1] <= TOLERANCE, f"capacity {capacity}"


def expected(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits after the last token, [batch, vocabulary]."""
    with torch.no_grad():
        return logits(model(ids))[:, -1]
