"""One rank without torch: meets the others, then does what the parent says."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ttft_parts.contenders import BOUND, Contender, named
from ttft_parts.rank_loop import RankLoop, run_rank

from kraken_compiler.backends.onnx_ort.format import device_path
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks

Array = npt.NDArray[Any]

COLLECTIVE_TIMEOUT = 600.0
_PIECE_BYTES = 1_000_000


class NoArrayCommunication:
    """Sends nothing: a "sum" is the rank's own part. The bound, WRONG RESULTS on purpose."""

    def __init__(self, rank: int, degree: int) -> None:
        self.rank = rank
        self.degree = degree

    def start(self, x: Array) -> Array:
        return x

    def wait(self, handle: Array) -> Array:
        return handle

    def all_gather(self, x: Array, axis: int) -> Array:
        return np.concatenate([x] * self.degree, axis)


class OneSequence:
    """An `ArrayDecoder` for one sequence."""

    def __init__(self, program: DeviceProgram, capacity: int, *, split: bool) -> None:
        self.decoder = ArrayDecoder(program, 1, capacity)
        self.decoder.split_from = 2 if split else None

    def reset(self) -> None:
        self.decoder.reset()

    def prefill(self, ids: Array) -> Array:
        return self.decoder.prefill(ids, np.array([ids.shape[1]]))

    def step(self, token: Array) -> Array:
        return self.decoder.step(token)


class Rank(RankLoop):
    """Runs our ONNX backend."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.artifacts = {name: Path(path) for name, path in settings["artifacts"].items()}
        self.communicator = Ranks.rendezvous(
            Place.from_environment(), StatusWriter(self.rank, None), COLLECTIVE_TIMEOUT
        )
        self.programs: dict[str, DeviceProgram] = {}

    def make(self, contender: Contender, capacity: int) -> OneSequence:
        if contender.family not in self.programs:
            self.programs[contender.family] = self._load(contender)
        decoder = OneSequence(self.programs[contender.family], capacity, split=contender.split)
        if "torch" in sys.modules:
            raise RuntimeError("this rank was to do without torch, and something imported it")
        return decoder

    def _load(self, contender: Contender) -> DeviceProgram:
        assert contender.artifact is not None
        path = self.artifacts[contender.artifact] / device_path(self.rank)
        model = DeviceModel.load(path, verify=False)
        if contender.alone:
            return DeviceProgram(model)
        if contender.family == BOUND:
            return DeviceProgram(model, NoArrayCommunication(self.rank, self.degree))
        return DeviceProgram(model, self.communicator)

    def trace(self, contender: str) -> list[dict[str, Any]]:
        """The events of one prefill, by a decoder that was prepared."""
        program, decoder = self.programs[named(contender).family], self.decoders[contender]
        events: list[dict[str, Any]] = []
        run = program.run_parts
        program.run_parts = partial(run, trace=lambda event: events.append(asdict(event)))  # type: ignore[method-assign]
        try:
            decoder.reset()
            self.barrier()
            decoder.prefill(self.ids)
        finally:
            program.run_parts = run  # type: ignore[method-assign]
        return events

    def barrier(self) -> None:
        self.communicator.barrier()

    def tokens(self, values: list[Any]) -> Array:
        return np.array(values, np.int64)

    def as_array(self, logits: Any) -> npt.NDArray[np.float32]:
        return np.array(logits, np.float32)

    def measure_link(self, send_bytes: int, reduce_bytes: list[int]) -> dict[str, Any]:
        """Rate of one large message, and the time of sums, as the communicator reaches them."""
        # In pieces, as a communicator is used; copying a whole message would take as long as a fast link does.
        piece = bytes(_PIECE_BYTES) if self.rank == 0 else None
        rates = []
        for _ in range(3):
            self.barrier()
            began = time.perf_counter()
            for _ in range(send_bytes // _PIECE_BYTES):
                self.communicator.broadcast(piece)
            self.barrier()
            rates.append(send_bytes * 8 / (time.perf_counter() - began) / 1e9)
        sums = {str(size): self._sum_seconds(size) for size in reduce_bytes}
        return {"gbits": sorted(rates)[1], "all_reduce": sums}

    def _sum_seconds(self, size: int) -> float:
        values = np.zeros(max(1, size // 4), np.float32)
        seconds = []
        for _ in range(7):
            self.barrier()
            began = time.perf_counter()
            self.communicator.wait(self.communicator.start(values))
            seconds.append(time.perf_counter() - began)
        return sorted(seconds)[3]


if __name__ == "__main__":
    run_rank(Rank)
