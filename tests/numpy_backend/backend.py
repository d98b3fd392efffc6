"""`NumpyBackend`: the lane graph as JSON, which ranks interpret with numpy. Imports no torch until it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import AT_RUN, Backend, BackendOptions, RankModel, Reference
from kraken_compiler.errors import UsageError
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY, SHARED_FILE, lane_file_name
from tests.numpy_backend.graph import GRAPH_FILE, LaneGraph

if TYPE_CHECKING:
    from kraken_compiler.ir.program import LaneProgram
    from kraken_compiler.ir.schedule import Window
    from kraken_compiler.ir.source_reader import SourceReader
    from kraken_compiler.progress import Advance
    from kraken_compiler.ranks.session import Ranks


@dataclass(frozen=True, kw_only=True)
class NumpyOptions(BackendOptions):
    """What can be chosen: one option of a compile, and one of a run."""

    numpy_indent: Annotated[int, typer.Option(help="Spaces that the graph's JSON is indented by.")] = 0
    numpy_dtype: Annotated[str, typer.Option(help="What the numpy backend computes in."), AT_RUN] = "float32"

    def check(self) -> None:
        """See `BackendOptions.check`."""
        if self.numpy_dtype not in ("float32", "float64"):
            raise UsageError(f"--numpy-dtype {self.numpy_dtype}: choose float32 or float64")


class NumpyBackend(Backend[NumpyOptions]):
    """`numpy.json`, and the weights: every lane's own, and shared ones."""

    name: ClassVar[str] = "numpy"
    writes_all_weights: ClassVar[bool] = True
    Options = NumpyOptions
    ranks_are: ClassVar[str] = "numpy ranks"

    def write(
        self, program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
    ) -> tuple[Window, ...]:
        from kraken_compiler.weights.write_shards import write_lane_shards
        from tests.numpy_backend.write import graph_of

        graph = graph_of(program)
        graph.save(directory / GRAPH_FILE, self.options.numpy_indent)
        write_lane_shards(program, read, directory, progress)
        return graph.windows(program.plan)

    def rank_files(self, artifact: Artifact, rank: int) -> Sequence[str]:
        return [f"{LANES_DIRECTORY}/{name}" for name in (GRAPH_FILE, lane_file_name(rank), SHARED_FILE)]

    def open(self, artifact: Artifact, ranks: Ranks, *, checking: bool = False) -> RankModel:
        from tests.numpy_backend.model import NumpyModel

        return NumpyModel(artifact, ranks, self._graph(artifact), "float64" if checking else self.options.numpy_dtype)

    def reference(self, artifact: Artifact, lanes: Reference | None = None) -> Reference | None:
        # The graph of a lane program is not kept, its weights are.
        if lanes is None:
            return None
        from kraken_compiler.lanes.reference import read_from_lane_files

        files = [artifact.path(f"{LANES_DIRECTORY}/{lane_file_name(lane)}") for lane in range(lanes.program.degree)]
        return Reference(lanes.program, read_from_lane_files(files, artifact.path(f"{LANES_DIRECTORY}/{SHARED_FILE}")))

    def schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        return self._graph(artifact).windows(artifact.manifest.plan)

    def _graph(self, artifact: Artifact) -> LaneGraph:
        return LaneGraph.load(artifact.path(f"{LANES_DIRECTORY}/{GRAPH_FILE}"))
