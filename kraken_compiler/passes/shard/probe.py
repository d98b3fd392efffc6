"""Find the kept sets of a branch by probing it: which elements of every tensor does each lane need?

An attention lane owns a contiguous group of heads of the attention's output, an FFN lane a contiguous group of columns
of the output projection's input; a lane that owns fewer than another computes copies of the next ones (`degrees`). One
backward pass per lane from there marks the elements it needs of every tensor back to the input projections and of
everything read from outside (per-head gains, ALiBi biases). The marks must be a product of index sets, one per
dimension; if they are not, the branch mixes across lanes and is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection, first_line
from kraken_compiler.ir.index_set import IndexSet, from_indices, size
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.shards import BranchShards, Kept, KeptDim
from kraken_compiler.ops.op_sets import ATTENTIONS
from kraken_compiler.passes.graph_tools import args_of, argument, aten, module_path
from kraken_compiler.passes.probing import Region
from kraken_compiler.passes.recognize.projections import Projections, known_constants
from kraken_compiler.passes.shapes import is_tensor, same_shape, shape_of
from kraken_compiler.passes.shard.degrees import DEGREE_HINT, KV_HEAD_OF, count, kv_shares, spread
from kraken_compiler.passes.shard.find_mixer import breaking, mixer_of_columns, mixer_of_heads, mixing

_FILLED = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)


# A caller in inference or no-grad mode gets no gradients from autograd, and so no kept sets.
@torch.inference_mode(False)
def probe_branch(branch: Branch, projections: Projections, program: Program, degree: int) -> BranchShards | Rejection:
    """Split one branch over `degree` lanes.

    Args:
        branch: The branch.
        projections: Its projections.
        program: The program it belongs to.
        degree: Number of lanes, at most as many as the branch has heads or columns.
    """
    attention = next((node for node in projections.region if node.target in ATTENTIONS), None)
    leaves = [*projections.inputs, *([attention] if attention else [])]
    region = Region(projections.region, leaves, known_constants(program))
    values = region.run(gradients=True)
    source = args_of(projections.output)[0]
    assert isinstance(source, fx.Node)
    shares = spread(count(branch), degree, branch.unit)
    groups = [list(range(share.start, share.stop)) for share in shares]
    owned = [list(range(share.start, share.owned)) for share in shares]
    columns = groups
    if attention is not None:
        columns = [_dependent_columns(region, attention, group, source) for group in groups]
        owned = [
            lane_columns if heads == group else _dependent_columns(region, attention, heads, source)
            for lane_columns, heads, group in zip(columns, owned, groups)
        ]
        if sorted(index for lane in owned for index in lane) != list(range(branch.columns)):
            mixer = mixer_of_heads(region, attention, [list(range(share.start, share.owned)) for share in shares])
            return mixing(mixer or source, "heads")
        if any(lane[: len(first)] != first for lane, first in zip(columns, owned)):
            reason = "its heads lie interleaved in what follows the attention, so lanes cannot be padded with more"
            return Rejection(reason, (source.name,), module_path(attention), DEGREE_HINT)

    picks = [node for node in projections.region if _picks_kv_heads(node, program)]
    marked_nodes = [node for node, value in values.items() if isinstance(value, Tensor) and value.requires_grad]
    marks: dict[fx.Node, list[Tensor]] = {node: [] for node in marked_nodes}
    for lane in range(degree):
        seeds = [values[source][..., columns[lane]]]
        if attention is not None:
            seeds += _attention_operands(attention, values, groups[lane], branch.heads)
            seeds += [part for pick in picks for part in _picked_heads(pick, values, lane, degree, branch.unit)]
        loss = sum((seed * torch.rand_like(seed).add(0.5)).sum() for seed in seeds if seed.requires_grad)
        tensors = [values[node] for node in marked_nodes]
        try:
            gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            return _no_derivative(projections.region, source, error)
        for node, tensor, gradient in zip(marked_nodes, tensors, gradients):
            mark = torch.zeros_like(tensor, dtype=torch.bool) if gradient is None else gradient != 0
            marks[node].append(_of_all_tokens(mark, node))

    sets_by_node = {node: _kept_sets(lanes) for node, lanes in marks.items()}
    reasons = {node: sets for node, sets in sets_by_node.items() if isinstance(sets, str)}
    kept_sets: dict[str, Kept] = {
        node.name: sets
        for node, sets in sets_by_node.items()
        if not isinstance(sets, str) and any(d is not None for d in sets)
    }
    _keep_filled(projections.region, kept_sets)
    mixer = mixer_of_columns(projections.region, kept_sets) if attention is None or reasons else None
    if mixer is not None:
        return mixing(mixer, "heads" if attention is not None else "columns")
    if reasons:
        return breaking(projections.region, kept_sets, reasons)
    return BranchShards(
        branch=branch.index,
        inputs=tuple(node.name for node in projections.inputs),
        output=projections.output.name,
        region=tuple(node.name for node in projections.region),
        kept_sets=kept_sets,
        columns=tuple(from_indices(lane) for lane in columns),
        owned=tuple(from_indices(lane) for lane in owned),
    )


def _keep_filled(region: Sequence[fx.Node], kept_sets: dict[str, Kept]) -> None:
    """Keep as much of a tensor filled with one number as of the tensor that lends it the shape."""
    filled_nodes: set[fx.Node] = set()
    for node in region:
        operands = [operand for operand in node.all_input_nodes if is_tensor(operand)]
        alike = node.target in _FILLED or (
            operands and filled_nodes.issuperset(operands) and same_shape(operands[0], node)
        )
        if alike and node.name not in kept_sets and operands[0].name in kept_sets:
            kept_sets[node.name] = kept_sets[operands[0].name]
            filled_nodes.add(node)


def _no_derivative(region: Sequence[fx.Node], source: fx.Node, error: RuntimeError) -> Rejection:
    """The rejection of an operator that cannot be differentiated; torch says which, as `aten::name`."""
    reason = first_line(error)
    node = next((node for node in region if str(node.target).rpartition(".")[0].replace(".", "::") in reason), source)
    return Rejection(
        f"what lanes need of it cannot be found out: {reason}", (node.name,), module_path(node), DEGREE_HINT
    )


def _dependent_columns(region: Region, attention: fx.Node, heads: list[int], source: fx.Node) -> list[int]:
    """Columns of `source` that change when the attention's output changes on `heads`."""
    noisy = region.inputs[attention].clone()
    noisy[:, heads] += torch.rand_like(noisy[:, heads]).add(0.5)
    change = region.run({attention: noisy})[source] != region.run()[source]
    return torch.nonzero(change.flatten(0, -2).any(0)).flatten().tolist()


def _attention_operands(
    attention: fx.Node, values: dict[fx.Node, Tensor], heads: list[int], count: int
) -> list[Tensor]:
    """The parts of query, key, value and mask that `heads` need."""
    parts = []
    for operand in (*args_of(attention)[:3], argument(attention, 3, "attn_mask")):
        if not isinstance(operand, fx.Node):
            continue
        tensor = values[operand]
        head_count = tensor.shape[-3] if tensor.dim() >= 3 else 1
        if head_count == 1:
            parts.append(tensor)
            continue
        group = count // head_count
        kv_heads = sorted({head // group for head in heads})
        parts.append(tensor.movedim(-3, 0)[kv_heads])
    sinks = attention.kwargs.get("sinks")
    return [*parts, values[sinks][heads]] if isinstance(sinks, fx.Node) else parts


def _picks_kv_heads(node: fx.Node, program: Program) -> bool:
    if node.target is not aten.index_select.default:
        return False
    spec = program.weights.get(args_of(node)[2].name)
    return spec is not None and spec.source.startswith(KV_HEAD_OF)


def _picked_heads(pick: fx.Node, values: dict[fx.Node, Tensor], lane: int, degree: int, unit: int) -> list[Tensor]:
    """The KV heads that a lane holds where its heads pick theirs by number: as many as any other lane."""
    operand, dim = args_of(pick)[:2]
    if operand not in values or pick not in values:
        return []
    source, heads = values[operand], values[pick].shape[dim]
    start, stop = kv_shares(heads, source.shape[dim], degree, unit)[lane]
    return [source.narrow(dim, start, stop - start)]


def _of_all_tokens(marks: Tensor, node: fx.Node) -> Tensor:
    """Lanes share heads and columns; of a batch and its tokens every lane computes all, needed or not."""
    for dim, length in enumerate(shape_of(node)):
        if not isinstance(length, int):
            marks = marks.any(dim, keepdim=True).expand_as(marks)
    return marks


def _lines(marks: Tensor) -> list[Tensor]:
    """The positions of every dim that hold a mark. One pass a dim, over ever smaller tensors."""
    lines = []
    # amax over bytes, because `any` over booleans is ten times slower on CPUs.
    rest = marks.to(torch.uint8)
    for _ in range(marks.dim()):
        lines.append(rest.flatten(1).amax(1) if rest.dim() > 1 else rest)
        rest = rest.amax(0)
    return lines


def _kept_sets(lanes: Sequence[Tensor]) -> Kept | str:
    """The index sets whose product the marks are, per dimension, or why there are none."""
    if not any(marks.any() for marks in lanes):
        return (None,) * lanes[0].dim()
    per_lane: list[list[IndexSet]] = []
    for marks in lanes:
        sets = [from_indices(line.nonzero().flatten().tolist()) for line in _lines(marks)]
        elements = math.prod(map(size, sets))
        if elements == 0 or elements != torch.count_nonzero(marks):
            return "a lane needs a part of its operand that is no block of it"
        per_lane.append(sets)
    kept_dims: list[KeptDim] = []
    for dim in range(lanes[0].dim()):
        dim_sets = tuple(sets[dim] for sets in per_lane)
        if len(set(map(size, dim_sets))) > 1:
            return "lanes need unequal parts of its operand"
        # What all lanes need alike is not divided, be it all or some of it.
        kept_dims.append(None if all(one == dim_sets[0] for one in dim_sets) else dim_sets)
    return tuple(kept_dims)
