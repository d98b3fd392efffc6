"""Contract 1, first half: in standard form a lane program equals its source model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from kraken_compiler.backends.single.streaming import StreamingProgram, read_from_source
from kraken_compiler.ir.layers import LayerTable
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import sample_inputs
from kraken_compiler.passes.manager import run_passes
from kraken_compiler.passes.pipelines import RECOGNIZE
from kraken_compiler.verify.compare import Comparison, count_not_finite, errors, largest_errors, source_tolerance


def compare_with_source(
    captured: Program,
    standard: Program,
    read: Callable[[str], Tensor],
    sizes: tuple[tuple[int, int], ...],
) -> list[Comparison]:
    """Run the source graph and a lane program that must equal it, both streaming.

    Args:
        captured: The source model's program as it was captured; no pass has touched it.
        standard: A lane program of it in an exact form.
        read: The source's weight store.
        sizes: Batch and sequence sizes to try.
    """
    recognized = captured.copy()
    run_passes(recognized, RECOGNIZE)
    assert recognized.layers is not None
    assert standard.layers is not None
    comparisons = []
    for seed, (batch, sequence) in enumerate(sizes):
        inputs = list(sample_inputs(captured, batch, sequence, seed).values())
        want = _streaming(captured, read).run_flat(inputs)
        tolerance = source_tolerance(want[0].dtype)
        _, source_stream = _streaming(recognized, read).run_with_taps(inputs, _joins(recognized.layers).values())
        have, stream = _streaming(standard, read).run_with_taps(inputs, _joins(standard.layers).values())
        diverging = _first_diverging(recognized.layers, standard.layers, source_stream, stream, tolerance)
        absolute, relative = largest_errors(have, want)
        wrong = "" if math.isfinite(relative) else count_not_finite("the standard form", have, "the source", want)
        comparisons.append(
            Comparison(
                "standard form against the source",
                (batch, sequence),
                absolute,
                relative,
                tolerance,
                diverging,
                not_finite=wrong,
            )
        )
    return comparisons


def _streaming(program: Program, read: Callable[[str], Tensor]) -> StreamingProgram:
    return StreamingProgram(program, read_from_source(program, read))


def _joins(layers: LayerTable) -> dict[int, str]:
    return dict(layers.joins)


def _first_diverging(
    source: LayerTable, lanes: LayerTable, want: dict[str, Tensor], have: dict[str, Tensor], tolerance: float
) -> str:
    """Compare the residual stream after every branch at which both programs have it whole."""
    there = _joins(lanes)
    for point, name in source.joins:
        if point not in there:
            continue
        relative = errors(have[there[point]], want[name])[1]
        if not relative <= tolerance:
            if point == 0:
                return "the embedding"
            branch = source.branches[point - 1]
            return f"layer {branch.layer}, {branch.kind} ({branch.path or 'module unknown'})"
    return ""
