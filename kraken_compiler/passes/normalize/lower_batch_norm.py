"""Write a batch norm in evaluation mode as what it is then: a factor and a summand for every channel, made of weights.

%y = batch_norm(%x, %w, %b, %mean, %var, False, 0.1, 1e-5)
                                                 ->     %f = %w * rsqrt(%var + 1e-5)
                                                        %y = %x * reshape(%f, [c, 1]) + reshape(%b - %mean * %f, [c, 1])

Channels are dim 1. One that takes the statistics of its batch stays: it mixes rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, aten, calls, replace
from kraken_compiler.passes.shapes import compute_shape, fake_mode_of, shape_of, value_of


@dataclass(frozen=True)
class LowerBatchNorm(Pass[Program]):
    name: ClassVar[str] = "lower-batch-norm"

    def run(self, program: Program) -> PassResult:
        norms = [node for node in calls(program.graph, aten.batch_norm.default) if not args_of(node)[5]]
        for node in norms:
            _lower(node)
        return PassResult(len(norms))


def _lower(norm: fx.Node) -> None:
    x, weight, bias, mean, variance, _, _, epsilon = args_of(norm)[:8]
    graph, mode, dtype = norm.graph, fake_mode_of(norm.graph), value_of(norm).dtype
    # As in the norm's own kernel, half-precision values are scaled in float32.
    wide_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    channel_shape = [-1, *[1] * (len(shape_of(norm)) - 2)]

    def call(target: Any, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["nn_module_stack"] = norm.meta.get("nn_module_stack", {})
        return compute_shape(node, mode)

    def widen(node: fx.Node) -> fx.Node:
        return node if value_of(node).dtype == wide_dtype else call(aten.to.dtype, node, wide_dtype)

    with graph.inserting_before(norm):
        factor = call(aten.rsqrt.default, call(aten.add.Tensor, widen(variance), epsilon))
        if weight is not None:
            factor = call(aten.mul.Tensor, factor, widen(weight))
        summand = call(aten.neg.default, call(aten.mul.Tensor, widen(mean), factor))
        if bias is not None:
            summand = call(aten.add.Tensor, widen(bias), summand)
        result = call(aten.mul.Tensor, widen(x), call(aten.reshape.default, factor, channel_shape))
        result = call(aten.add.Tensor, result, call(aten.reshape.default, summand, channel_shape))
        if wide_dtype != dtype:
            result = call(aten.to.dtype, result, dtype)
    replace(norm, result)
