"""A rank that generates text with ONNX Runtime; see `onnx_worker`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.device_program import CPU_PROVIDER, DeviceProgram
from kraken_compiler.backends.onnx_ort.format import device_path, weight_files
from kraken_compiler.backends.rank_claims import rank_claims
from kraken_compiler.communicators.agreement import Claims
from kraken_compiler.communicators.arrays import ArrayCommunicator
from kraken_compiler.communicators.meeting import GRACE_SECONDS
from kraken_compiler.errors import KrakenError, UsageError
from kraken_compiler.runtime.choose_backend import require_backend
from kraken_compiler.runtime.engine import Engine
from kraken_compiler.runtime.environment import SLOWEST_DISK, Place, collective_timeout
from kraken_compiler.runtime.onnx_model import OnnxModel, joined
from kraken_compiler.runtime.options import RunOptions
from kraken_compiler.runtime.speak import speak
from kraken_compiler.runtime.status import StatusWriter
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY

_START_SECONDS = 90.0


@dataclass(frozen=True)
class DeviceSession:
    """This process as a rank.

    Attributes:
        place: Which one it is.
        status: Where to report progress.
        communicator: Joins it to the others; None for a single one.
    """

    place: Place
    status: StatusWriter
    communicator: ArrayCommunicator | None

    @property
    def rank(self) -> int:
        """Number among all ranks."""
        return self.place.rank

    @property
    def degree(self) -> int:
        """How many there are."""
        return self.place.degree

    @property
    def one_machine(self) -> bool:
        """True if all ranks are here."""
        return self.place.one_machine

    def broadcast(self, content: bytes | None) -> bytes:
        """Rank 0's content, on every rank; see `engine.RankSession`."""
        if self.communicator is not None:
            return self.communicator.broadcast(content)
        assert content is not None, "the only rank is rank 0"
        return content


def run_rank(options: RunOptions) -> None:
    """Be a rank until all is generated; rank 0 prints the result, and nothing else, to standard output.

    Raises:
        UsageError: The environment does not say which rank this is, or the options ask for what cannot be done.
        InputFileError: A file of the artifact is missing, truncated or tampered with, or the ranks have different ones.
        RankFailedError: A peer did not come in time, or went away.
    """
    options.check()
    place = Place.from_environment()
    with _reported(place) as status:
        with _told(place, status):
            artifact = open_artifact(options.artifact, verify=False)
            require_backend("onnx", options, artifact)
            model = _load(artifact, place, status)
        # All read their weights at the same time, so the slowest one's time is the most that the others wait.
        status.progress("waiting for the other ranks", extra=_START_SECONDS + _seconds_to_read(artifact, place))
        timeout = collective_timeout(options.timeout)
        same = rank_claims(artifact, "onnx", options.reduce_dtype)
        reduce_dtype = _numpy_dtype(options.reduce_dtype)
        with joined(model, timeout=timeout, reduce_dtype=reduce_dtype, same=same) as communicator:
            status.progress("loading the program")
            provider = options.provider or CPU_PROVIDER
            status.computes_here = provider == CPU_PROVIDER
            program = DeviceProgram(model, communicator, provider=provider, threads=options.threads)
            if communicator is not None:
                communicator.barrier()
            status.progress("running")
            language_model = OnnxModel(program, artifact.manifest.inputs, artifact.manifest.call)
            engine = Engine(artifact, language_model, DeviceSession(place, status, communicator))
            if place.rank == 0:
                speak(engine, options)
                engine.end()
            else:
                engine.follow()
            status.progress("leaving")


@contextmanager
def _reported(place: Place) -> Iterator[StatusWriter]:
    """Tell the launcher, if there is one, that this rank lives, and how it ends."""
    status = StatusWriter.from_environment(place.rank)
    status.start()
    try:
        yield status
    except BaseException as error:
        status.fail(error)
        raise
    status.finish()


@contextmanager
def _told(place: Place, status: StatusWriter) -> Iterator[None]:
    """Tell the other ranks why this one cannot come; a launcher of ours ends them without being told."""
    try:
        yield
    except KrakenError as error:
        if place.degree > 1 and not status.has_launcher:
            # Whether or not they could be told, the error is what it is.
            with suppress(KrakenError):
                ArrayCommunicator.from_environment(timeout=GRACE_SECONDS, claims=Claims(trouble=error))
        raise


def _load(artifact: Artifact, place: Place, status: StatusWriter) -> DeviceModel:
    """This rank's device file, checked before anything in it is used."""
    degree = artifact.manifest.degree
    if place.degree != degree:
        raise UsageError(
            f"the program has {degree} lanes and {place.degree} rank{'s' * (place.degree != 1)} were started; "
            f"start {degree}, or compile for degree {place.degree}"
        )
    status.progress("reading the device file", extra=_seconds_to_read(artifact, place))
    name = device_path(place.rank)
    artifact.verify(name, *_weight_files(artifact, place))
    return DeviceModel.load(artifact.path(name), verify=False)


def _seconds_to_read(artifact: Artifact, place: Place) -> float:
    """How long reading and hashing the weights may take; all ranks' files are of about the same size."""
    return sum(artifact.manifest.files[name].bytes for name in _weight_files(artifact, place)) / SLOWEST_DISK


def _weight_files(artifact: Artifact, place: Place) -> list[str]:
    """Its own weights, and those that it shares with the others."""
    names = (f"{LANES_DIRECTORY}/{name}" for name in weight_files(place.rank))
    return [name for name in names if name in artifact.manifest.files]


def _numpy_dtype(name: str | None) -> np.dtype[Any] | None:
    if name is None:
        return None
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # numpy itself does not have it

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
