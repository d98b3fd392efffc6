"""The ONNX backend: a device's whole program in a file, which ONNX Runtime computes. Imports no torch, nor onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import AT_RUN, Backend, BackendOptions, RankModel, Reference
from kraken_compiler.backends.onnx_ort.format import COLLECTIVE_KINDS, OWN, WEIGHT_KINDS, device_path, weight_files
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY

if TYPE_CHECKING:
    from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
    from kraken_compiler.ir.program import LaneProgram
    from kraken_compiler.ir.schedule import RanWindow, Window
    from kraken_compiler.ir.source_reader import SourceReader
    from kraken_compiler.progress import Advance
    from kraken_compiler.ranks.session import Ranks


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(BackendOptions):
    """The options of the ONNX backend."""

    collectives: Annotated[
        str,
        typer.Option(
            help="What sums on ONNX devices: kraken (run by kraken-run) or ort-nccl (ops of ONNX Runtime builds with "
            "NCCL; written, not run)."
        ),
    ] = OWN
    onnx_weights: Annotated[
        str | None,
        typer.Option(
            help="Quantize the weights of the ONNX devices' matrix products: int8 or int4. (default: as they are)"
        ),
    ] = None
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ONNX Runtime's execution provider, for --backend onnx. (default: CPUExecutionProvider)",
        ),
        AT_RUN,
    ] = None

    def check(self) -> None:
        """See `BackendOptions.check`."""
        if self.collectives not in COLLECTIVE_KINDS:
            raise UsageError(f"--collectives {self.collectives}: choose from {', '.join(COLLECTIVE_KINDS)}")
        if self.onnx_weights is not None and self.onnx_weights not in WEIGHT_KINDS:
            raise UsageError(f"--onnx-weights {self.onnx_weights}: choose from {', '.join(WEIGHT_KINDS)}")


class OnnxBackend(Backend[OnnxOptions]):
    """`device-0.onnx` to `device-(N-1).onnx`, whose weights are in the lane files, or in files of their own."""

    name: ClassVar[str] = "onnx"
    Options = OnnxOptions
    ranks_are: ClassVar[str] = "ONNX devices"
    computes_in: ClassVar[tuple[str, ...]] = ("onnxruntime/",)

    def write(
        self, program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
    ) -> tuple[Window, ...]:
        from kraken_compiler.backends.onnx_ort.write.emit import write_devices

        return write_devices(program, read, directory, self.options, progress)

    def rank_files(self, artifact: Artifact, rank: int) -> Sequence[str]:
        weights = (f"{LANES_DIRECTORY}/{name}" for name in weight_files(rank))
        return [device_path(rank), *(name for name in weights if name in artifact.manifest.files)]

    def open(self, artifact: Artifact, ranks: Ranks, *, checking: bool = False) -> RankModel:
        from kraken_compiler.backends.onnx_ort.run.model import OnnxModel

        return OnnxModel(self._device(artifact, ranks.rank), artifact.manifest, ranks, self.options, checking=checking)

    def reference(self, artifact: Artifact, lanes: Reference | None = None) -> Reference | None:
        if lanes is None or self.options.onnx_weights is None:
            return lanes
        from kraken_compiler.backends.onnx_ort.check.quantized_lanes import read_as_quantized

        return Reference(lanes.program, read_as_quantized(self._device(artifact, 0), lanes.read_lane))

    def schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        import onnx_ir

        from kraken_compiler.backends.onnx_ort.check.graph_windows import measure_windows

        manifest = artifact.manifest
        models = [self._device(artifact, lane) for lane in range(manifest.degree)]
        for lane, model in enumerate(models):
            if (model.lane, model.degree) != (lane, manifest.degree) or model.program != models[0].program:
                raise InputFileError(f"{model.path}: is not device {lane} of {manifest.degree} of this compile")
        if self.cannot_run:
            return ()
        # One device has nobody to add up with, so its model keeps none of the planned reduces.
        plan = manifest.plan if manifest.degree > 1 else None
        return measure_windows(onnx_ir.from_proto(models[0].proto).graph, plan)

    def split_schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        from kraken_compiler.backends.onnx_ort.check.graph_windows import measure_halves, measure_rows

        manifest = artifact.manifest
        if self.cannot_run:
            return ()
        if manifest.rows is not None and manifest.degree > 1:
            return measure_rows(self._device(artifact, 0).proto, manifest.rows.plan)
        if manifest.cache is not None and manifest.cache.split is not None:
            return measure_halves(self._device(artifact, 0).proto, manifest.cache.split)
        return ()

    def ran(self, record: Any, windows: Sequence[Window]) -> tuple[RanWindow, ...]:
        from kraken_compiler.backends.onnx_ort.check.check_run import ran_windows
        from kraken_compiler.backends.onnx_ort.run.events import events_from

        return ran_windows(events_from(record), windows) if record is not None else ()

    @property
    def cannot_run(self) -> str:
        if self.options.collectives == OWN:
            return ""
        return "the ONNX devices hold collectives of ONNX Runtime builds with NCCL: checked against schemas, not run"

    @property
    def rounded_weights(self) -> str | None:
        return self.options.onnx_weights

    def _device(self, artifact: Artifact, lane: int) -> DeviceModel:
        from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel

        return DeviceModel.load(artifact.path(device_path(lane)), verify=False)
