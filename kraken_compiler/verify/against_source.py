"""Contract 1, first half: in standard form a lane program equals its source model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kraken_compiler.errors import typed_line
from kraken_compiler.ir.layers import LayerTable
from kraken_compiler.ir.program import LaneProgram, Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.form.join_streams import NATIVE
from kraken_compiler.passes.sample_inputs import sample_inputs
from kraken_compiler.passes.stages import recognize
from kraken_compiler.verify.compare import Comparison, count_not_finite, errors, largest_errors
from kraken_compiler.verify.noise import measure_noise
from kraken_compiler.verify.tolerances import computed_dtypes, source_tolerance

Run = Callable[[list[Tensor]], tuple[Tensor, ...]]


class ModelFailedError(Exception):
    """Error for a model that itself raised an error, which says nothing about the lanes."""


def compare_with_source(
    source: Program,
    standard: LaneProgram,
    read: SourceReader,
    sizes: Sequence[tuple[int, int]],
    *,
    model: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] | None = None,
    lanes: Run | None = None,
    padded: bool = False,
) -> list[Comparison]:
    """Run the source and a lane program that must equal it.

    Args:
        source: The source model's program as it was captured; no pass has changed it.
        standard: A lane program of it in an exact form.
        read: The source's weight store.
        sizes: Batch and sequence sizes to try.
        model: Runs the model itself on the program's inputs; None runs the captured program in its place, streaming.
        lanes: Runs the lane program; None streams it.
        padded: Let masks hide tokens.

    Raises:
        ModelFailedError: The model raised an error, or computes what is no number.
    """
    run = lanes or _streaming(standard, read).run_flat
    # Of a model with lanes of its own one lane was captured, which by itself computes something else.
    is_native = NATIVE in standard.plan.forms
    inside = computed_dtypes(source)
    run_source = partial(_run_model, model) if model is not None else _streaming(source, read).run_flat
    comparisons = []
    for seed, (batch, sequence) in enumerate(sizes):
        inputs, want = _sample(source, run_source, (batch, sequence), seed, padded)
        dtypes = {one.dtype for one in want if one.is_floating_point()} | inside
        tolerance, noise = source_tolerance(dtypes), None
        try:
            outputs = run(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            # An operator that takes no such sizes: where the model computes, this is a difference like any other.
            failure = f"the standard form fails ({typed_line(error)})"
            comparisons.append(_comparison((batch, sequence), math.inf, math.inf, tolerance, "", failure))
            continue
        have = tuple(output.detach().to(one.device) for output, one in zip(outputs, want))
        shapes = [[tuple(one.shape) for one in outputs] for outputs in (have, want)]
        if shapes[0] == shapes[1]:
            absolute, relative = largest_errors(have, want)
            wrong = "" if math.isfinite(relative) else count_not_finite("the standard form", have, "the source", want)
            if relative > tolerance and not wrong:
                noisy = standard if is_native else source
                noise = measure_noise(noisy, read_from_source(noisy, read), inputs)
                tolerance = source_tolerance(dtypes, noise)
        else:
            absolute = relative = math.inf
            wrong = f"outputs of shapes {_shapes_text(shapes[0])} instead of {_shapes_text(shapes[1])}"
        known = relative <= tolerance or is_native
        diverging = "" if known else _diverging(source, standard, read, inputs, tolerance)
        if not known and not diverging and model is not None:
            diverging = _not_captured(run_source, _streaming(source, read).run_flat, inputs, want, tolerance)
        comparisons.append(_comparison((batch, sequence), absolute, relative, tolerance, diverging, wrong, noise))
    if is_native:
        return [replace(comparison, what="lanes against the source") for comparison in comparisons]
    return comparisons


def _comparison(
    sizes: tuple[int, int],
    absolute: float,
    relative: float,
    tolerance: float,
    diverging: str,
    wrong: str,
    noise: float | None = None,
) -> Comparison:
    what = "standard form against the source"
    return Comparison(what, sizes, absolute, relative, tolerance, diverging, noise, wrong)


def _shapes_text(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _run_model(model: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    try:
        return model(inputs)
    except Exception as error:
        # The model's own code may raise anything at sizes or values that it does not take.
        raise ModelFailedError(f"the model itself fails there ({typed_line(error)})") from error


def _sample(
    source: Program, run_source: Run, size: tuple[int, int], seed: int, padded: bool
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Inputs on which the source computes numbers, and what it computes.

    Flags may say what is seen or what is hidden: where all are hidden, a softmax is over nothing.
    """
    has_flags = any(spec.dtype == "bool" for spec in source.inputs)
    for flags in (True, False) if has_flags else (True,):
        inputs = [*sample_inputs(source, *size, seed, padded=padded, flags=flags).values()]
        want = run_source(inputs)
        if not any(bool(one.isnan().any()) for one in want):
            return inputs, want
    raise ModelFailedError("what the model itself computes there is no number (NaN)")


def _not_captured(model: Run, captured: Run, inputs: list[Tensor], want: tuple[Tensor, ...], tolerance: float) -> str:
    """What differs, where the stream of the lanes is that of the captured program."""

    def differs(run: Run) -> bool:
        have = run(inputs)
        shapes = [[one.shape for one in outputs] for outputs in (have, want)]
        return shapes[0] != shapes[1] or not largest_errors(have, want)[1] <= tolerance

    if differs(model):
        return "the model itself, which computes something else when it is called again: it keeps or draws something"
    if differs(captured):
        return (
            "what torch.export captured, which is not what the model computes: its code asks for these sizes, or "
            "whether it is traced"
        )
    return "what follows the layers, or how their attention was read: please report the model"


def _diverging(
    source: Program, standard: LaneProgram, read: SourceReader, inputs: list[Tensor], tolerance: float
) -> str:
    """The first place at which the lanes' stream is not that of the source's program; "" if there is none."""
    recognized_source = recognize(source)
    _, source_stream = _streaming(recognized_source, read).run_with_taps(
        inputs, _joins(recognized_source.layers).values()
    )
    _, stream = _streaming(standard, read).run_with_taps(inputs, _joins(standard.layers).values())
    return _first_diverging(recognized_source.layers, standard.layers, source_stream, stream, tolerance)


def _streaming(program: Program, read: SourceReader) -> StreamingProgram:
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
