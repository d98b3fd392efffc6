"""The lane graph on two halves of a batch's rows, from memory or from an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from kraken_compiler.backends.lane_graph.graph_file import load_graph
from kraken_compiler.backends.lane_graph.lane_files import ROWS_FILE
from kraken_compiler.ir.program import InputSpec, SplitRun
from kraken_compiler.ir.rows import RowDims
from kraken_compiler.ir.schedule import FormPlan

if TYPE_CHECKING:
    from kraken_compiler.artifact.read import Artifact


@dataclass(frozen=True)
class RowGraph:
    """The graph without weights; placeholders are all weights of the lane program, then the inputs.

    Attributes:
        module: It, with `kraken::` collectives.
        inputs: Its inputs.
        plan: The reduces of both halves.
        dims: Where the rows lie in the lane program's inputs and outputs.
    """

    module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    plan: FormPlan
    dims: RowDims

    @classmethod
    def of(cls, rows: SplitRun) -> RowGraph:
        """From a program in memory."""
        return cls(rows.program.module, rows.program.inputs, rows.plan, rows.dims)

    @classmethod
    def load(cls, artifact: Artifact) -> RowGraph:
        """From an artifact that has one, whose files have been verified.

        Raises:
            InputFileError: The file is missing or damaged.
        """
        record = artifact.manifest.rows
        assert record is not None, "the artifact has no program on halves of rows"
        graph = load_graph(artifact.path(ROWS_FILE))
        return cls(graph, record.dims.specs(artifact.manifest.inputs), record.plan, record.dims)
