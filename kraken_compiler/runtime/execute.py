"""Runs functions and compiled programs on real ranks and brings the results back, for verification and tests."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.events import Event, read_events
from kraken_compiler.errors import UsageError
from kraken_compiler.runtime.import_path import folder_of
from kraken_compiler.runtime.launch import launch
from kraken_compiler.runtime.replay import capacities, replay
from kraken_compiler.runtime.session import DEFAULT_TIMEOUT, Session, load_rank_program


def run_ranks(
    function_path: str,
    degree: int,
    payload: Mapping[str, Any] | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[Any]:
    """Call a function on `degree` local ranks that form a process group.

    Args:
        function_path: "package.module:function"; called as `function(payload, session)` on every rank.
        degree: Number of ranks.
        payload: JSON; large data goes through files that it names.
        timeout: Seconds without progress (`session.status.progress`) after which a rank counts as hanging.

    Returns:
        What each rank returned (JSON), rank 0 first.

    Raises:
        RankFailedError: A rank died or hung; its own traceback comes first.
        InputFileError, UsageError: A rank raised one.
    """
    with tempfile.TemporaryDirectory(prefix="kraken-ranks-") as name:
        directory = Path(name)
        (directory / "payload.json").write_text(json.dumps(payload or {}))
        launch(
            degree,
            [function_path, name, folder_of(function_path.partition(".")[0])],
            module="kraken_compiler.runtime.call_rank",
            timeout=timeout,
            show_output=False,
        )
        return [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(degree)]


@dataclass(frozen=True)
class Executed:
    """What the ranks of an artifact computed.

    Attributes:
        outputs: `outputs[rank][set]` is the tuple of the graph's outputs.
        replayed: `replayed[rank][set]` are the logits of `replay`, by capacity; empty for a program without a KV cache.
        sums: `sums[rank][set]` are the finished sums by the name of their wait; of ONNX devices only.
        events: `events[rank]` is what the rank did on the last set, in order; of ONNX devices only.
    """

    outputs: list[list[tuple[Tensor, ...]]]
    replayed: list[list[dict[int, Tensor]]]
    sums: list[list[dict[str, Tensor]]] = field(default_factory=list)
    events: list[tuple[Event, ...]] = field(default_factory=list)


def execute_on_ranks(
    artifact_directory: Path | str,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    backend: str = "torch",
    timeout: float = DEFAULT_TIMEOUT,
) -> Executed:
    """Run an artifact's real programs, one process per lane: on whole inputs, and with the KV cache if there is one.

    Of an ONNX program with a KV cache the only output is the logits.

    Starting ranks takes seconds, so give all input sets at once.

    Args:
        artifact_directory: The artifact.
        inputs: Input sets; each maps the names of the manifest's inputs to tensors.
        backend: Whose programs.
        timeout: Seconds without progress after which a rank counts as hanging.

    Raises:
        UsageError: An input set lacks an input.
        RankFailedError: A rank died or hung; its own traceback comes first.
        InputFileError: A file of the artifact is missing, truncated or tampered with.
    """
    artifact = open_artifact(artifact_directory, verify=False)
    names = [spec.name for spec in artifact.manifest.inputs]
    for given in inputs:
        missing = [name for name in names if name not in given]
        if missing:
            raise UsageError(f"the program needs the inputs {', '.join(names)}; missing: {', '.join(missing)}")
    degree = artifact.manifest.degree
    with tempfile.TemporaryDirectory(prefix="kraken-execute-") as exchange:
        directory = Path(exchange)
        flat = {f"{index}.{name}": given[name] for index, given in enumerate(inputs) for name in names}
        save_file({key: tensor.contiguous().clone() for key, tensor in flat.items()}, directory / "in.safetensors")
        payload = {
            "artifact": str(Path(artifact_directory).absolute()),
            "exchange": exchange,
            "names": names,
            "sets": len(inputs),
        }
        functions = {"torch": f"{__name__}:_execute", "onnx": "kraken_compiler.runtime.execute_onnx:execute"}
        counts = run_ranks(functions[backend], degree, payload, timeout=timeout)
        executed = Executed([], [])
        for rank, count in enumerate(counts):
            tensors = load_file(directory / f"out-{rank}.safetensors")
            executed.outputs.append(
                [tuple(tensors[f"{index}.{output}"] for output in range(count)) for index in range(len(inputs))]
            )
            executed.replayed.append(
                [
                    {int(name): value for name, value in _with_prefix(tensors, f"{index}.replayed.").items()}
                    for index in range(len(inputs))
                ]
            )
            executed.sums.append([_with_prefix(tensors, f"{index}.sum.") for index in range(len(inputs))])
            events = directory / f"events-{rank}.json"
            if events.exists():
                executed.events.append(read_events(events))
        return executed


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _execute(payload: Mapping[str, Any], session: Session) -> int:
    """One rank's part of `execute_on_ranks`; returns the number of outputs."""
    directory = Path(payload["exchange"])
    artifact, program = load_rank_program(payload["artifact"], session)
    cache = artifact.manifest.cache
    tensors = load_file(directory / "in.safetensors", device=str(session.device))
    results: dict[str, Tensor] = {}
    count = 0
    with torch.inference_mode():
        for index in range(payload["sets"]):
            outputs = program.run_flat([tensors[f"{index}.{name}"] for name in payload["names"]])
            count = len(outputs)
            for position, output in enumerate(outputs):
                results[f"{index}.{position}"] = output.contiguous().clone().cpu()
            session.status.progress("executing")
            if cache is None:
                continue
            ids = tensors[f"{index}.{payload['names'][0]}"]
            for capacity in capacities(ids.shape[1], cache.plan.limit):
                results[f"{index}.replayed.{capacity}"] = replay(program.decoder(len(ids), capacity), ids).cpu()
                session.status.progress("decoding")
    save_file(results, directory / f"out-{session.rank}.safetensors")
    return count
