"""The graphs of a program with a KV cache, from memory or from an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from kraken_compiler.backends.torch_dist.graph_file import load_graph
from kraken_compiler.backends.torch_dist.lane_files import STEP_FILE, TABLES_FILE
from kraken_compiler.ir.cache import CachePlan
from kraken_compiler.ir.program import CachedProgram, InputSpec

if TYPE_CHECKING:
    from kraken_compiler.artifact.read import Artifact


@dataclass(frozen=True)
class CachedGraphs:
    """Graphs without weights; placeholders are all weights of the lane program, then the inputs.

    Attributes:
        step: Prefill and decode, with `kraken::` collectives.
        tables: What is computed once for a capacity; None if nothing is.
        plan: How the step graph is fed.
        inputs: Inputs of the step graph.
    """

    step: fx.GraphModule
    tables: fx.GraphModule | None
    plan: CachePlan
    inputs: tuple[InputSpec, ...]

    @classmethod
    def of(cls, cached: CachedProgram) -> CachedGraphs:
        """From a program in memory."""
        tables = cached.tables.module if cached.plan.tables else None
        return cls(cached.step.module, tables, cached.plan, cached.step.inputs)

    @classmethod
    def load(cls, artifact: Artifact) -> CachedGraphs:
        """From an artifact that has a cache, whose files have been verified.

        Raises:
            InputFileError: A file is missing or damaged.
        """
        record = artifact.manifest.cache
        assert record is not None, "the artifact has no program with a cache"
        files = (STEP_FILE, TABLES_FILE) if record.plan.tables else (STEP_FILE,)
        step, *tables = (load_graph(artifact.path(name)) for name in files)
        return cls(step, tables[0] if tables else None, record.plan, record.inputs)
