"""Tolerances of comparisons: how far two right programs may differ, by the element types that they compute in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.shapes import is_tensor, value_of
from kraken_compiler.verify.compare import Comparison

NOISE_FACTOR = 10
"""Two right programs may differ by this many times the noise of their rounding (`noise.measure_noise`)."""

LARGEST_NOISE = 1e-2
"""A program that is noisier than this cannot be told from a wrong one, and fails, or is compared in float32, too."""

_SOURCE_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
# Ten times the rounding of float16: ONNX Runtime rounds at other operators than torch does, and over twelve families,
# two forms and up to 40 tokens the largest error was 6e-3.
_RANK_TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}


def source_tolerance(dtypes: Iterable[torch.dtype], noise: float = 0.0) -> float:
    """Largest relative error of a rewritten program against its source: sums over lanes round differently.

    Args:
        dtypes: Element types of what it computes; the least exact of them decides.
        noise: What rounding alone makes of the program's results, where that was measured. An ill-conditioned model
            (one without norms, say) makes more of it than the usual tolerance; so does a pretrained one of which a form
            changes the function.
    """
    return max(_least_exact(_SOURCE_TOLERANCE, dtypes), min(NOISE_FACTOR * noise, LARGEST_NOISE))


def rank_tolerance(dtypes: Iterable[torch.dtype], noise: float = 0.0) -> float:
    """Largest relative error of N ranks against the lanes in one process.

    Args:
        dtypes, noise: See `source_tolerance`.
    """
    return max(_least_exact(_RANK_TOLERANCE, dtypes), min(NOISE_FACTOR * noise, LARGEST_NOISE))


def is_within_noise(comparison: Comparison) -> bool:
    """True if an error is none beside what rounding alone makes of the program's results, however much that is."""
    return comparison.noise is not None and comparison.max_rel_error <= NOISE_FACTOR * comparison.noise


def with_noise_allowed(comparison: Comparison) -> Comparison:
    """A comparison that passes if it is within the noise, for a program that was compared in float32, too."""
    if comparison.passed or comparison.noise is None:
        return comparison
    return replace(comparison, tolerance=NOISE_FACTOR * comparison.noise)


def computed_dtypes(program: Program) -> set[torch.dtype]:
    """Element types of what a program computes from its inputs: it is as exact as the least exact of them."""
    dtypes = {value_of(node).dtype for node in computed_nodes(program) if is_tensor(node)}
    return {dtype.to_real() for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}


def computed_nodes(program: Program) -> set[fx.Node]:
    """A program's inputs and what it computes from them, but for sizes: those are no rounded numbers."""
    names = {spec.name for spec in program.inputs}
    nodes: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_size = isinstance(node.meta.get("val"), (torch.SymInt, int))
        if node.name in names or (not is_size and not nodes.isdisjoint(node.all_input_nodes)):
            nodes.add(node)
    return nodes


def _least_exact(tolerances: Mapping[str, float], dtypes: Iterable[torch.dtype]) -> float:
    """The largest tolerance; float32's where no element type says one, as in a program of whole numbers."""
    limits = [tolerances.get(str(dtype).removeprefix("torch."), 0.0) for dtype in dtypes]
    return max(limits, default=0.0) or tolerances["float32"]
