"""A device's ONNX program as its backend opens it, and as anybody opens a device file. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.backends.base import Array, Observation, RankModel
from kraken_compiler.backends.onnx_ort.format import LOGITS, PRESENT_PREFIX
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import CPU_PROVIDER, DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.backends.onnx_ort.run.gathered_outputs import is_gathered
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.rows import RowDims
from kraken_compiler.ranks.communicators.agreement import Claims
from kraken_compiler.ranks.environment import DEFAULT_TIMEOUT, Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks, connected

if TYPE_CHECKING:
    from kraken_compiler.backends.onnx_ort.backend import OnnxOptions

_PROGRAM = "the program in the device files"


class OnnxModel(RankModel):
    """A device's program; see `RankModel`.

    Attributes:
        program: What runs the device file.
    """

    def __init__(
        self, device: DeviceModel, manifest: Manifest, ranks: Ranks, options: OnnxOptions, *, checking: bool = False
    ) -> None:
        """Open it.

        Args:
            device: The device file.
            manifest: The artifact's.
            ranks: This rank.
            options: What was chosen.
            checking: It is run to be compared: products that round what they multiply could only be compared loosely,
                and what that costs is in the quality.

        Raises:
            UsageError: There is no such provider here.
            InputFileError: ONNX Runtime does not take the file.
        """
        provider = options.provider or CPU_PROVIDER
        ranks.status.computes_here = provider == CPU_PROVIDER
        self.setting = f"onnx {provider}"
        self.program = DeviceProgram(
            device.with_exact_products() if checking else device, ranks, provider=provider, profiled=checking
        )
        cached = device.caches is not None
        self._can_split = manifest.cache is not None and manifest.cache.split is not None
        self._rows: RowDims | None = None
        if manifest.rows is not None and device.degree > 1:
            rows = manifest.rows.dims
            # With a KV cache the model gives the logits alone.
            self._rows = replace(rows, outputs=(rows.outputs[manifest.call.logits],)) if cached else rows
        self.can_cut_rows = self._rows is not None
        self._names = [spec.name for spec in manifest.inputs]
        logits = LOGITS if cached else manifest.call.output_names[manifest.call.logits]
        self.identical_on_all_ranks = is_gathered(device.proto.graph, logits)
        dims = self.program.outputs[logits].type.tensor_type.shape.dim
        self.vocabulary: int | None = (dims[-1].dim_value or None) if dims else None
        self.positions = sys.maxsize if device.positions is None else device.positions

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """See `RankModel.run`."""
        return self._outputs(self.program.run(self._feeds(inputs)))

    def run_rows(self, inputs: Mapping[str, Array], cut: int) -> Sequence[Array]:
        """See `RankModel.run_rows`."""
        assert self._rows is not None, "nothing says where the rows are"
        halves = self._rows.halves([inputs[name] for name in self._names], cut)
        feeds = [self._feeds(dict(zip(self._names, half, strict=True))) for half in halves]
        first, second = map(self._outputs, self.program.run_batches(feeds))
        return self._rows.joined(first, second, np.concatenate)

    def observe(self, inputs: Mapping[str, Array], *, last: bool) -> Observation:
        """See `RankModel.observe`. The last run is profiled, because a first one also pays for reading the weights."""
        feeds, sums = self._feeds(inputs), dict[str, Array]()
        if not last:
            return Observation(self._outputs(self.program.run(feeds, sums=sums)), sums)
        outputs, events = self.program.run_profiled(feeds, sums=sums)
        return Observation(self._outputs(outputs), sums, [asdict(event) for event in events])

    def decoder(self, batch: int, capacity: int) -> ArrayDecoder:
        """See `RankModel.decoder`."""
        return ArrayDecoder(self.program, batch, capacity, can_split=self._can_split)

    def _feeds(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        model_inputs = {name: inputs[name] for name in self._names if name in inputs}
        return whole_feeds(self.program.model, model_inputs)

    def _outputs(self, outputs: Mapping[str, Array]) -> list[Array]:
        return [array for name, array in outputs.items() if not name.startswith(PRESENT_PREFIX)]


@contextmanager
def open_device(
    path: Path | str,
    *,
    provider: str = CPU_PROVIDER,
    threads: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> Iterator[DeviceProgram]:
    """Open one device's file; the processes with the files of the other devices must do so together.

    The environment variables `RANK` and `WORLD_SIZE` say which device this is, and `KRAKEN_MEET` (HOST:PORT of device
    0) where they meet; a model of one device needs none of them.

    Args:
        path: The file.
        provider: ONNX Runtime's name of what computes.
        threads: How many threads may compute; None takes `OMP_NUM_THREADS`, or else this device's share of the cores.
        timeout: Seconds without an answer after which another device counts as dead.

    Yields:
        What runs it: `run` takes arrays by name and returns arrays by name.

    Raises:
        InputFileError: The file, or the one with its weights, is missing, damaged, or of another version.
        UsageError: There is no such provider here, or the processes do not fit together.
        RankFailedError: Another device's process did not come in time, or went away.
    """
    model = DeviceModel.load(path)
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != str(model.degree):
        raise UsageError(
            f"{model.path} is one of {model.degree} devices, WORLD_SIZE is {world_size}; "
            f"start {model.degree} processes, or compile for degree {world_size}"
        )
    place = Place.from_environment() if model.degree > 1 else Place.alone()
    with connected(place, StatusWriter(place.rank, None), timeout) as ranks:
        ranks.agree(Claims({_PROGRAM: model.program}))
        program = DeviceProgram(model, ranks, provider=provider, threads=threads)
        # Here and not at the first reduce, where waiting for a slow disk would look like a hang.
        ranks.barrier()
        yield program
