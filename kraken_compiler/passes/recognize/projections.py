"""The projections of one branch: those where the stream enters it and the one linear through which it leaves."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import ATTENTIONS, LINEAR, PROJECTIONS
from kraken_compiler.passes.graph_tools import ancestors, args_of, aten, descendants, module_path
from kraken_compiler.passes.probing import Region
from kraken_compiler.passes.shapes import is_tensor, same_shape, shape_of

_LINEAR_OPS = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.neg.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.sum.dim_IntList,
    }
)


@dataclass(frozen=True)
class Projections:
    """The projections of a branch.

    Attributes:
        inputs: The linears nearest to the branch's core (the attention, or the output projection's input): they are
            split by output column.
        output: The linear through which the branch leaves: split by input column.
        region: The nodes between `inputs` (or `whole`) and `output`, both excluded, in graph order.
        whole: Linears as near as `inputs` that something else reads too, as the up-projections of multi-head latent
            attention read what also holds its rotary key. Every lane computes all of them.
        shared: The nodes of `region` that something outside it reads, directly or through others of them.
    """

    inputs: tuple[fx.Node, ...]
    output: fx.Node
    region: tuple[fx.Node, ...]
    whole: tuple[fx.Node, ...] = ()
    shared: tuple[fx.Node, ...] = ()

    def kv_heads(self, attention: fx.Node, program: Program) -> int:
        """Number of different key heads that reach `attention`: repeated ones hold equal values, so they count once."""
        key = args_of(attention)[1]
        assert isinstance(key, fx.Node)
        leaves = (*self.inputs, *self.whole)
        nodes = ancestors(key, set(leaves))
        inside = [node for node in self.region if node in nodes]
        values = Region(inside, leaves, known_constants(program)).run()
        heads = values[key].transpose(0, 1).flatten(1)
        return int(torch.unique(heads, dim=0).shape[0])


def known_constants(program: Program, lane: int | None = None) -> dict[str, torch.Tensor]:
    """Values of the small constant tensors of the graph, by placeholder name; one lane's part of them if given."""
    return {
        name: program.constants[spec.source] if lane is None else spec.take(program.constants[spec.source], lane)
        for name, spec in program.weights.items()
        if spec.source in program.constants and program.constants[spec.source].numel() <= 4096
    }


def find_projections(
    term: fx.Node, nodes: list[fx.Node], weights: set[fx.Node], stream: fx.Node | None = None
) -> Projections | Rejection:
    """Find the projections of the branch whose output is `term`.

    Args:
        term: What the branch adds to the stream.
        nodes: The nodes of the branch, in graph order.
        weights: The nodes that are functions of weights alone.
        stream: What the branch reads, if that must not meet the output again.
    """
    inside = set(nodes)
    projection = _output_projection(term, inside, weights, stream)
    if isinstance(projection, Rejection):
        return projection
    output, factors = projection
    source = args_of(output)[0]
    assert isinstance(source, fx.Node)
    linears = _cuttable_linears(
        {node for node in nodes if node.target in PROJECTIONS and node is not output}, term, inside
    )
    attentions = [node for node in nodes if node.target in ATTENTIONS]
    leaves: set[fx.Node] = set()
    cores = [source, *(operand for node in attentions for operand in node.all_input_nodes)]
    for core in cores:
        core_ancestors = ancestors(core, linears | set(attentions), inside) & inside
        leaves |= {operand for node in core_ancestors for operand in node.all_input_nodes if operand in linears}
        leaves |= {core} & linears
    # What follows from the stream without a projection in between is there in full, to be cut where it is read.
    between = ancestors(source, leaves, inside) & descendants(leaves) & inside
    shared = _read_elsewhere([node for node in nodes if node in between or node in leaves], between | {output})
    inputs, whole = leaves - shared, leaves & shared
    if not leaves:
        reason = "no projection was found between the residual stream and the branch's output projection"
        return Rejection(reason, (output.name,), module_path(output), _HINT)
    for first in leaves:
        if any(attention in ancestors(first, within=inside) for attention in attentions):
            reason = "a second projection follows the attention before the output projection"
            return Rejection(reason, (first.name,), module_path(first), f"{_HINT} {_ADAPTER}")
    for factor in factors:
        if inputs & ancestors(factor, within=inside):
            reason = "the branch's output is multiplied by what depends on the columns that would be divided"
            return Rejection(reason, (factor.name,), module_path(factor), _HINT)
    shared_attention = next((node for node in shared & between if node.target in ATTENTIONS), None)
    if shared_attention is not None:
        reason = "what its attention gives is also read from outside the branch"
        return Rejection(reason, (shared_attention.name,), module_path(shared_attention), f"{_HINT} {_ADAPTER}")
    inputs_in_order, between_in_order, whole_in_order, shared_in_order = (
        tuple(node for node in nodes if node in some) for some in (inputs, between, whole, shared & between)
    )
    return Projections(inputs_in_order, output, between_in_order, whole_in_order, shared_in_order)


def _read_elsewhere(nodes: Sequence[fx.Node], readers: Set[fx.Node]) -> set[fx.Node]:
    """Those of `nodes`, which are in graph order, that others than `readers` read, directly or through one of them."""
    shared = set[fx.Node]()
    for node in reversed(nodes):
        if any(user not in readers or user in shared for user in node.users):
            shared.add(node)
    return shared


def _cuttable_linears(linears: set[fx.Node], term: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """The linears without those before the attention that work on every head alone, with the same weights."""
    rank = len(shape_of(term))
    deep = {node for node in linears if node.target is LINEAR and len(shape_of(node)) > rank}
    above = {node: ancestors(node, within=inside) for node in deep}
    return linears - {
        node
        for node in deep
        if above[node] & linears - deep and not any(one.target in ATTENTIONS for one in above[node])
    }


def find_part(term: fx.Node, nodes: list[fx.Node], stream: fx.Node, weights: set[fx.Node]) -> fx.Node:
    """The node of a branch up to which its value is a sum of what the lanes compute.

    That is `term`, what the branch adds to the stream, if only linear operations follow the output projection. If a
    norm follows (sandwich norm), it is the first node through which everything goes after the projection: the
    projection itself, or where the experts that a token picked are summed.

    Args:
        term: What the branch adds to the stream.
        nodes: The nodes of the branch, in graph order.
        stream: What the branch reads.
        weights: The nodes that are functions of weights alone.
    """
    inside = set(nodes)
    if not isinstance(_output_projection(term, inside, weights), Rejection):
        return term
    for place, last in reversed(list(enumerate(nodes))):
        projection = _output_projection(last, inside, weights)
        if isinstance(projection, Rejection) or not _all_through(last, term, inside, stream):
            continue
        # Casts and factors that follow are the norm's to repeat: what is reduced stays as narrow as it was.
        for node in nodes[nodes.index(projection[0]) : place]:
            if is_tensor(node) and same_shape(node, stream) and _all_through(node, term, inside, stream):
                return node
        return last
    return term


def _all_through(node: fx.Node, term: fx.Node, inside: set[fx.Node], stream: fx.Node) -> bool:
    """True if nothing of the branch reaches `term` but through `node`."""
    behind = ancestors(term, {node}, inside)
    return all(
        stream not in later.all_input_nodes
        and any(operand is node or operand in behind for operand in later.all_input_nodes)
        for later in behind
    )


def _output_projection(
    term: fx.Node, inside: set[fx.Node], weights: set[fx.Node], stream: fx.Node | None = None
) -> tuple[fx.Node, tuple[fx.Node, ...]] | Rejection:
    """Walk back from the branch's output through linear operations to its last projection.

    Only then is the output a sum of the lanes' parts.

    Returns:
        The projection, and everything computed from the stream that says how its output goes on: factors (routing
        weights, gates) and the experts that were picked. A lane must know all of them in full.
    """
    node = term
    while node.target not in PROJECTIONS or args_of(node)[1] not in weights:
        operands = [operand for operand in node.all_input_nodes if operand in inside or operand is stream]
        if node.target is aten.mul.Tensor and len(operands) == 2 and stream not in operands:
            outcomes = [_output_projection(operand, inside, weights, stream) for operand in operands]
            projections = [outcome for outcome in outcomes if not isinstance(outcome, Rejection)]
            if len(projections) != 1:
                reason = "the branch's output is a product of two projections"
                return Rejection(reason, (node.name,), module_path(node), _HINT) if projections else outcomes[0]
            factor = operands[1] if outcomes[0] is projections[0] else operands[0]
            return projections[0][0], (factor, *projections[0][1])
        commutes = node.target is aten.mul.Tensor or (operands and args_of(node)[0] is operands[0])
        # An operand that is read twice is listed once.
        is_square = node.target in (aten.mul.Tensor, aten.div.Tensor) and args_of(node)[0] is args_of(node)[1]
        if node.target not in _LINEAR_OPS or len(operands) != 1 or not commutes or is_square:
            return Rejection(_nonlinear_reason(node), (node.name,), module_path(node), _HINT)
        node = operands[0]
    if args_of(node)[0] not in inside:
        reason = "the branch is a single projection of the stream, with nothing to split between lanes"
        return Rejection(reason, (node.name,), module_path(node), _HINT)
    return node, tuple(operand for operand in args_of(node)[3:] if operand in inside)


_HINT = "A branch must leave through one linear projection, so that its output is the sum of what the lanes compute."


_ADAPTER = "If it is a low-rank adapter, merge it into the weight first (peft: merge_and_unload())."


def _nonlinear_reason(node: fx.Node) -> str:
    name = str(node.target).removeprefix("aten.").removesuffix(".default")
    return f"'{name}' stands between the branch's output projection and the residual stream (mixture of experts?)"
