"""The vLLM backend: lane programs as a model of the serving engine vLLM. Imports no torch until it is used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import (
    AT_RUN,
    Backend,
    BackendOptions,
    EngineSettings,
    OwnEngine,
    RankModel,
    Reference,
)
from kraken_compiler.backends.vllm.format import RECORD_FILE, rank_files, read_record

if TYPE_CHECKING:
    from kraken_compiler.artifact.manifest import Source
    from kraken_compiler.ir.program import LaneProgram
    from kraken_compiler.ir.schedule import Window
    from kraken_compiler.ir.source_reader import SourceReader
    from kraken_compiler.progress import Advance
    from kraken_compiler.ranks.session import Ranks


@dataclass(frozen=True, kw_only=True)
class VllmOptions(BackendOptions):
    """The options of the vLLM backend."""

    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the program with torch.compile first, for --backend torch or vllm."),
        AT_RUN,
    ] = False


class VllmBackend(Backend[VllmOptions]):
    """The step graph on many sequences in one row, cut before the head, and a config by which vLLM finds the model."""

    name: ClassVar[str] = "vllm"
    ranks_are: ClassVar[str] = "lanes as vLLM runs them"
    computes_in: ClassVar[tuple[str, ...]] = ("<eval_with_key>", "torch/_ops.py")
    runs_lane_files: ClassVar[bool] = True
    Options = VllmOptions

    def write(
        self, program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
    ) -> tuple[Window, ...]:
        from kraken_compiler.backends.vllm.write.emit import write_engine_files

        return write_engine_files(program, read, directory, progress)

    def complete(self, program: LaneProgram, source: Source, directory: Path) -> None:
        from kraken_compiler.backends.vllm.write.root_files import write_root_files

        write_root_files(program, read_record(directory / RECORD_FILE), source, directory)

    def rank_files(self, artifact: Artifact, rank: int) -> Sequence[str]:
        return rank_files(artifact, rank)

    def open(self, artifact: Artifact, ranks: Ranks, *, checking: bool = False) -> RankModel:
        from kraken_compiler.backends.vllm.check.stub_model import StubModel

        # Only to be compared: else vLLM runs them, see `engine`.
        return StubModel(artifact, ranks)

    def engine(self, artifact: Artifact, settings: EngineSettings) -> AbstractContextManager[OwnEngine]:
        from kraken_compiler.backends.vllm.run.environment import require_vllm

        require_vllm("--backend vllm")
        from kraken_compiler.backends.vllm.run.engine import vllm_engine

        return vllm_engine(artifact, settings, compiled=self.options.compile)

    def reference(self, artifact: Artifact, lanes: Reference | None = None) -> Reference | None:
        # The graph of a lane program is not kept, its weights are.
        if lanes is None:
            return None
        from kraken_compiler.backends.lane_graph.lane_files import read_weights

        return Reference(lanes.program, read_weights(artifact, lanes.program.degree))

    def schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
        from kraken_compiler.backends.lane_graph.graph_file import load_graph
        from kraken_compiler.backends.vllm.format import BODY_FILE

        return check_schedule(load_graph(artifact.path(BODY_FILE)), artifact.manifest.plan)
