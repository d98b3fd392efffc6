"""Rules that write every operator on complex tensors with their real and imaginary parts.

A rule takes the arithmetic and a node, and gives a `Pair` for a complex result, a node for a real one, or None if the
node's arguments are of a kind that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import FakeTensorMode
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.shapes import compute_shape, same_shape, shape_of, value_of

Part = fx.Node | float
"""A real tensor, or a number that all of its elements are; the number 0.0 takes no operators."""

REAL_OF = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class Pair:
    """The real and the imaginary part of what a complex node computes."""

    real: Part
    imag: Part


@dataclass
class Arithmetic:
    """Real arithmetic on parts; new nodes stand before `node` and know their shapes."""

    graph: fx.Graph
    mode: FakeTensorMode
    node: fx.Node
    pairs: dict[fx.Node, Pair] = field(default_factory=dict)

    def pair(self, operand: Any) -> Pair:
        """The parts of an operand: a complex node, a real one, or a number."""
        if isinstance(operand, fx.Node):
            return self.pairs.get(operand, Pair(operand, 0.0))
        number = complex(operand)
        return Pair(number.real, number.imag)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        new.meta["nn_module_stack"] = self.node.meta.get("nn_module_stack", {})
        return compute_shape(new, self.mode)

    def add(self, left: Part, right: Part) -> Part:
        if not isinstance(left, fx.Node):
            left, right = right, left
        if not isinstance(left, fx.Node):
            return left + float(right)  # type: ignore[arg-type]
        return left if _is(right, 0.0) else self.call(aten.add.Tensor, left, right)

    def sub(self, left: Part, right: Part) -> Part:
        if _is(left, 0.0):
            return self.neg(right)
        return (
            self.call(aten.sub.Tensor, left, right) if _both_tensors(left, right) else self.add(left, self.neg(right))
        )

    def neg(self, part: Part) -> Part:
        return self.call(aten.neg.default, part) if isinstance(part, fx.Node) else -part or 0.0

    def mul(self, left: Part, right: Part) -> Part:
        if not isinstance(left, fx.Node):
            left, right = right, left
        if not isinstance(left, fx.Node):
            return left * float(right)  # type: ignore[arg-type]
        return 0.0 if _is(right, 0.0) else self.call(aten.mul.Tensor, left, right)

    def div(self, left: Part, right: Part) -> Part:
        if _is(left, 0.0) or not isinstance(right, fx.Node):
            return self.mul(left, 1.0 / right) if not isinstance(right, fx.Node) else 0.0
        if isinstance(left, fx.Node):
            return self.call(aten.div.Tensor, left, right)
        return self.mul(left, self.call(aten.reciprocal.default, right))

    def squared_length(self, pair: Pair) -> Part:
        return self.add(self.mul(pair.real, pair.real), self.mul(pair.imag, pair.imag))

    def tensors(self, pair: Pair) -> tuple[fx.Node, fx.Node]:
        """Both parts as tensors of one shape."""
        real, imag = self._fill(pair.real, pair.imag), self._fill(pair.imag, pair.real)
        return self._broadcast(real, imag), self._broadcast(imag, real)

    def both(self, pair: Pair, like: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Both parts as tensors; of a number, as tensors of no dims in the element type of `like`."""
        if isinstance(pair.real, fx.Node) or isinstance(pair.imag, fx.Node):
            return self.tensors(pair)
        dtype = REAL_OF[value_of(like).dtype]
        real, imag = (self.call(aten.full.default, [], part, dtype=dtype) for part in (pair.real, pair.imag))
        return real, imag

    def parts_like(self, pair: Pair, like: fx.Node) -> Pair | None:
        """Parts of the shape and the element type of the complex tensor; None if they cannot be brought to it."""
        dtype = REAL_OF[value_of(like).dtype]
        if not isinstance(pair.real, fx.Node) and not isinstance(pair.imag, fx.Node):
            return None
        if _is(pair.real, 0.0) or _is(pair.imag, 0.0):
            parts: list[Part] = [pair.real, pair.imag]
        else:
            parts = list(self.tensors(pair))
        for place, part in enumerate(parts):
            if isinstance(part, fx.Node) and not same_shape(part, like):
                return None
            if isinstance(part, fx.Node) and value_of(part).dtype != dtype:
                parts[place] = self.call(aten.to.dtype, part, dtype)
        return Pair(*parts)

    def _fill(self, part: Part, other: Part) -> fx.Node:
        if isinstance(part, fx.Node):
            return part
        assert isinstance(other, fx.Node)
        return self.call(aten.full_like.default, other, part)

    def _broadcast(self, part: fx.Node, other: fx.Node) -> fx.Node:
        """`part` broadcast to the shape that both have together."""
        both = torch.broadcast_shapes(shape_of(part), shape_of(other))  # type: ignore[no-untyped-call]
        if len(both) == len(shape_of(part)) and all(a is b or a == b for a, b in zip(both, shape_of(part))):
            return part
        return self.call(aten.add.Tensor, part, self.call(aten.zeros_like.default, other))


def _is(part: Part, number: float) -> bool:
    return not isinstance(part, fx.Node) and part == number


def _both_tensors(left: Part, right: Part) -> bool:
    return isinstance(left, fx.Node) and isinstance(right, fx.Node)


Rule = Callable[[Arithmetic, fx.Node], "Pair | fx.Node | None"]


def _operands(arithmetic: Arithmetic, node: fx.Node) -> tuple[Pair, Pair]:
    left, right = args_of(node)[:2]
    return arithmetic.pair(left), arithmetic.pair(right)


def _product(arithmetic: Arithmetic, a: Pair, b: Pair) -> Pair:
    mul = arithmetic.mul
    return Pair(
        arithmetic.sub(mul(a.real, b.real), mul(a.imag, b.imag)),
        arithmetic.add(mul(a.real, b.imag), mul(a.imag, b.real)),
    )


def _mul(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    return _product(arithmetic, *_operands(arithmetic, node))


def _div(arithmetic: Arithmetic, node: fx.Node) -> Pair | None:
    if node.kwargs.get("rounding_mode") is not None:
        return None
    a, b = _operands(arithmetic, node)
    if not isinstance(b.real, fx.Node) and not isinstance(b.imag, fx.Node):
        inverse = 1 / complex(b.real, b.imag)
        return _product(arithmetic, a, Pair(inverse.real, inverse.imag))
    if _is(b.imag, 0.0):
        return Pair(arithmetic.div(a.real, b.real), arithmetic.div(a.imag, b.real))
    length = arithmetic.squared_length(b)
    product = _product(arithmetic, a, Pair(b.real, arithmetic.neg(b.imag)))
    return Pair(arithmetic.div(product.real, length), arithmetic.div(product.imag, length))


def _reciprocal(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    pair = arithmetic.pair(args_of(node)[0])
    length = arithmetic.squared_length(pair)
    return Pair(arithmetic.div(pair.real, length), arithmetic.neg(arithmetic.div(pair.imag, length)))


def _add(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    a, b = _operands(arithmetic, node)
    b = _product(arithmetic, b, arithmetic.pair(argument(node, 2, "alpha", 1)))
    return Pair(arithmetic.add(a.real, b.real), arithmetic.add(a.imag, b.imag))


def _sub(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    a, b = _operands(arithmetic, node)
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):
        a, b = b, a
    if argument(node, 2, "alpha", 1) != 1:
        b = _product(arithmetic, b, arithmetic.pair(argument(node, 2, "alpha")))
    return Pair(arithmetic.sub(a.real, b.real), arithmetic.sub(a.imag, b.imag))


def _neg(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    pair = arithmetic.pair(args_of(node)[0])
    return Pair(arithmetic.neg(pair.real), arithmetic.neg(pair.imag))


def _conj(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    pair = arithmetic.pair(args_of(node)[0])
    return Pair(pair.real, arithmetic.neg(pair.imag))


def _power(arithmetic: Arithmetic, node: fx.Node) -> Pair | None:
    """A small whole power; `square` has no exponent."""
    exponent = 2 if node.target is aten.square.default else args_of(node)[1]
    if exponent not in (1, 2, 3, 4):
        return None
    pair = result = arithmetic.pair(args_of(node)[0])
    for _ in range(int(exponent) - 1):
        result = _product(arithmetic, result, pair)
    return result


def _from_polar(arithmetic: Arithmetic, length: Part, angle: Part) -> Pair | None:
    if not isinstance(angle, fx.Node):
        return Pair(length, 0.0) if angle == 0.0 else None
    cos, sin = (arithmetic.call(function, angle) for function in (aten.cos.default, aten.sin.default))
    if _is(length, 1.0):
        return Pair(cos, sin)
    return Pair(arithmetic.mul(length, cos), arithmetic.mul(length, sin))


def _polar(arithmetic: Arithmetic, node: fx.Node) -> Pair | None:
    return _from_polar(arithmetic, *args_of(node)[:2])


def _exp(arithmetic: Arithmetic, node: fx.Node) -> Pair | None:
    pair = arithmetic.pair(args_of(node)[0])
    length = arithmetic.call(aten.exp.default, pair.real) if isinstance(pair.real, fx.Node) else 1.0
    return _from_polar(arithmetic, length, pair.imag)


def _complex(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    return Pair(*args_of(node)[:2])


def _view_as_complex(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    return Pair(*(arithmetic.call(aten.select.int, args_of(node)[0], -1, place) for place in (0, 1)))


def _view_as_real(arithmetic: Arithmetic, node: fx.Node) -> fx.Node:
    return arithmetic.call(aten.stack.default, list(arithmetic.tensors(arithmetic.pair(args_of(node)[0]))), -1)


def _real(arithmetic: Arithmetic, node: fx.Node) -> fx.Node:
    return arithmetic.tensors(arithmetic.pair(args_of(node)[0]))[0]


def _imag(arithmetic: Arithmetic, node: fx.Node) -> fx.Node:
    return arithmetic.tensors(arithmetic.pair(args_of(node)[0]))[1]


def _abs(arithmetic: Arithmetic, node: fx.Node) -> fx.Node:
    pair = arithmetic.pair(args_of(node)[0])
    if _is(pair.imag, 0.0) or _is(pair.real, 0.0):
        return arithmetic.call(aten.abs.default, pair.real if _is(pair.imag, 0.0) else pair.imag)
    return arithmetic.call(aten.sqrt.default, arithmetic.squared_length(pair))


def _angle(arithmetic: Arithmetic, node: fx.Node) -> fx.Node:
    real, imag = arithmetic.tensors(arithmetic.pair(args_of(node)[0]))
    return arithmetic.call(aten.atan2.default, imag, real)


def _cast(arithmetic: Arithmetic, node: fx.Node) -> Pair | fx.Node:
    """A cast to another complex type, from a real one, or to a real one, which drops the imaginary part."""
    pair, dtype = arithmetic.pair(args_of(node)[0]), value_of(node).dtype
    return pair if dtype.is_complex else arithmetic.call(aten.to.dtype, arithmetic.tensors(pair)[0], dtype)


def _size(arithmetic: Arithmetic, node: fx.Node) -> fx.Node:
    pair = arithmetic.pair(args_of(node)[0])
    part = pair.real if isinstance(pair.real, fx.Node) else pair.imag
    return arithmetic.call(aten.sym_size.int, part, args_of(node)[1])


def _part_by_part(arithmetic: Arithmetic, node: fx.Node) -> Pair | None:
    """A linear operator, applied to each part; zeros stay zeros."""
    first, *rest = args_of(node)
    if any(operand in arithmetic.pairs for operand in node.all_input_nodes if operand is not first):
        return None
    return Pair(
        *(
            arithmetic.call(node.target, part, *rest, **_real_kwargs(node)) if isinstance(part, fx.Node) else part
            for part in (arithmetic.pair(first).real, arithmetic.pair(first).imag)
        )
    )


def _join(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    tensors, *rest = args_of(node)
    parts = [arithmetic.tensors(arithmetic.pair(tensor)) for tensor in tensors]
    real, imag = (arithmetic.call(node.target, list(group), *rest, **node.kwargs) for group in zip(*parts))
    return Pair(real, imag)


def _bilinear(arithmetic: Arithmetic, node: fx.Node) -> Pair | None:
    """A product of two tensors that sums over dims: every part of one with every part of the other."""
    *before, operands = args_of(node) if node.target is aten.einsum.default else ([*args_of(node)],)
    if len(operands) != 2 or node.kwargs:
        return None

    def product(left: Part, right: Part) -> Part:
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return 0.0
        both = [left, right]
        return arithmetic.call(node.target, *before, both) if before else arithmetic.call(node.target, *both)

    a, b = map(arithmetic.pair, operands)
    return Pair(
        arithmetic.sub(product(a.real, b.real), product(a.imag, b.imag)),
        arithmetic.add(product(a.real, b.imag), product(a.imag, b.real)),
    )


def _expand_as(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    """`expand_as`: to the shape of a tensor whose numbers do not count."""
    like = arithmetic.pair(args_of(node)[1])
    shape = like.real if isinstance(like.real, fx.Node) else like.imag
    pair = arithmetic.pair(args_of(node)[0])
    parts = (
        arithmetic.call(node.target, part, shape) if isinstance(part, fx.Node) else part
        for part in (pair.real, pair.imag)
    )
    return Pair(*parts)


def _where(arithmetic: Arithmetic, node: fx.Node) -> Pair:
    condition, *choices = args_of(node)
    parts = [arithmetic.both(arithmetic.pair(choice), node) for choice in choices]
    real, imag = (arithmetic.call(aten.where.self, condition, *group) for group in zip(*parts))
    return Pair(real, imag)


def _create(arithmetic: Arithmetic, node: fx.Node) -> Pair | None:
    """Ones, zeros, or a number everywhere."""
    args = list(args_of(node))
    number = complex(args.pop()) if node.target in (aten.full.default, aten.full_like.default) else None
    if args and isinstance(args[0], fx.Node):
        args[0] = arithmetic.tensors(arithmetic.pair(args[0]))[0]
    dtype = REAL_OF[value_of(node).dtype]
    kwargs = {**node.kwargs, "dtype": dtype}
    if number is None:
        return Pair(arithmetic.call(node.target, *args, **kwargs), 0.0)
    parts = (arithmetic.call(node.target, *args, value, **kwargs) for value in (number.real, number.imag))
    return Pair(*parts)


def _real_kwargs(node: fx.Node) -> dict[str, Any]:
    """Keyword arguments with a real element type in a complex one's place."""
    kwargs: dict[str, Any] = dict(node.kwargs)
    return {name: REAL_OF.get(value, value) if name == "dtype" else value for name, value in kwargs.items()}


def is_complex(value: object) -> bool:
    """True for a complex fake tensor, and for several of them."""
    if isinstance(value, (list, tuple)):
        return any(map(is_complex, value))
    return isinstance(value, Tensor) and value.is_complex()


def _rules() -> dict[Any, Rule]:
    rules: dict[Rule, tuple[Any, ...]] = {
        _mul: (aten.mul.Tensor, aten.mul.Scalar),
        _div: (aten.div.Tensor, aten.div.Scalar),
        _add: (aten.add.Tensor, aten.add.Scalar),
        _sub: (aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar),
        _neg: (aten.neg.default, aten._neg_view.default),
        _conj: (aten._conj.default, aten.conj.default, aten._conj_physical.default, aten.conj_physical.default),
        _reciprocal: (aten.reciprocal.default,),
        _power: (aten.pow.Tensor_Scalar, aten.square.default),
        _polar: (aten.polar.default,),
        _exp: (aten.exp.default,),
        _complex: (aten.complex.default,),
        _view_as_complex: (aten.view_as_complex.default,),
        _view_as_real: (aten.view_as_real.default,),
        _real: (aten.real.default,),
        _imag: (aten.imag.default,),
        _abs: (aten.abs.default,),
        _angle: (aten.angle.default,),
        _cast: (
            *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other),
            *(aten._to_copy.default, aten.type_as.default),
        ),
        _size: (aten.sym_size.int,),
        _join: (aten.cat.default, aten.stack.default),
        _where: (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
        _bilinear: (aten.einsum.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.outer.default),
        _expand_as: (aten.expand_as.default, aten.view_as.default, aten.reshape_as.default),
        _create: (
            *(aten.ones.default, aten.zeros.default, aten.full.default),
            *(aten.ones_like.default, aten.zeros_like.default, aten.full_like.default),
        ),
        _part_by_part: _LINEAR,
    }
    return {target: rule for rule, targets in rules.items() for target in targets}


_LINEAR = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(
        aten.expand.default,
        aten.broadcast_to.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.mT.default,
    ),
    *(aten.swapaxes.default, aten.movedim.int, aten.movedim.intlist, aten.slice.Tensor, aten.select.int),
    *(aten.narrow.default, aten.index.Tensor, aten.index_select.default, aten.gather.default),
    *(aten.repeat.default, aten.repeat_interleave.self_int, aten.tile.default, aten.roll.default, aten.flip.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int),
    *(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default),
    *(aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.resolve_conj.default, aten.resolve_neg.default),
    *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default),
)

RULES: dict[Any, Rule] = _rules()
"""The rule of every operator that may read or make a complex tensor."""
