"""The program: one FX graph (ATen ops), its weight table, its calling convention, and what the passes found out.

A captured model is a program of degree 1 whose weights are all whole. A *lane program* is a program of degree N: the
same graph runs on every lane, the weight table says which part of each tensor lane i owns, and `kraken::` ops are the
only communication. Every backend takes a lane program.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from kraken_compiler.ir import dequantize  # noqa: F401  (registers the op)
from kraken_compiler.ir.cache import CachePlan
from kraken_compiler.ir.calls import CallSpec as CallSpec
from kraken_compiler.ir.calls import InputSpec as InputSpec
from kraken_compiler.ir.layers import LayerTable
from kraken_compiler.ir.schedule import FormPlan, Window
from kraken_compiler.ir.shards import BranchShards
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec


@dataclass
class Program:
    """A graph with everything needed to understand and run it.

    Attributes:
        module: The graph. Placeholders: first every weight in the order of `weights`, then every input in the order of
            `inputs`. Output: a flat tuple of tensors. Every node carries `meta["val"]` (fake tensors, symbolic sizes).
        weights: Placeholder name -> spec.
        inputs: The tensor inputs.
        call: Calling convention of the source model.
        constants: Values of tensors that are no part of a checkpoint (lifted constants, non-persistent buffers, lane
            indices), by source name.
        degree: Number of lanes.
        layers: Set by recognition.
        shards: Set by shard planning.
        plan: Set by form assignment.
        windows: Set by scheduling.
        cached: The same computation with a KV cache; set by the cache pass, None if the model allows none.
        no_cache: Why it allows none, "" if it does or nobody has asked.
    """

    module: fx.GraphModule
    weights: dict[str, WeightSpec]
    inputs: tuple[InputSpec, ...]
    call: CallSpec
    constants: dict[str, Tensor] = field(default_factory=dict)
    degree: int = 1
    layers: LayerTable | None = None
    shards: tuple[BranchShards, ...] = ()
    plan: FormPlan | None = None
    windows: tuple[Window, ...] = ()
    cached: CachedProgram | None = None
    no_cache: str = ""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self) -> Program:
        """A program with its own graph; records and tensors are shared."""
        graph = fx.Graph()
        value_map: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, value_map)
        graph.output(output)
        for source, target in value_map.items():
            target.meta = dict(source.meta)
        module = fx.GraphModule(self.module, graph)
        return replace(self, module=module, weights=dict(self.weights), constants=dict(self.constants))

    def reader(self, read: SourceReader) -> SourceReader:
        """The reader of the source's tensors, extended by this program's own constants."""
        return SourceReader(
            lambda source: self.constants[source] if source in self.constants else read(source),
            lambda source: None if source in self.constants else read.rows_of(source),
        )


@dataclass(frozen=True)
class CachedProgram:
    """A lane program with a KV cache.

    Attributes:
        step: Prefill and decode in one graph: the weights, then the token ids [batch, tokens], what `CachePlan` names,
            and the inputs `positions`, `slots`, `past` and `picks` (see `kraken::cached_attention`; `picks` [batch, k]
            says which of the new tokens' logits are wanted). Output: the logits [batch, k, vocabulary].
        tables: The position tables and prepared weights that `step` reads: the weights and token ids [1, capacity] of
            any value in, the tables in the order of `plan.tables` out.
        plan: The caches, tables and slopes.
    """

    step: Program
    tables: Program
    plan: CachePlan


def parameter_count(program: Program) -> int:
    """Number of parameters one lane holds."""
    dequantized = (node for node in program.graph.nodes if node.target is torch.ops.kraken.dequantize.default)
    per_element = {node.args[0].name: 8 // node.args[3] for node in dequantized}
    held = (spec for spec in program.weights.values() if spec.kind == "parameter")
    return sum(torch.Size(spec.shape).numel() * per_element.get(spec.name, 1) for spec in held)
