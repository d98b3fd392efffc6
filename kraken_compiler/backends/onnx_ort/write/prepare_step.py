"""Rewrites the step graph for ONNX, which writes into no caches: they come in, and go out longer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import on_fakes
from kraken_compiler.backends.onnx_ort.format import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGIT_POSITIONS,
    LOGITS,
    POSITION_IDS,
    SEQUENCE,
    TOTAL,
    past_name,
    present_name,
)
from kraken_compiler.backends.onnx_ort.format import PAST as PAST_DIM
from kraken_compiler.backends.onnx_ort.format import PICKS as PICKS_DIM
from kraken_compiler.backends.onnx_ort.write import attention_ops
from kraken_compiler.backends.onnx_ort.write.number_operands import type_number_operands
from kraken_compiler.ir.cache import PAST, PICKS, POSITIONS, SLOTS
from kraken_compiler.ir.program import CachedProgram, Program
from kraken_compiler.ops.cached_attention import CACHED_ATTENTION
from kraken_compiler.passes.shapes import fake_mode_of


@dataclass(frozen=True)
class PreparedGraph:
    """A graph as it will be exported.

    Attributes:
        graph: Placeholders: the weights, the tables, then the inputs. Every node has `meta["val"]`.
        weights: Names of the weight placeholders; weights that nothing reads are left out.
        tables: Names of the placeholders that the tables graph computes, likewise.
        inputs: Placeholder name -> the input's name in the file.
        outputs: Names of the outputs in the file.
        dims: Symbol of a dynamic size -> its name in the file.
    """

    graph: fx.Graph
    weights: tuple[str, ...]
    tables: tuple[str, ...]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    dims: dict[str, str]


def prepare_step(cached: CachedProgram) -> PreparedGraph:
    """The step graph with explicit pasts and presents.

    Every `kraken::cached_attention` becomes `kraken_onnx::attention`; `slots` and `past`, which only say how long
    things are, become the attention mask. Tables stay inputs here, they will be stored with the weights.
    """
    assert attention_ops is not None  # importing it defines the ops
    plan = cached.plan
    graph = cached.step.copy().graph
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    ids = nodes[cached.step.inputs[0].name]
    slots, past = nodes[SLOTS], nodes[PAST]
    fake = ids.meta["val"].fake_mode
    batch, total, past_size = ids.meta["val"].shape[0], slots.meta["val"].shape[0], past.meta["val"].shape[0]
    with graph.inserting_before(slots):
        mask_input = graph.placeholder(ATTENTION_MASK)
    with fake:
        mask_input.meta["val"] = torch.empty((batch, total), dtype=torch.int64)
        for cache in plan.caches:
            for name, dim in ((cache.key, cache.key_dim), (cache.value, cache.value_dim)):
                old: Tensor = nodes[name].meta["val"]
                nodes[name].meta["val"] = torch.empty((batch, cache.heads, past_size, dim), dtype=old.dtype)
    if cached.step.degree == 1:
        _drop_collectives(graph)
    presents = _replace_attentions(graph, mask_input, ids, fake)
    _return(graph, [presents[name] for cache in plan.caches for name in (cache.key, cache.value)])
    type_number_operands(graph, fake)
    graph.eliminate_dead_code()
    inputs = {
        ids.name: INPUT_IDS,
        POSITIONS: POSITION_IDS,
        ATTENTION_MASK: ATTENTION_MASK,
        PICKS: LOGIT_POSITIONS,
    }
    outputs = [LOGITS]
    for layer, cache in enumerate(plan.caches):
        inputs |= {cache.key: past_name(layer, "key"), cache.value: past_name(layer, "value")}
        outputs += [present_name(layer, "key"), present_name(layer, "value")]
    for name in (SLOTS, PAST):
        graph.erase_node(nodes[name])
    if not nodes[POSITIONS].users:
        graph.erase_node(nodes[POSITIONS])
        del inputs[POSITIONS]
    weights = tuple(cached.step.weights)
    used_names = [name for name in (*weights, *plan.tables) if nodes[name].users]
    for name in {*weights, *plan.tables}.difference(used_names):
        graph.erase_node(nodes[name])
    _order_placeholders(graph, [*used_names, *inputs])
    sizes = (*ids.meta["val"].shape, total, past_size, nodes[PICKS].meta["val"].shape[1])
    dims = dict(zip(map(str, sizes), (BATCH, SEQUENCE, TOTAL, PAST_DIM, PICKS_DIM), strict=True))
    return PreparedGraph(
        graph,
        tuple(name for name in used_names if name not in plan.tables),
        tuple(name for name in used_names if name in plan.tables),
        inputs,
        tuple(outputs),
        dims,
    )


def prepare_lane(program: Program) -> PreparedGraph:
    """The lane graph of a model without a KV cache, as it is."""
    graph = program.copy().graph
    if program.degree == 1:
        _drop_collectives(graph)
    _drop_idle_grouping(graph)
    type_number_operands(graph, fake_mode_of(graph))
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for name in program.weights:
        if not nodes[name].users:
            graph.erase_node(nodes[name])
    dims = {
        str(size): name
        for spec in program.inputs
        for size, name in zip(nodes[spec.name].meta["val"].shape, spec.shape)
        if isinstance(name, str)
    }
    weights = tuple(name for name in program.weights if nodes[name].users)
    inputs = {spec.name: spec.name for spec in program.inputs}
    return PreparedGraph(graph, weights, (), inputs, program.call.output_names, dims)


def _replace_attentions(graph: fx.Graph, mask_input: fx.Node, ids: fx.Node, mode: Any) -> dict[str, fx.Node]:
    """Replace the attentions; returns every cache's present, by the name of its placeholder."""
    masks: dict[Any, fx.Node] = {}
    presents: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not CACHED_ATTENTION:
            continue
        query, key, value, key_cache, value_cache, *_ = node.args
        options = list(node.args[8:])
        slopes, window, scale, softcap, sinks = options + [None, 0, None, 0.0, None][len(options) :]
        kind = (slopes, window, query.meta["val"].dtype)
        with graph.inserting_before(node):
            if kind not in masks:
                masks[kind] = _call(graph, mode, torch.ops.kraken_onnx.attention_mask.default, mask_input, ids, *kind)
            operands: tuple[Any, ...] = (query, key, value, masks[kind], key_cache, value_cache, scale)
            target = torch.ops.kraken_onnx.attention.default
            if softcap or sinks is not None:
                (heads, head_dim), kv_heads = query.meta["val"].shape[1::2], key.meta["val"].shape[1]
                sizes = (kv_heads, heads // kv_heads, head_dim, value.meta["val"].shape[3])
                by_head = slopes is not None
                target = torch.ops.kraken_onnx.capped_attention.default
                factor = head_dim**-0.5 if scale is None else scale
                operands = (*operands[:-1], factor, softcap, *sizes, by_head, sinks)
            results = _call(graph, mode, target, *operands)
            out, presents[key_cache.name], presents[value_cache.name] = (
                _element(graph, results, number) for number in range(3)
            )
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    return presents


def _drop_idle_grouping(graph: fx.Graph) -> None:
    """Drop the grouping of lanes with one query head for every KV head: the exporter takes no grouping of one."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default and node.kwargs.get("enable_gqa"):
            query, key = (operand.meta["val"] for operand in node.args[:2])
            if query.shape[1] == key.shape[1]:
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != "enable_gqa"}


def _drop_collectives(graph: fx.Graph) -> None:
    """Drop the collectives of a single device, whose model plain ONNX Runtime runs."""
    collectives = (
        torch.ops.kraken.all_reduce_start.default,
        torch.ops.kraken.wait.default,
        torch.ops.kraken.all_gather.default,
    )
    for node in list(graph.nodes):
        if node.target in collectives:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _call(graph: fx.Graph, mode: Any, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    with on_fakes(mode):
        node.meta["val"] = target(*fx.node.map_arg(args, lambda operand: operand.meta["val"]))
    return node


def _element(graph: fx.Graph, results: fx.Node, number: int) -> fx.Node:
    node = graph.call_function(operator.getitem, (results, number))
    node.meta["val"] = results.meta["val"][number]
    return node


def _return(graph: fx.Graph, values: list[fx.Node]) -> None:
    output = graph.output_node()
    output.args = ((*output.args[0], *values),)  # type: ignore[misc]


def _order_placeholders(graph: fx.Graph, names: list[str]) -> None:
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    assert nodes.keys() == set(names), f"placeholders {nodes.keys() ^ set(names)} are not accounted for"
    last = None
    for name in names:
        (last.append if last is not None else next(iter(graph.nodes)).prepend)(nodes[name])
        last = nodes[name]
    graph.lint()
