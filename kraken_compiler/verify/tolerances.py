"""Tolerances of comparisons: how far two right programs may differ, by the element types that they compute in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.shapes import is_tensor, value_of

NOISE_FACTOR = 10
"""Two right programs may differ by this many times the difference that the order of a sum alone makes."""

LARGEST_NOISE = 1e-2
"""A program that is noisier than this cannot be told from a wrong one, and fails."""

_SOURCE_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
# Ten times the rounding of float16: ONNX Runtime rounds at other operators than torch does, and over twelve families,
# two forms and up to 40 tokens the largest error was 6e-3.
_RANK_TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}


def source_tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Largest relative error of a rewritten program against its source: sums over lanes round differently.

    Args:
        dtypes: Element types of what it computes; the least exact of them decides.
    """
    return _least_exact(_SOURCE_TOLERANCE, dtypes)


def rank_tolerance(dtypes: Iterable[torch.dtype], noise: float) -> float:
    """Largest relative error of N ranks against the lanes in one process.

    Args:
        dtypes: Element types of what they compute; the least exact of them decides.
        noise: Relative difference of two runs in one process that add the lanes in another order. A form that changes
            the function can leave a pretrained model ill-conditioned, and then rounding alone makes more than the
            usual tolerance.
    """
    return max(_least_exact(_RANK_TOLERANCE, dtypes), min(NOISE_FACTOR * noise, LARGEST_NOISE))


def computed_dtypes(program: Program) -> set[torch.dtype]:
    """Element types of what a program computes from its inputs: it is as exact as the least exact of them."""
    names = {spec.name for spec in program.inputs}
    computed_nodes: set[fx.Node] = set()
    for node in program.graph.nodes:
        # Sizes, and what is made of them, are no rounded numbers.
        is_size = isinstance(node.meta.get("val"), (torch.SymInt, int))
        if node.name in names or (not is_size and not computed_nodes.isdisjoint(node.all_input_nodes)):
            computed_nodes.add(node)
    dtypes = {value_of(node).dtype for node in computed_nodes if is_tensor(node)}
    return {dtype.to_real() for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}


def _least_exact(tolerances: Mapping[str, float], dtypes: Iterable[torch.dtype]) -> float:
    """The largest tolerance; float32's where no element type says one, as in a program of whole numbers."""
    limits = [tolerances.get(str(dtype).removeprefix("torch."), 0.0) for dtype in dtypes]
    return max(limits, default=0.0) or tolerances["float32"]
