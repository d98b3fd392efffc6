"""Run a region of a graph on small random float64 tensors, to see which elements depend on which.

A region lies between leaves (projection outputs, attention outputs) that are cut: they become random tensors, so no
weight of a projection is needed and a model without weights can be probed. Operators with flat or dead ranges have a
smooth stand-in, because a zero gradient must mean "does not depend" and not "was negative".
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kraken_compiler.errors import Rejection, UnsupportedModelError, first_line
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers our own ops)
from kraken_compiler.passes.choosing import CHOOSING, COMPARISONS, LOOKUPS, compare, lookup
from kraken_compiler.passes.graph_tools import args_of, aten, module_path
from kraken_compiler.passes.shapes import Concretizer

_SMOOTH: dict[Any, Any] = {
    aten.relu.default: F.softplus,
    aten.clamp.default: lambda x, *bounds, **options: x,
    aten.clamp_min.default: lambda x, *bounds, **options: x,
    aten.clamp_max.default: lambda x, *bounds, **options: x,
    aten.hardtanh.default: lambda x, *bounds, **options: x,
    aten.relu6.default: F.softplus,
    aten.hardswish.default: F.silu,
    aten.hardsigmoid.default: torch.sigmoid,
    aten.abs.default: lambda x: torch.sqrt(x * x + 1),
    **CHOOSING,
    # A mean over all lanes' columns is told to all lanes; that it depends on all columns mixes nothing.
    torch.ops.kraken.mean_power.default: lambda x, power, *rest: x.new_full((*x.shape[:-1], 1), power - 1.0),
}
_HINT = "Its branch is run on 2 sequences of 3 random tokens in float64: write it with operators that can be."
_INTEGERS = (torch.int64, torch.int32)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Region:
    """A part of a graph that can be run.

    Args:
        nodes: The nodes to run, in graph order.
        leaves: Nodes whose value is replaced by a random tensor; one of `nodes` among them is not run.
        constants: Values of constants, by node name.
        seed: Seed of the random numbers.
    """

    def __init__(
        self, nodes: Iterable[fx.Node], leaves: Iterable[fx.Node], constants: Mapping[str, Tensor], seed: int = 0
    ) -> None:
        self.leaves = list(leaves)
        region, leaf_set = list(nodes), set(self.leaves)
        self.nodes = [node for node in region if node not in leaf_set]
        inside = set(region) | leaf_set
        self.externals = list(
            dict.fromkeys(operand for node in region for operand in node.all_input_nodes if operand not in inside)
        )
        generator = torch.Generator().manual_seed(seed)
        sizes = Concretizer()
        # Autograd takes no tensors of inference mode, not even as indices, but copies of them.
        constants = {name: value.clone() if value.is_inference() else value for name, value in constants.items()}
        self.inputs: dict[fx.Node, Any] = {}
        try:
            constants = {**constants, **_whole_numbers(self.externals, constants, sizes)}
            self.inputs.update(
                (node, sizes.value(node, generator, constants)) for node in (*self.leaves, *self.externals)
            )
        except ZeroDivisionError as error:
            # Blocks of tokens, of which a few tokens fill none.
            reason = (
                "what lanes need of it cannot be found out on a few tokens: a size is divided by one that is 0 there"
            )
            at = next(iter(region))
            raise UnsupportedModelError([Rejection(reason, (at.name,), module_path(at), _HINT)]) from error
        self._constant_names = set(constants)

    def run(self, replacements: Mapping[fx.Node, Tensor] | None = None, gradients: bool = False) -> dict[fx.Node, Any]:
        """Values of all nodes.

        Args:
            replacements: Values to use instead of the region's own inputs.
            gradients: Whether the inputs should require gradients.
        """
        values: dict[fx.Node, Any] = dict(self.inputs)
        values.update(replacements or {})
        if gradients:
            for node, value in values.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    values[node] = value.detach().clone().requires_grad_()
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((args_of(node), node.kwargs), values.__getitem__)
            try:
                values[node] = (
                    lookup(node, *_widen_arguments(args, kwargs)) if self._picks(node) else _call(node, args, kwargs)
                )
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
                # Deep inside a pass, and for the user: the operator does not run on a few random numbers.
                reason = f"what lanes need of it cannot be found out: {first_line(error)}"
                raise UnsupportedModelError([Rejection(reason, (node.name,), module_path(node), _HINT)]) from error
        return values

    def _picks(self, node: fx.Node) -> bool:
        """True for an operator that picks by numbers which are computed from the leaves, or not known."""
        if node.target not in LOOKUPS:
            return False
        numbers = args_of(node)[LOOKUPS[node.target][1]]
        several = numbers if isinstance(numbers, (list, tuple)) else [numbers]
        return any(one.name not in self._constant_names for one in several if one is not None)


def _whole_numbers(externals: list[fx.Node], constants: Mapping[str, Tensor], sizes: Concretizer) -> dict[str, Tensor]:
    """Values of whole numbers that are computed from constants and sizes alone: positions, powers, bucket numbers."""
    numbers: dict[str, Tensor] = {}
    for node in externals:
        value = node.meta["val"]
        if node.name in constants or not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
            continue
        number = _value_without_inputs(node, constants, sizes, {})
        if number is not None:
            numbers[node.name] = number
    return numbers


def _value_without_inputs(
    node: fx.Node, constants: Mapping[str, Tensor], sizes: Concretizer, values: dict[fx.Node, Any]
) -> Any:
    """The value of a node without the program's inputs and weights; None if it needs them."""
    if node not in values:
        if node.name in constants:
            values[node] = constants[node.name]
        elif not isinstance(node.meta["val"], (Tensor, list, tuple)):
            values[node] = sizes.size(node.meta["val"])
        elif node.op == "placeholder":
            values[node] = None
        else:
            operands = [_value_without_inputs(operand, constants, sizes, values) for operand in node.all_input_nodes]
            values[node] = None
            if all(operand is not None for operand in operands):
                assert callable(node.target)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values[node]


def _widen_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _widen(args), _widen(dict(kwargs))


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    args, kwargs = _widen_arguments(args, kwargs)
    if node.target in _SMOOTH:
        return _SMOOTH[node.target](*args, **kwargs)
    if node.target in COMPARISONS:
        return compare(node, *args)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _widen(part: Any) -> Any:
    """Replace dtype arguments by float64, so that a cast inside the region does not break the probe."""
    if isinstance(part, dict):
        return {key: _widen(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_widen(value) for value in part)
    return torch.float64 if part in _FLOATS else part
