"""Write a decomposed RMSNorm as one `rms_norm`.

%v = mean(pow(%x, 2), [-1], True)                ->     %y = rms_norm(%x, [d], %w, eps)
%y = mul(%w, mul(%x, rsqrt(add(%v, eps))))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, near_miss, replace
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.shapes import shape_of, value_of

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)


@dataclass(frozen=True)
class FuseRmsNorm(Pass[Program]):
    name: ClassVar[str] = "fuse-rms-norm"

    def run(self, program: Program) -> PassResult:
        weights = weight_derived(program)
        return PassResult.of(_fuse(node, weights) for node in calls(program.graph, aten.rsqrt.default))


def _fuse(rsqrt: fx.Node, weights: set[fx.Node]) -> bool | Rejection:
    root = _normalized_operand(rsqrt)
    if root is None:
        return False
    if isinstance(root, Rejection):
        return root
    if len(rsqrt.users) != 1:
        return near_miss("the root of the mean square is read more than once", rsqrt)
    x, epsilon = root
    (last,) = rsqrt.users
    if last.target is not aten.mul.Tensor or set(args_of(last)) != {x, rsqrt}:
        return near_miss("what the root of the mean square scales is not what was squared", last)
    width = shape_of(x)[-1]
    weight = None
    if x.target in _CASTS:
        # A model in half precision computes the norm in float32 and casts back, before or after its weight; the fused
        # kernel does the same inside.
        narrow = args_of(x)[0]
        assert isinstance(narrow, fx.Node)
        weight, product = _weight(last, width, weights)
        cast = _only_user(product if product is not None else last)
        if cast is None or cast.target not in _CASTS or value_of(cast).dtype != value_of(narrow).dtype:
            return near_miss("a norm in a wider dtype is not cast back", last)
        x, last = narrow, cast
    if weight is None:
        other, product = _weight(last, width, weights)
        if (
            other is not None
            and product is not None
            and value_of(other).dtype == value_of(x).dtype == value_of(product).dtype
        ):
            weight, last = other, product
    with last.graph.inserting_before(last):
        replace(last, last.graph.call_function(aten.rms_norm.default, (x, [width], weight, epsilon)))
    return True


def _weight(normalized: fx.Node, width: object, weights: set[fx.Node]) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
    """The weight that a normalised value is multiplied with and nothing else, and that product."""
    product = _only_user(normalized)
    if product is not None and product.target is aten.mul.Tensor:
        other = args_of(product)[1] if args_of(product)[0] is normalized else args_of(product)[0]
        if isinstance(other, fx.Node) and other in weights and shape_of(other) == (width,):
            return other, product
    return None, None


def _normalized_operand(rsqrt: fx.Node) -> tuple[fx.Node, float] | Rejection | None:
    """x and eps of rsqrt(mean(x * x, -1, keepdim) + eps); None if it is no root of a mean."""
    radicand = args_of(rsqrt)[0]
    if not isinstance(radicand, fx.Node) or radicand.target is not aten.add.Tensor:
        return None
    mean, epsilon = args_of(radicand)[:2]
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    if not isinstance(epsilon, float):
        return near_miss("the epsilon of a norm is no plain number", radicand)
    square, dims = args_of(mean)[:2]
    rank = len(shape_of(mean))
    if [dim % rank for dim in dims] != [rank - 1] or argument(mean, 2, "keepdim", False) is not True:
        return near_miss("a mean is not over the last dim alone, or does not keep it", mean)
    if (
        (square.target is aten.pow.Tensor_Scalar and args_of(square)[1] == 2)
        or (square.target is aten.mul.Tensor and args_of(square)[0] is args_of(square)[1])
        or square.target is aten.square.default
    ):
        x = args_of(square)[0]
    else:
        return near_miss("a mean under a root is not of squares", square)
    return x, epsilon


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
