"""The torch backend: ranks of torch.distributed on GPUs, and of messages on CPUs. Imports no torch until it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import AT_RUN, Backend, BackendOptions, RankModel, Reference
from kraken_compiler.errors import UsageError

if TYPE_CHECKING:
    from kraken_compiler.ir.program import LaneProgram
    from kraken_compiler.ir.schedule import Window
    from kraken_compiler.ir.source_reader import SourceReader
    from kraken_compiler.latency.predict import RunGraphs
    from kraken_compiler.progress import Advance
    from kraken_compiler.ranks.session import Ranks


@dataclass(frozen=True, kw_only=True)
class TorchOptions(BackendOptions):
    """The options of the torch backend."""

    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda, for --backend torch. (default: cuda if every rank can have a device)"),
        AT_RUN,
    ] = None
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the program with torch.compile first, for --backend torch or vllm."),
        AT_RUN,
    ] = False

    def check(self) -> None:
        """See `BackendOptions.check`."""
        if self.device not in (None, "cpu", "cuda"):
            raise UsageError(f"--device {self.device}: choose cpu or cuda")


class TorchBackend(Backend[TorchOptions]):
    """The lane graph once, and the weights: lanes' own, and shared ones."""

    name: ClassVar[str] = "torch"
    writes_all_weights: ClassVar[bool] = True
    computes_in: ClassVar[tuple[str, ...]] = ("<eval_with_key>", "torch/distributed/", "torch/_ops.py")
    runs_lane_files: ClassVar[bool] = True
    Options = TorchOptions

    def write(
        self, program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
    ) -> tuple[Window, ...]:
        from kraken_compiler.backends.torch_dist.write.emit import write_lanes

        return write_lanes(program, read, directory, progress)

    def rank_files(self, artifact: Artifact, rank: int) -> Sequence[str]:
        from kraken_compiler.backends.lane_graph.lane_files import rank_files

        return rank_files(artifact, rank)

    def open(self, artifact: Artifact, ranks: Ranks, *, checking: bool = False) -> RankModel:
        from kraken_compiler.backends.torch_dist.run.model import TorchModel

        return TorchModel(artifact, ranks, self.options)

    def reference(self, artifact: Artifact, lanes: Reference | None = None) -> Reference:
        from kraken_compiler.backends.lane_graph.lane_files import read_weights
        from kraken_compiler.backends.torch_dist.lanes import load_program

        program = load_program(artifact)
        return Reference(program, read_weights(artifact, program.degree))

    def run_graphs(self, artifact: Artifact) -> RunGraphs | None:
        from kraken_compiler.backends.torch_dist.cached_graphs import CachedGraphs
        from kraken_compiler.latency.predict import RunGraphs

        if artifact.manifest.cache is None:
            return None
        cached = CachedGraphs.load(artifact)
        return RunGraphs(
            step=cached.step.graph,
            split=cached.split.graph if cached.split is not None else None,
            tables=cached.tables.graph if cached.tables is not None else None,
            weights=artifact.manifest.weight_table,
            ids=cached.inputs[0].name,
            plan=cached.plan,
            degree=artifact.manifest.degree,
        )

    def schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
        from kraken_compiler.backends.torch_dist.lanes import load_program

        program = load_program(artifact)
        return check_schedule(program.module, program.plan)

    def split_schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
        from kraken_compiler.backends.lane_graph.graph_file import load_graph
        from kraken_compiler.backends.lane_graph.lane_files import ROWS_FILE, SPLIT_FILE

        cache, rows = artifact.manifest.cache, artifact.manifest.rows
        if rows is not None:
            return check_schedule(load_graph(artifact.path(ROWS_FILE)), rows.plan)
        if cache is not None and cache.split is not None:
            return check_schedule(load_graph(artifact.path(SPLIT_FILE)), cache.split.plan)
        return ()
