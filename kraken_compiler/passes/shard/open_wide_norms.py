"""Open norms inside branches that normalise over what is split between lanes: QK-norm over all heads, norms in FFNs.

    %n = rms_norm(%q, [64], %w, eps)                 ->     %m = kraken.mean_power(%q, 2, 64)        [b, s, 1]
                                                            %n = mul(mul(%q, rsqrt(add(%m, eps))), %w)

Everything but the mean is element by element, so the mean is all that lanes have to tell each other: a number or two a
token. Computing the whole of q and k on every lane would take that collective away and cost most of the projections'
gain from splitting them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Program, Recognized
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the op)
from kraken_compiler.ops.op_sets import ATTENTIONS
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, replace
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.recognize.projections import Projections, find_projections
from kraken_compiler.passes.shapes import shape_of, value_of

_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
_MEAN = torch.ops.kraken.mean_power.default


@dataclass(frozen=True)
class OpenWideNorms(Pass[Recognized]):
    """The pass before the split over `degree` lanes."""

    degree: int = 1

    name: ClassVar[str] = "open-wide-norms"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        if self.degree == 1 or program.degree == self.degree:
            return PassResult()
        nodes = {node.name: node for node in program.graph.nodes}
        weights = weight_derived(program)
        matches = 0
        branches = []
        for branch in program.layers.branches:
            projections = find_projections(nodes[branch.output], [nodes[name] for name in branch.nodes], weights)
            assert isinstance(projections, Projections)
            replacements = {norm.name: _open(norm) for norm in _wide_norms(branch, projections)}
            matches += len(replacements)
            names = [new for name in branch.nodes for new in replacements.get(name, [name])]
            branches.append((branch, tuple(names)))
        program.layers = program.layers.with_nodes(dict(branches))
        return PassResult(matches)


def _wide_norms(branch: Branch, projections: Projections) -> list[fx.Node]:
    """The norms between a branch's projections that are not over single heads."""
    attention = next((node for node in projections.region if node.target in ATTENTIONS), None)
    head = None if attention is None else shape_of(args_of(attention)[0])[-1]
    return [node for node in projections.region if node.target in _NORMS and shape_of(node)[-1] != head]


def _open(norm: fx.Node) -> list[str]:
    """Write one norm as its mean and what follows; returns the names of the new nodes."""
    x, sizes = args_of(norm)[:2]
    is_layer_norm = norm.target is aten.layer_norm.default
    weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias") if is_layer_norm else None
    epsilon = argument(norm, 4 if is_layer_norm else 3, "eps")
    dtype = value_of(norm).dtype
    width = int(sizes[-1])
    if epsilon is None:
        epsilon = 1e-5 if is_layer_norm else torch.finfo(dtype).eps
    graph, new_nodes = norm.graph, []

    def call(target: object, *args: object) -> fx.Node:
        new_nodes.append(graph.call_function(target, args))  # type: ignore[arg-type]
        new_nodes[-1].meta["nn_module_stack"] = norm.meta.get("nn_module_stack", {})
        return new_nodes[-1]

    with graph.inserting_before(norm):
        # As in the norm's own kernel, the statistics of half-precision values are float32.
        is_half = dtype in (torch.float16, torch.bfloat16)
        wide = call(aten.to.dtype, x, torch.float32) if is_half else x
        variance = call(_MEAN, wide, 2, width)
        if is_layer_norm:
            mean = call(_MEAN, wide, 1, width)
            wide = call(aten.sub.Tensor, wide, mean)
            variance = call(aten.sub.Tensor, variance, call(aten.mul.Tensor, mean, mean))
        result = call(aten.mul.Tensor, wide, call(aten.rsqrt.default, call(aten.add.Tensor, variance, epsilon)))
        if is_half:
            result = call(aten.to.dtype, result, dtype)
        for operand, target in ((weight, aten.mul.Tensor), (bias, aten.add.Tensor)):
            result = result if operand is None else call(target, result, operand)
    replace(norm, result)
    return [node.name for node in new_nodes]
