"""The graphs of a program with a KV cache, from memory or from an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from kraken_compiler.backends.lane_graph.graph_file import load_graph
from kraken_compiler.backends.lane_graph.lane_files import SPLIT_FILE, STEP_FILE, TABLES_FILE
from kraken_compiler.ir.cache import CachePlan
from kraken_compiler.ir.program import CachedProgram, InputSpec
from kraken_compiler.ir.schedule import FormPlan

if TYPE_CHECKING:
    from kraken_compiler.artifact.read import Artifact


@dataclass(frozen=True)
class CachedGraphs:
    """Graphs without weights; placeholders are all weights of the lane program, then the inputs.

    Attributes:
        step: Prefill and decode, with `kraken::` collectives.
        split: The same on two halves of the tokens; None if there is none.
        tables: What is computed once for a capacity; None if nothing is.
        plan: How the step graph is fed.
        inputs: Inputs of the step graph.
        split_inputs: Those that the graph on two halves has besides.
        split_plan: The reduces of both halves.
    """

    step: fx.GraphModule
    split: fx.GraphModule | None
    tables: fx.GraphModule | None
    plan: CachePlan
    inputs: tuple[InputSpec, ...]
    split_inputs: tuple[InputSpec, ...] = ()
    split_plan: FormPlan | None = None

    @classmethod
    def of(cls, cached: CachedProgram) -> CachedGraphs:
        """From a program in memory."""
        tables = cached.tables.module if cached.plan.tables else None
        step, split = cached.step, cached.split
        if split is None:
            return cls(step.module, None, tables, cached.plan, step.inputs)
        halves = split.program.module
        return cls(step.module, halves, tables, cached.plan, step.inputs, cached.split_inputs, split.plan)

    @classmethod
    def load(cls, artifact: Artifact) -> CachedGraphs:
        """From an artifact that has a cache, whose files have been verified.

        Raises:
            InputFileError: A file is missing or damaged.
        """
        record = artifact.manifest.cache
        assert record is not None, "the artifact has no program with a cache"
        step = load_graph(artifact.path(STEP_FILE))
        tables = load_graph(artifact.path(TABLES_FILE)) if record.plan.tables else None
        if record.split is None:
            return cls(step, None, tables, record.plan, record.inputs)
        split = load_graph(artifact.path(SPLIT_FILE))
        return cls(step, split, tables, record.plan, record.inputs, record.split.inputs, record.split.plan)
