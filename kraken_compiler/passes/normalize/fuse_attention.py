"""Write eager attention as one `scaled_dot_product_attention`, with every mask gathered into one additive bias.

    %s = div(matmul(%q, permute(%k)), 8.0)           ->     %b = where(%m, 0, -3e38) + %alibi
    %s = add(where(%m, %s, -3e38), %alibi)                  %y = scaled_dot_product_attention(%q, %k, %v, %b, scale=1/8)
    %y = matmul(softmax(%s, -1), %v)

Three-dimensional products over batch * heads (baddbmm, bmm) are brought back to four dims.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import ATTENTION, CAPPED_ATTENTION, MASKED_FILLS
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, near_miss, replace, value_ancestors
from kraken_compiler.passes.shapes import is_tensor, refresh_shapes, same_size, shape_of, value_of

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)


@dataclass(frozen=True)
class FuseAttention(Pass[Program]):
    name: ClassVar[str] = "fuse-attention"

    def run(self, program: Program) -> PassResult:
        inputs = frozenset(spec.name for spec in program.inputs)
        nodes = calls(program.graph, aten.softmax.int, aten._softmax.default)
        return PassResult.of(_with_softmax(_fuse(node, inputs), node.name) for node in nodes)


def _with_softmax(outcome: bool | Rejection, softmax: str) -> bool | Rejection:
    """An outcome that also names the softmax, which is what stays if nothing is written in its place."""
    return replace_fields(outcome, nodes=(*outcome.nodes, softmax)) if isinstance(outcome, Rejection) else outcome


@dataclass
class _Scores:
    """scores = scale * q k^T + bias, on the way from the product to the softmax.

    With a softcap, scores = softcap * tanh(scale * q k^T / softcap) + bias; the softmax may have a column of sinks.
    """

    query: fx.Node
    key: fx.Node
    scale: float = 1.0
    bias: fx.Node | None = None
    softcap: float = 0.0
    sinks: fx.Node | None = None
    sizes: list[Any] | None = None
    """The arguments of the reshape to [batch, heads, queries, keys], if the product has three dims."""
    fills: list[tuple[fx.Node, Any, fx.Node]] = field(default_factory=list)
    """Where scores are replaced: the condition, what takes their place, and the node that does it."""


def _fuse(softmax: fx.Node, inputs: frozenset[str]) -> bool | Rejection:
    product = _follow(softmax)
    if product is None:
        return False
    rank = len(shape_of(softmax))
    if int(args_of(softmax)[1]) % rank != rank - 1:
        return near_miss("a softmax before a product is over another dim than the keys", softmax)
    if isinstance(product, Rejection):
        return product
    graph, column = softmax.graph, _sink_column(softmax)
    with graph.inserting_before(softmax):
        scores = _parse(args_of(softmax)[0], graph) if column is None else _parse_sinks(column, graph)
        if isinstance(scores, Rejection):
            return scores
        if scores.sizes is None and len(shape_of(scores.query)) != 4:
            return near_miss("the products of an attention have three dims, and none are its heads", softmax)
    fill = next((reason for one in scores.fills if (reason := _wrong_fill(*one, inputs))), None)
    if fill is not None:
        return fill
    query, key, value = scores.query, scores.key, args_of(product)[1]
    dtype, out_dtype = value_of(query).dtype, value_of(product).dtype
    with graph.inserting_before(product):
        if scores.sizes is not None:
            batch, heads, queries = scores.sizes[:3]
            query, key, value = (
                graph.call_function(aten.reshape.default, (tensor, [batch, heads, length, shape_of(like)[-1]]))
                for tensor, length, like in ((query, queries, query), (key, -1, query), (value, -1, product))
            )
        # A model in half precision may compute its scores in float32; then all of its attention is.
        value, bias = (_cast(tensor, dtype) for tensor in (value, scores.bias))
        extra: dict[str, Any] = {"softcap": scores.softcap} if scores.softcap else {}
        if scores.sinks is not None:
            extra["sinks"] = _cast(scores.sinks, dtype)
        target = CAPPED_ATTENTION if extra else ATTENTION
        new = graph.call_function(target, (query, key, value, bias), {"scale": scores.scale, **extra})
        if out_dtype != dtype:
            new = graph.call_function(aten.to.dtype, (new, out_dtype))
        if scores.sizes is not None:
            new = graph.call_function(aten.reshape.default, (new, [-1, scores.sizes[2], shape_of(product)[-1]]))
    replace(product, new)
    return True


def _follow(softmax: fx.Node) -> fx.Node | Rejection | None:
    """The product of the probabilities with the values, casts, reshapes and the cut of a sink's column on the way.

    None if there is no product near, so that nobody would call it an attention.
    """
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in _PRODUCTS:
            return user if args_of(user)[0] is node else near_miss("probabilities are the right operand", user)
        if user.target is aten.slice.Tensor and _sink_column(softmax) is None:
            return near_miss("probabilities are cut, and not by one column of sinks at the end", user)
        if user.target not in (*_CASTS, aten.reshape.default, aten.slice.Tensor):
            is_product_near = any(one.target in _PRODUCTS for one in user.users)
            return near_miss(f"'{user.target}' changes the probabilities", user) if is_product_near else None
        node = user
    has_product = any(user.target in _PRODUCTS for user in node.users)
    return near_miss("probabilities are read by more than one product", node) if has_product else None


def _sink_column(softmax: fx.Node) -> fx.Node | None:
    """The concatenation of scores and sinks that a softmax reads, if the sinks' column is cut off behind it."""
    cuts = [user for user in softmax.users if user.target is aten.slice.Tensor]
    node = args_of(softmax)[0]
    # Scores may be shifted by their maximum: one number for all keys of a query changes no probability.
    if node.target is aten.sub.Tensor and isinstance(args_of(node)[1], fx.Node) and not node.kwargs:
        shift = shape_of(args_of(node)[1])
        node = args_of(node)[0] if shift and same_size(shift[-1], 1) else node
    if len(cuts) != 1 or len(softmax.users) != 1 or node.target is not aten.cat.default:
        return None
    dim, start, end = (argument(cuts[0], place, name) for place, name in ((1, "dim"), (2, "start"), (3, "end")))
    rank = len(shape_of(softmax))
    along = (int(dim or 0) % rank, int(argument(node, 1, "dim", 0)) % rank)
    columns = [shape_of(part)[-1] for part in args_of(node)[0]]
    is_cut_off = along == (rank - 1, rank - 1) and start in (None, 0) and end == -1
    return node if is_cut_off and len(columns) == 2 and same_size(columns[1], 1) else None


def _parse_sinks(column: fx.Node, graph: fx.Graph) -> _Scores | Rejection:
    scores_node, sinks = args_of(column)[0]
    while sinks.target in (aten.expand.default, aten.reshape.default, aten.unsqueeze.default, *_CASTS):
        sinks = args_of(sinks)[0]
    scores = _parse(scores_node, graph)
    if isinstance(scores, Rejection):
        return scores
    if scores.sizes is not None or sinks.op != "placeholder":
        return near_miss("the column beside the scores is no weight", column)
    if len(shape_of(sinks)) != 1 or not same_size(shape_of(sinks)[0], shape_of(scores.query)[1]):
        return near_miss("the column beside the scores is not one weight for each head", column)
    scores.sinks = sinks
    return scores


def _parse(node: fx.Node, graph: fx.Graph) -> _Scores | Rejection:
    """Read the scores from `node` back to the product of queries and keys; inserts the nodes that build the bias."""
    if node.target in _PRODUCTS or node.target is aten.baddbmm.default:
        return _parse_product(node, graph)
    if node.target in _CASTS:
        return _parse(args_of(node)[0], graph)
    if node.target is aten.reshape.default:
        scores = _parse(args_of(node)[0], graph)
        if isinstance(scores, Rejection):
            return scores
        if scores.sizes is not None or len(shape_of(node)) != 4:
            return near_miss("scores are reshaped, and not once to [batch, heads, queries, keys]", node)
        scores.sizes = list(argument(node, 1, "shape"))
        if scores.bias is not None:
            batch, heads, queries = scores.sizes[:3]
            # The bias may have been made here, by a scaling or a sum, and then has no shape yet.
            refresh_shapes(graph)
            rows = 1 if same_size(shape_of(scores.bias)[1], 1) else queries
            scores.bias = graph.call_function(aten.reshape.default, (scores.bias, [batch, heads, rows, -1]))
        return scores
    if node.target in _SCALINGS and isinstance(args_of(node)[1], (int, float)):
        if node.target is aten.mul.Tensor and getattr(args_of(node)[0], "target", None) is aten.tanh.default:
            return _parse_softcap(node, graph)
        scores = _parse(args_of(node)[0], graph)
        if isinstance(scores, Rejection):
            return scores
        if scores.softcap:
            return near_miss("scores are scaled after they are capped", node)
        factor = float(args_of(node)[1])
        scores.scale = scores.scale / factor if "div" in str(node.target) else scores.scale * factor
        if scores.bias is not None:
            scores.bias = graph.call_function(node.target, (scores.bias, args_of(node)[1]))
        return scores
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _parse_computed_scale(node, graph)
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        for scores_node, bias in (args_of(node)[:2], args_of(node)[1::-1]):
            scores = _parse(scores_node, graph) if _is_tensor(scores_node) else near_miss("a number", node)
            if not isinstance(scores, Rejection):
                old = scores.bias
                scores.bias = bias if old is None else graph.call_function(aten.add.Tensor, (old, bias))
                return scores if isinstance(bias, fx.Node) else near_miss("a number is added to the scores", node)
        return near_miss("neither term of a sum before the softmax is made of scores", node)
    return _parse_mask(node, graph)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and is_tensor(value)


def _parse_computed_scale(node: fx.Node, graph: fx.Graph) -> _Scores | Rejection:
    """Scale the queries by a number that the graph computes, or one for all keys (a learned temperature per head)."""
    pairs = [args_of(node)[:2]] if node.target is aten.div.Tensor else [args_of(node)[:2], args_of(node)[1::-1]]
    for scores_node, factor in pairs:
        shape = shape_of(factor) if isinstance(factor, fx.Node) and is_tensor(factor) else ()
        is_for_all_keys = isinstance(factor, fx.Node) and not (shape and not same_size(shape[-1], 1))
        if not is_for_all_keys or not _is_tensor(scores_node):
            continue
        scores = _parse(scores_node, graph)
        if isinstance(scores, Rejection):
            continue
        if scores.softcap or (shape and scores.sizes is not None):
            return near_miss("scores are scaled by a tensor after they are capped or reshaped", node)
        dtype, scale = value_of(scores.query).dtype, node.target
        assert callable(scale)
        scores.query = graph.call_function(scale, (scores.query, factor))
        if scores.bias is not None:
            scores.bias = graph.call_function(scale, (scores.bias, factor))
        refresh_shapes(graph)
        same = value_of(scores.query).dtype == dtype
        return scores if same else near_miss("the factor of the scores is of another dtype", node)
    return near_miss("scores are scaled by something that is not the same for all keys", node)


def _parse_softcap(node: fx.Node, graph: fx.Graph) -> _Scores | Rejection:
    """c * tanh(x), which is c * tanh((c x) / c)."""
    tanh, cap = args_of(node)[:2]
    scores = _parse(args_of(tanh)[0], graph)
    if isinstance(scores, Rejection):
        return scores
    if scores.bias is not None or scores.softcap or cap <= 0:
        return near_miss("scores are capped after they are masked, or twice", node)
    scores.scale, scores.softcap = scores.scale * float(cap), float(cap)
    return scores


def _parse_mask(node: fx.Node, graph: fx.Graph) -> _Scores | Rejection:
    """where(keep, scores, low) and masked_fill(scores, drop, low), `low` a number or a tensor of one number."""
    if node.target in (aten.where.self, aten.where.ScalarOther):
        condition, scores_node, low = args_of(node)[:3]
        keep = True
    elif node.target in MASKED_FILLS:
        scores_node, condition, low = args_of(node)[:3]
        keep = False
    else:
        return near_miss(f"'{node.target}' is between the softmax and a product of queries and keys", node)
    scores = _parse(scores_node, graph) if _is_tensor(scores_node) else near_miss("what is masked is a number", node)
    if isinstance(scores, Rejection):
        return scores
    scores.fills.append((condition, low, node))
    dtype = value_of(scores.query).dtype
    if not isinstance(low, fx.Node):
        low = graph.call_function(aten.full.default, ([], low), {"dtype": dtype, "device": torch.device("cpu")})
    rest = scores.bias if scores.bias is not None else graph.call_function(aten.zeros_like.default, (low,))
    pair = (rest, low) if keep else (low, rest)
    scores.bias = graph.call_function(aten.where.self, (condition, *pair))
    return scores


_HIDES = -1e3
"""A score that is as low or lower has no probability beside any other: exp(-1000) is 0 in every type."""
_ABSORBS = -(2.0**29)
"""A score that is as low or lower stays what it is in float32 when the product is added to it: it is off by 32."""


def _wrong_fill(condition: fx.Node, low: Any, node: fx.Node, inputs: frozenset[str]) -> Rejection | None:
    """Why scores that are replaced are not what the number that takes their place, added to them, would be.

    A replaced score is that number, and a sum keeps what the query and the key make of it. Both are nothing beside a
    score that is not replaced. Where all keys of a query may be hidden, as inputs decide, the number must be so low
    that the sum is the number.
    """
    value = _number(low)
    if value is None or value <= max(_ABSORBS, torch.finfo(value_of(node).dtype).min):
        return None
    if value > _HIDES:
        return near_miss(f"scores are set to {value:g}, which hides nothing: only numbers below {_HIDES:g} do", node)
    if any(one.name in inputs for one in value_ancestors(condition)):
        return near_miss(
            f"scores are set to {value:g} where the inputs say so, and a token that sees no key at all would see all "
            "alike, which an additive mask does not give; use -inf or torch.finfo(dtype).min",
            node,
        )
    return None


def _number(low: Any) -> float | None:
    """What takes the place of scores, if the graph says it."""
    while isinstance(low, fx.Node) and low.target in (*_CASTS, aten.expand.default, aten.reshape.default):
        low = args_of(low)[0]
    if isinstance(low, fx.Node) and low.target is aten.full.default:
        low = args_of(low)[1]
    elif isinstance(low, fx.Node) and low.target is aten.scalar_tensor.default:
        low = args_of(low)[0]
    return float(low) if isinstance(low, int | float) else None


def _parse_product(node: fx.Node, graph: fx.Graph) -> _Scores | Rejection:
    bias, (query, transposed_key) = None, args_of(node)[:2]
    scale = 1.0
    if node.target is aten.baddbmm.default:
        bias, query, transposed_key = args_of(node)[:3]
        options: dict[str, Any] = dict(node.kwargs)
        scale, beta = float(options.get("alpha", 1.0)), options.get("beta", 1.0)
        if beta == 0:
            bias = None
        elif beta != 1:
            bias = graph.call_function(aten.mul.Tensor, (bias, beta))
    rank = len(shape_of(transposed_key))
    if len(shape_of(query)) not in (3, 4) or rank != len(shape_of(query)):
        return near_miss("queries and keys are not both of three or of four dims", node)
    swap = [*range(rank - 2), rank - 1, rank - 2]
    return _Scores(query, graph.call_function(aten.permute.default, (transposed_key, swap)), scale, bias)


def _cast(node: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    """`node` as `dtype`; new nodes whose type is not known yet are cast too, for a cast to the same type is dropped."""
    if node is None or ("val" in node.meta and value_of(node).dtype == dtype):
        return node
    return node.graph.call_function(aten.to.dtype, (node, dtype))
