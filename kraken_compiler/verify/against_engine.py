"""Comparison of a backend's own engine with all lanes in one process: what it generates, and from which logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kraken_compiler.backends.base import OwnEngine, Reference
from kraken_compiler.generate.engine import GenerationRequest
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.ir.size_checks import require_generation
from kraken_compiler.lanes.reference import StreamingProgram
from kraken_compiler.passes.sample_inputs import sample_inputs
from kraken_compiler.verify.compare import Comparison, largest_errors, without_fill
from kraken_compiler.verify.noise import measure_noise
from kraken_compiler.verify.tolerances import computed_dtypes, rank_tolerance

LENGTHS, NEW_TOKENS = (1, 5, 12, 27), 6
"""Tokens of the prompts, which the engine gets all at once, and how many it continues each by."""


def compare_with_engine(engine: OwnEngine, lanes: Reference, who: str) -> list[Comparison]:
    """Compare the logits of the first new token, and the most likely continuation.

    A token that the lanes find less likely than theirs by no more than the tolerance is no error: then the row goes on
    with the engine's.

    Args:
        engine: A running engine of an artifact.
        lanes: What it must compute.
        who: What the engine is called.

    Raises:
        UsageError: The model takes no texts of such lengths.
    """
    program = lanes.program
    longest = [length for length in LENGTHS if length + NEW_TOKENS <= engine.positions]
    require_generation(program.call, program.inputs, len(longest), longest, NEW_TOKENS)
    (ids,) = sample_inputs(program, len(longest), max(longest)).values()
    prompts = [row[:length].tolist() for row, length in zip(ids, longest)]
    streaming = StreamingProgram(program, lanes.read_lane)
    first = _last_logits(streaming, prompts)
    have = [torch.from_numpy(row) for row in engine.first_logprobs(prompts)]
    want = [row.float().log_softmax(dim=-1)[: len(one)] for row, one in zip(first, have, strict=True)]
    request = GenerationRequest(prompts, NEW_TOKENS, max(longest) + NEW_TOKENS, Sampling())
    continuations = [list(row) for row in zip(*engine.run(request), strict=True)]
    worst = _worst_choice(streaming, prompts, first, continuations)
    size = (len(longest), max(longest))
    absolute, relative = largest_errors(tuple(have), tuple(want))
    tolerance, noise = rank_tolerance({first[0].dtype} | computed_dtypes(program)), None
    if not max(relative, worst) <= tolerance:
        noise = measure_noise(program, lanes.read_lane, [ids])
        tolerance = rank_tolerance({first[0].dtype} | computed_dtypes(program), noise)
    return [
        Comparison(
            f"logits of the first token by {who} against the lanes", size, absolute, relative, tolerance, "", noise
        ),
        Comparison(f"tokens that {who} continues with against the lanes", size, worst, worst, tolerance, "", noise),
    ]


def _last_logits(streaming: StreamingProgram, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits [vocabulary] behind every row."""
    program = streaming.program
    dtype = getattr(torch, program.inputs[0].dtype)
    outputs = streaming.run_each([[torch.tensor([row], dtype=dtype)] for row in rows])
    return [of_row[program.call.logits][0, -1] for of_row in outputs]


def _worst_choice(
    streaming: StreamingProgram,
    prompts: Sequence[Sequence[int]],
    first: Sequence[Tensor],
    continuations: Sequence[Sequence[int | None]],
) -> float:
    """By how much the lanes find a token that was chosen less likely than theirs, over their largest logit."""
    rows, logits, worst = [list(prompt) for prompt in prompts], list(first), 0.0
    for step in range(NEW_TOKENS):
        for row, of_row, chosen in zip(rows, logits, continuations, strict=True):
            token = chosen[step]
            assert token is not None, "nothing ends a row"
            scores = of_row.double()
            computed, _ = without_fill(scores, scores)
            worst = max(worst, ((scores.max() - scores[token]) / computed.abs().max()).item())
            row.append(token)
        if step + 1 < NEW_TOKENS:
            logits = _last_logits(streaming, rows)
    return worst
