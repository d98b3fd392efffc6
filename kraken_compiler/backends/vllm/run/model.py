"""`KrakenForCausalLM`: a lane of a compiled model, as vLLM's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.lane_graph.insert_collectives import copy_graph
from kraken_compiler.backends.vllm.format import HIDDEN, IDS, POSITIONS, EngineAttention, rank_files
from kraken_compiler.backends.vllm.lane import EngineLane
from kraken_compiler.backends.vllm.run.collectives import bind_engine_collectives
from kraken_compiler.backends.vllm.run.linear import EngineLinear, takes
from kraken_compiler.backends.vllm.run.options import EngineOptions
from kraken_compiler.ops.devices import retarget
from kraken_compiler.ops.engine_attention import ENGINE_ATTENTION
from kraken_compiler.ops.op_sets import LINEAR

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ATTENTIONS, _LINEARS, _WEIGHTS = "attentions", "linears", "weights"


class _LaneGraph(nn.Module):
    """A graph of a lane with what it calls: vLLM's attentions and linear layers, and collectives.

    Attributes:
        names: The graph's inputs, without the weights.
    """

    def __init__(self, module: fx.GraphModule, lane: EngineLane, device: torch.device, collectives: str) -> None:
        super().__init__()
        root = nn.Module()
        for name in (_ATTENTIONS, _LINEARS, _WEIGHTS):
            root.add_module(name, nn.Module())
        bind_engine_collectives(module, device, collectives)
        self._weights = {
            node.name: lane.weights[node.name]
            for node in module.graph.find_nodes(op="placeholder")
            if node.name in lane.weights
        }
        # A graph of its own: one that a module owns takes calls of that module's parts only.
        self._graph, self._root, self._device = copy_graph(module.graph), root, device
        self.names = [node.name for node in module.graph.find_nodes(op="placeholder") if node.name not in self._weights]
        self.graph: fx.GraphModule | None = None

    def add_attentions(self, attentions: dict[int, Attention]) -> None:
        """Put vLLM's attentions where the graph has one."""
        graph = self._graph
        for node in graph.find_nodes(op="call_function", target=ENGINE_ATTENTION):
            query, key, value, number = node.args
            name = f"{_ATTENTIONS}.{number}"
            self._root.get_submodule(_ATTENTIONS).add_module(str(number), _TokensFirst(attentions[number]))
            with graph.inserting_before(node):
                new = graph.call_module(name, (query, key, value))
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Put the weights in.

        Args:
            weights: Those that are on the device already, by name; what this graph needs besides is added.
        """
        graph, root = self._graph, self._root
        for node in list(graph.find_nodes(op="placeholder")):
            if node.name not in self._weights:
                continue
            if node.name not in weights:
                weights[node.name] = self._weights[node.name].to(self._device, copy=True)
            self._bind(node, weights)
        for node in list(graph.find_nodes(op="placeholder")):
            if node.name in self._weights and not node.users:
                graph.erase_node(node)
        module = fx.GraphModule(root, graph)
        retarget(module, self._device)
        self.graph = module.eval()
        self._weights = {}

    def add_tables(self, tables: Mapping[str, Tensor]) -> None:
        """Keep those of the tables that the graph reads."""
        for name in self.names:
            if name in tables:
                self.register_buffer(name, tables[name], persistent=False)

    def forward(self, **inputs: Tensor) -> Tensor:
        """The graph's result of inputs by name, without the dim of its one row; tables are its own."""
        assert self.graph is not None, "the weights are not loaded"
        result: Tensor = self.graph(*(inputs[name] if name in inputs else getattr(self, name) for name in self.names))[
            0
        ]
        return result[0]

    def _bind(self, node: fx.Node, weights: dict[str, Tensor]) -> None:
        """Replace a weight's placeholder: by linear layers where it is the matrix of some, by the weight elsewhere."""
        graph, root, weight = self._graph, self._root, weights[node.name]
        linears = [user for user in node.users if user.target is LINEAR and user.args[1] is node and takes(weight)]
        for number, user in enumerate(linears):
            bias = user.args[2] if len(user.args) > 2 else None
            own_bias = None
            if isinstance(bias, fx.Node):
                if bias.name not in weights:
                    if bias.name not in self._weights:
                        continue  # it is computed: the operator takes it
                    weights[bias.name] = self._weights[bias.name].to(self._device, copy=True)
                own_bias = weights[bias.name]
            layer = EngineLinear(weight, own_bias)
            layer.prepare()
            name = f"{node.name}_{number}"
            root.get_submodule(_LINEARS).add_module(name, layer)
            with graph.inserting_before(user):
                new = graph.call_module(f"{_LINEARS}.{name}", (user.args[0],))
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        if node.users:
            holder = root.get_submodule(_WEIGHTS)
            if weight.is_floating_point():
                holder.register_parameter(node.name, nn.Parameter(weight, requires_grad=False))
            else:
                holder.register_buffer(node.name, weight)
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", f"{_WEIGHTS}.{node.name}")
            node.replace_all_uses_with(attribute)


class _TokensFirst(nn.Module):
    """vLLM's attention, on operands [1, heads, tokens, size]."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = [operand[0].transpose(0, 1).flatten(1) for operand in (query, key, value)]
        out: Tensor = self.attention(*rows)
        by_head = out.view(out.shape[0], self.attention.num_heads, -1)
        return by_head.transpose(0, 1).unsqueeze(0)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class LaneBody(nn.Module):
    """The graph from tokens to hidden states."""

    def __init__(self, lane: _LaneGraph, dtype: torch.dtype, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.lane, self.dtype = lane, dtype

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[T], [T] -> [T, hidden size]."""
        hidden: Tensor = self.lane(**{IDS: input_ids.to(self.dtype).unsqueeze(0), POSITIONS: positions.unsqueeze(0)})
        return hidden


class KrakenForCausalLM(nn.Module):
    """A lane of a compiled model; vLLM makes one in every process of a tensor-parallel group."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Read the graphs, and make the attentions, whose caches vLLM allocates."""
        super().__init__()
        model_config = vllm_config.model_config
        artifact = open_artifact(Path(model_config.model), verify=False)
        manifest, rank = artifact.manifest, get_tensor_model_parallel_rank()
        artifact.verify(*rank_files(artifact, rank))
        self._lane = EngineLane.load(artifact, rank)
        self._device = torch.device(vllm_config.device_config.device)
        self._capacity = model_config.max_model_len
        kind = EngineOptions.of(vllm_config).collectives
        body, self._head = (
            _LaneGraph(module, self._lane, self._device, kind) for module in (self._lane.body, self._lane.head)
        )
        attentions = self._lane.record.attentions
        self._prepared: tuple[Tensor, ...] = ()
        if any(attention.slopes is not None or attention.sinks is not None for attention in attentions):
            # They follow from few weights, and are computed where those lie in the files; slopes show on two tokens.
            self._prepared = self._lane.prepared(2, self._lane.weights, torch.device("cpu"))
        body.add_attentions(
            {
                number: self._attention(attention, number, vllm_config, prefix)
                for number, attention in enumerate(attentions)
            }
        )
        dtype = getattr(torch, manifest.inputs[0].dtype)
        # By name: what the decorator is given by position it compares with annotations, which are texts here.
        self.model = LaneBody(lane=body, dtype=dtype, vllm_config=vllm_config, prefix=prefix)

    def _attention(self, attention: EngineAttention, number: int, vllm_config: VllmConfig, prefix: str) -> Attention:
        extra: dict[str, Any] = {}
        if attention.slopes is not None:
            extra["alibi_slopes"] = self._prepared[attention.slopes].tolist()
        if attention.sinks is not None:
            extra["sinks"] = self._prepared[attention.sinks].to(self._device)
        if attention.softcap:
            extra["logits_soft_cap"] = attention.softcap
        return Attention(
            attention.heads,
            attention.head_size,
            attention.scale,
            num_kv_heads=attention.kv_heads,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=attention.window or None,
            prefix=f"{prefix}.layers.{number}.attn" if prefix else f"layers.{number}.attn",
            **extra,
        )

    def load_lane(self) -> None:
        """Put this lane's weights onto the device, and compute the tables."""
        weights: dict[str, Tensor] = {}
        graphs = (self.model.lane, self._head)
        for graph in graphs:
            graph.load(weights)
        names = {node.name for node in self._lane.prepare.graph.find_nodes(op="placeholder")}
        needed = {
            name: weights.get(name, tensor).to(self._device)
            for name, tensor in self._lane.weights.items()
            if name in names
        }
        tables = self._lane.tables(self._lane.prepared(self._capacity, needed, self._device))
        for graph in graphs:
            graph.add_tables(tables)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: Tensor | None = None,
        **others: object,
    ) -> Tensor:
        """Token ids [T] and positions [T] of any number of sequences -> hidden states [T, hidden size]."""
        if input_ids is None:
            raise ValueError("a compiled model takes token ids, not embeddings")
        hidden: Tensor = self.model(input_ids, positions)
        return hidden

    def compute_logits(self, hidden_states: Tensor, *others: object) -> Tensor:
        """Hidden states [n, hidden size] -> logits [n, vocabulary], on every rank."""
        logits: Tensor = self._head(**{HIDDEN: hidden_states.unsqueeze(0)})
        return logits

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Not there: the embedding is a part of the body."""
        raise NotImplementedError("a compiled model embeds tokens inside its graph; it takes no embeddings")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Not there: weights come out of the artifact alone, see `LaneLoader`."""
        raise NotImplementedError("a compiled model takes its weights out of its artifact; leave --load-format out")
