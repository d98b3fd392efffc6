"""One rank's part of `execute_on_ranks` for an artifact's ONNX devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.array_decoder import Array, ArrayDecoder
from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.events import write_events
from kraken_compiler.backends.onnx_ort.feeds import whole_feeds
from kraken_compiler.backends.onnx_ort.format import device_path
from kraken_compiler.backends.rank_claims import rank_claims
from kraken_compiler.communicators.agreement import Claims
from kraken_compiler.communicators.arrays import ArrayCommunicator
from kraken_compiler.runtime.environment import collective_timeout
from kraken_compiler.runtime.replay import capacities, replay
from kraken_compiler.runtime.session import Session


class TensorDecoder:
    """An `ArrayDecoder` whose ids and logits are tensors, as `replay` has them."""

    def __init__(self, decoder: ArrayDecoder) -> None:
        self._decoder = decoder
        self.batch, self.capacity = decoder.batch, decoder.capacity
        self.identical_on_all_ranks = decoder.identical_on_all_ranks

    def reset(self) -> None:
        self._decoder.reset()

    def prefill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return torch.from_numpy(self._decoder.prefill(ids.numpy(), lengths.numpy()).copy())

    def step(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self._decoder.step(tokens.numpy()).copy())


def execute(payload: Mapping[str, Any], session: Session) -> int:
    """Run this rank's device on every input set; returns the number of outputs."""
    directory = Path(payload["exchange"])
    artifact = open_artifact(payload["artifact"], verify=False)
    model = DeviceModel.load(artifact.path(device_path(session.rank)), verify=False)
    # Products that round what they multiply could only be compared loosely; what that costs is in the quality.
    model = model.with_exact_products()
    communicator = ArrayCommunicator.from_environment(
        timeout=collective_timeout(None), claims=Claims(rank_claims(artifact, "onnx"))
    )
    program = DeviceProgram(model, communicator, profiled=True)
    tensors = load_file(directory / "in.safetensors")
    results: dict[str, Tensor] = {}
    count = 0
    for index in range(payload["sets"]):
        given = {name: tensors[f"{index}.{name}"].numpy() for name in payload["names"]}
        feeds = whole_feeds(model, given)
        sums: dict[str, Array] = {}
        if index + 1 < payload["sets"]:
            outputs = program.run(feeds, sums=sums)
        else:
            # The last one, because a first run also pays for reading the weights.
            outputs, events = program.run_profiled(feeds, sums=sums)
            write_events(events, directory / f"events-{session.rank}.json")
        wanted = [name for name in outputs if not name.startswith("present.")]
        count = len(wanted)
        for position, name in enumerate(wanted):
            results[f"{index}.{position}"] = torch.from_numpy(np.array(outputs[name]))
        results |= {f"{index}.sum.{name}": torch.from_numpy(value) for name, value in sums.items()}
        session.status.progress("executing")
    for index in range(payload["sets"] if model.caches is not None else 0):
        ids = tensors[f"{index}.{payload['names'][0]}"]
        for capacity in capacities(ids.shape[1], model.positions):
            decoder = ArrayDecoder(program, len(ids), capacity)
            results[f"{index}.replayed.{capacity}"] = replay(TensorDecoder(decoder), ids)
            session.status.progress("decoding")
    save_file(results, directory / f"out-{session.rank}.safetensors")
    communicator.close()
    return count
