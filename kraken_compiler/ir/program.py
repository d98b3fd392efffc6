"""The program: one FX graph (ATen ops), its weight table, its calling convention; each stage adds what passes found.

    Program      as captured: degree 1, all weights whole
    Recognized   + layers   the residual stream and its branches
    Split        + shards   degree N: the weight table says which part of each tensor lane i owns
    Planned      + plan     what every branch reads, and the reduces
    LaneProgram  + windows  the stream rebuilt for its form; in time also the program with a KV cache

A *lane program* is one graph that runs on every lane; `kraken::` ops are the only communication. Every backend takes a
lane program. The functions from stage to stage are in `passes/stages.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, fx

from kraken_compiler.ir.cache import CachePlan
from kraken_compiler.ir.calls import CallSpec as CallSpec
from kraken_compiler.ir.calls import InputSpec as InputSpec
from kraken_compiler.ir.layers import LayerTable
from kraken_compiler.ir.rows import RowDims
from kraken_compiler.ir.schedule import FormPlan, Window
from kraken_compiler.ir.shards import Assignment, BranchShards
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.ops import dequantize  # noqa: F401  (registers the op)

Stage = TypeVar("Stage", bound="Program")


@dataclass
class Program:
    """A graph with everything needed to call it.

    Attributes:
        module: The graph. Placeholders: first every weight in the order of `weights`, then every input in the order of
            `inputs`. Output: a flat tuple of tensors. Every node carries `meta["val"]` (fake tensors, symbolic sizes).
        weights: Placeholder name -> spec.
        inputs: The tensor inputs.
        call: Calling convention of the source model.
        constants: Values of tensors that are no part of a checkpoint (lifted constants, non-persistent buffers, lane
            indices), by source name.
        degree: Number of lanes.
    """

    module: fx.GraphModule
    weights: dict[str, WeightSpec]
    inputs: tuple[InputSpec, ...]
    call: CallSpec
    constants: dict[str, Tensor] = field(default_factory=dict)
    degree: int = 1

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self) -> Self:
        """A program with its own graph; records and tensors are shared."""
        graph = fx.Graph()
        value_map: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, value_map)
        graph.output(output)
        for source, target in value_map.items():
            target.meta = dict(source.meta)
        module = fx.GraphModule(self.module, graph)
        return replace(self, module=module, weights=dict(self.weights), constants=dict(self.constants))

    def check(self) -> None:
        """Check the records against the graph: an `AssertionError` names what is in one and not in the other.

        Tests let the runner call this after every pass.
        """
        placeholders = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        inputs = [spec.name for spec in self.inputs]
        assert placeholders == [*self.weights, *inputs], "placeholders: weights, then inputs"
        assert all(name == spec.name for name, spec in self.weights.items()), "weights by their names"
        constants = {spec.source for spec in self.weights.values() if spec.kind == "constant"}
        assert constants <= self.constants.keys(), f"constants without a value: {constants - self.constants.keys()}"
        for record, names in self._names().items():
            missing = set(names) - {node.name for node in self.graph.nodes}
            assert not missing, f"{record} names nodes that the graph does not have: {sorted(missing)}"

    def _names(self) -> dict[str, Iterable[str]]:
        """By record, the nodes that it names."""
        return {}

    def at(self, stage: type[Stage], **facts: Any) -> Stage:
        """This program, graph and tables shared, at another stage.

        Args:
            stage: A class of programs.
            facts: The fields of it that this program does not have, or has otherwise.
        """
        names = {one.name for one in fields(stage)}
        return stage(**{name: value for name, value in vars(self).items() if name in names} | facts)

    def reader(self, read: SourceReader) -> SourceReader:
        """The reader of the source's tensors, extended by this program's own constants."""
        return SourceReader(
            lambda source: self.constants[source] if source in self.constants else read(source),
            lambda source: None if source in self.constants else read.rows_of(source),
        )


@dataclass(kw_only=True)
class Recognized(Program):
    """A program whose layers are known.

    Attributes:
        layers: The residual stream and its branches.
        assignment: The heads and columns that lanes were given otherwise than in the order of the files.
    """

    layers: LayerTable
    assignment: Assignment = field(default_factory=dict)

    def _names(self) -> dict[str, Iterable[str]]:
        return super()._names() | {"layers": self.layers.names()}


@dataclass(kw_only=True)
class Split(Recognized):
    """A program of which every lane computes its share of every branch. It does not depend on the form.

    While its degree still is 1, the shares are planned and nothing is cut.

    Attributes:
        shards: One for every branch: which part of its tensors is which lane's.
    """

    shards: tuple[BranchShards, ...]

    def _names(self) -> dict[str, Iterable[str]]:
        shards = (name for branch in self.shards for name in (*branch.inputs, branch.output, *branch.region))
        return super()._names() | {"shards": shards}


@dataclass(kw_only=True)
class Planned(Recognized):
    """A program whose layers have their forms.

    Attributes:
        plan: What every branch reads, and the reduces.
    """

    plan: FormPlan

    def check(self) -> None:
        super().check()
        branches = [branch.index for branch in self.layers.branches]
        assert [read.branch for read in self.plan.reads] == branches, "one read for every branch"
        assert len(self.plan.forms) == len(self.layers.layers), "one form for every layer"
        assert [reduce.index for reduce in self.plan.reduces] == [*range(len(self.plan.reduces))], "reduces in order"


@dataclass(kw_only=True)
class LaneProgram(Planned):
    """A program that computes its form, lane by lane.

    Attributes:
        windows: What lies between every reduce's start and its wait.
        cached: The same computation with a KV cache; None if the model allows none, or nobody has asked.
        no_cache: Why it allows none, "" if it does or nobody has asked.
        rows: The same computation on two halves of a batch's rows; None if there is none, or nobody has asked.
        no_rows: Why there is none, "" if there is one or nobody has asked.
    """

    windows: tuple[Window, ...]
    cached: CachedProgram | None = None
    no_cache: str = ""
    rows: SplitRun | None = None
    no_rows: str = ""

    def check(self) -> None:
        super().check()
        assert self.windows == measure_windows(self.graph, self.plan), "windows as they are in the graph"
        if self.cached is not None:
            self.cached.step.check()
            self.cached.tables.check()
            if self.cached.split is not None:
                self.cached.split.program.check()
        if self.rows is not None:
            self.rows.program.check()


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
        split: The step graph on two halves of the tokens; None if there is none, or nobody has asked.
        no_split: Why there is none, "" if there is one or nobody has asked.
    """

    step: Program
    tables: Program
    plan: CachePlan
    split: SplitStep | None = None
    no_split: str = ""

    @property
    def split_inputs(self) -> tuple[InputSpec, ...]:
        """The inputs that the graph on two halves has besides the step graph's; none without it."""
        return () if self.split is None else self.split.program.inputs[len(self.step.inputs) :]


@dataclass(frozen=True)
class SplitStep:
    """A step graph on two halves of the tokens, whose reduces fly while the other half computes.

    Attributes:
        program: The graph. The step graph's inputs, then how many tokens the first half has (the length of `cut`), the
            slots that the first half sees and the past of the second half, as for a step graph of theirs. Output: as of
            the step graph. Its nodes carry no `meta["val"]`.
        plan: The reduces of both halves.
        once: Numbers of the step graph's reduces that the halves have together, and not one each.
    """

    program: Program
    plan: FormPlan
    once: tuple[int, ...] = ()


@dataclass(frozen=True)
class SplitRun:
    """A lane program on two halves of the rows of a batch, whose reduces fly while the other half computes.

    Attributes:
        program: The graph. The lane program's inputs, with the first half of the rows; then those that have rows again,
            with the others. Output: the lane program's of the first half, then those of the second. Its nodes carry no
            `meta["val"]`.
        plan: The reduces of both halves.
        dims: Where the rows lie in the lane program's inputs and outputs.
    """

    program: Program
    plan: FormPlan
    dims: RowDims


def parameter_count(program: Program) -> int:
    """Number of parameters one lane holds."""
    dequantize_nodes = (node for node in program.graph.nodes if node.target is torch.ops.kraken.dequantize.default)
    per_element = {node.args[0].name: 8 // node.args[3] for node in dequantize_nodes}
    parameters = (spec for spec in program.weights.values() if spec.kind == "parameter")
    return sum(torch.Size(spec.shape).numel() * per_element.get(spec.name, 1) for spec in parameters)
