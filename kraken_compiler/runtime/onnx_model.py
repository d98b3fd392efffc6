"""A device's ONNX program, opened beside its peers, and as the engine uses it. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kraken_compiler.backends.onnx_ort.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.device_program import CPU_PROVIDER, DeviceProgram
from kraken_compiler.backends.onnx_ort.format import LOGITS
from kraken_compiler.communicators.agreement import Claims
from kraken_compiler.communicators.arrays import ArrayCommunicator
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.runtime.decoder import Array, Decoder, RecomputingDecoder, decoder_of_sources
from kraken_compiler.runtime.derived_inputs import Derived, derived_input, no_language_model, reads_source
from kraken_compiler.runtime.environment import DEFAULT_TIMEOUT
from kraken_compiler.size_checks import require_sizes

_PROGRAM = "the program in the device files"


@contextmanager
def open_device(
    path: Path | str,
    *,
    provider: str = CPU_PROVIDER,
    threads: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> Iterator[DeviceProgram]:
    """Open one device's file; the processes with the files of the other devices must do so together.

    Which device this is say the environment variables `RANK` and `WORLD_SIZE`, where they meet `KRAKEN_MEET` (HOST:PORT
    of device 0); a model of one device needs none of them.

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
    with joined(model, timeout=timeout) as communicator:
        program = DeviceProgram(model, communicator, provider=provider, threads=threads)
        if communicator is not None:
            # Here and not at the first reduce, where waiting for a slow disk would look like a hang.
            communicator.barrier()
        yield program


@contextmanager
def joined(
    model: DeviceModel,
    *,
    timeout: float,
    reduce_dtype: npt.DTypeLike | None = None,
    same: Mapping[str, str] | None = None,
) -> Iterator[ArrayCommunicator | None]:
    """Connect a device with the others; all come and leave together.

    Args:
        model: This device's.
        timeout: Seconds without an answer after which a peer counts as dead.
        reduce_dtype: To which each device's part of a sum is rounded before it is sent; None leaves it.
        same: What else must be the same on all devices, by a name for the error message.

    Yields:
        The connections; None for a model of one device.

    Raises:
        UsageError: The environment names another device, or the devices do not fit together.
        InputFileError: They belong to different artifacts.
        RankFailedError: A peer did not come in time, or went away.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(model.degree):
        raise UsageError(
            f"{model.path} is one of {model.degree} devices, WORLD_SIZE is {started}; "
            f"start {model.degree} processes, or compile for degree {started}"
        )
    if model.degree == 1:
        yield None
        return
    communicator = ArrayCommunicator.from_environment(
        timeout=timeout, claims=Claims({**(same or {}), _PROGRAM: model.program}), reduce_dtype=reduce_dtype
    )
    try:
        yield communicator
        # A device that leaves early would look like a dead one to peers that still compute.
        communicator.barrier()
    finally:
        communicator.close()


class OnnxModel:
    """A device's program as a language model.

    Attributes:
        vocabulary: Number of tokens the model knows, None if its graph does not say.
        positions: The longest sequence that the model takes, as far as its graph says.
        reads_source: True for an encoder-decoder, whose prompts are read by its encoder.
    """

    def __init__(self, program: DeviceProgram, inputs: Sequence[InputSpec], call: CallSpec) -> None:
        """Wrap a program.

        Args:
            program: This device's.
            inputs, call: How the program is called if it has no KV cache.
        """
        self._program, self._inputs, self._call = program, inputs, call
        self.reads_source = reads_source(inputs)
        cached = program.model.caches is not None
        self._logits = LOGITS if cached else call.output_names[call.logits]
        shape = program.outputs[self._logits].type.tensor_type.shape.dim
        self.vocabulary: int | None = (shape[-1].dim_value or None) if shape else None
        positions = program.model.positions
        self.positions = sys.maxsize if positions is None else positions

    def decoder(
        self, batch: int, capacity: int, *, compiled: bool = False, sources: Sequence[Sequence[int]] = ()
    ) -> Decoder[Array]:
        """Room for a batch of rows.

        Args:
            batch: Number of rows.
            capacity: Most tokens of a row, prompt and new ones together.
            compiled: Must be False: ONNX Runtime has nothing to compile.
            sources: Token ids of the text that an encoder-decoder reads, for every row.

        Raises:
            UsageError: The positions end before the capacity, or the program is no language model.
        """
        assert not compiled, "refused with the options"
        if self._program.model.caches is not None:
            return ArrayDecoder(self._program, batch, capacity)
        if self.reads_source:
            return decoder_of_sources(self._logits_function(), sources, capacity)
        return RecomputingDecoder(self._logits_function(), batch, capacity)

    def _logits_function(self) -> Callable[..., Array]:
        """Token ids [batch, sequence] -> logits [batch, sequence or 1, vocabulary], until the next call.

        That of an encoder-decoder takes the ids of the text that the encoder reads as well.
        """
        kinds = [(spec, derived_input(spec, self._inputs)) for spec in self._inputs]

        def logits_of(ids: Array, source: Array | None = None) -> Array:
            texts = {Derived.SOURCE: ids if source is None else source}
            given = {spec.name: _derive(spec, kind, texts.get(kind, ids)) for spec, kind in kinds}
            require_sizes(self._call, self._inputs, [array.shape for array in given.values()])
            feeds = {name: array for name, array in given.items() if name in self._program.inputs}
            logits = self._program.run(feeds)[self._logits]
            if logits.ndim != 3:
                raise no_language_model(self._logits, logits.ndim)
            return logits

        return logits_of


def _derive(spec: InputSpec, kind: Derived, ids: Array) -> Array:
    dtype = np.dtype(spec.dtype)
    if kind in (Derived.IDS, Derived.SOURCE):
        return np.ascontiguousarray(ids, dtype)
    if kind is Derived.ONES:
        return np.ones(ids.shape, dtype)
    positions = np.arange(ids.shape[1], dtype=dtype)
    return positions if len(spec.shape) == 1 else np.ascontiguousarray(np.broadcast_to(positions, ids.shape))
