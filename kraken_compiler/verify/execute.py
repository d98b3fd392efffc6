"""Runs compiled programs on real ranks and brings the results back, to be compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.base import Backend
from kraken_compiler.backends.open_model import open_model
from kraken_compiler.backends.registry import backend_of
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.decoder import CacheDecoder
from kraken_compiler.ranks.environment import DEFAULT_TIMEOUT
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.replay import capacities, cuts, replay, replay_halves, split_lengths

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Execution:
    """Outputs of an artifact's ranks. Arrays are numpy's; bfloat16 comes as float32.

    Attributes:
        outputs: `outputs[rank][set]` are the graph's outputs; of a program with a KV cache perhaps the logits alone.
        replays: `replays[rank][set]` are the logits of `replay`, by capacity; empty for a program without a KV cache.
        halves: `halves[rank][set]` are the logits of `replay_halves`, by cut; empty if nothing reads tokens as halves.
        rows: `rows[rank][set]` are the outputs by where the rows were cut; empty if nothing runs halves of rows.
        sums: `sums[rank][set]` are the finished sums by the name of their wait; empty if programs do not tell.
        records: `records[rank]` is what the rank did on the last set, for `Backend.ran`; None if it does not tell.
    """

    outputs: list[list[tuple[Array, ...]]]
    replays: list[list[dict[int, Array]]]
    halves: list[list[dict[int, Array]]]
    rows: list[list[dict[int, tuple[Array, ...]]]]
    sums: list[list[dict[str, Array]]]
    records: list[Any]


def execute_on_ranks(
    artifact_directory: Path | str,
    inputs: Sequence[Mapping[str, Array]],
    backend: str,
    *,
    timeout: float = DEFAULT_TIMEOUT,
) -> Execution:
    """Run an artifact's real programs, one process per lane: on whole inputs, and with the KV cache if there is one.

    Starting ranks takes seconds, so give all input sets at once.

    Args:
        artifact_directory: The artifact.
        inputs: Input sets; each maps the names of the manifest's inputs to arrays.
        backend: Name of the backend whose programs are run.
        timeout: Seconds without progress after which a rank counts as hanging.

    Raises:
        UsageError: An input set lacks an input.
        RankFailedError: A rank died or hung; its own traceback comes first.
        InputFileError: A file of the artifact is missing, truncated or tampered with.
    """
    artifact = open_artifact(artifact_directory, verify=False)
    names = [spec.name for spec in artifact.manifest.inputs]
    for input_set in inputs:
        missing_names = [name for name in names if name not in input_set]
        if missing_names:
            raise UsageError(f"the program needs the inputs {', '.join(names)}; missing: {', '.join(missing_names)}")
    with tempfile.TemporaryDirectory(prefix="kraken-execute-") as exchange:
        directory = Path(exchange)
        flat = {f"{index}.{name}": input_set[name] for index, input_set in enumerate(inputs) for name in names}
        save_file({key: np.ascontiguousarray(array) for key, array in flat.items()}, directory / "in.safetensors")
        payload = {
            "artifact": str(Path(artifact_directory).absolute()),
            "exchange": exchange,
            "backend": backend,
            "names": names,
            "sets": len(inputs),
        }
        summaries = run_ranks(f"{__name__}:_execute", artifact.manifest.degree, payload, timeout=timeout)
        execution = Execution([], [], [], [], [], [of_rank["record"] for of_rank in summaries])
        sets = range(len(inputs))
        for rank, of_rank in enumerate(summaries):
            arrays = load_file(_results(directory, rank))
            outputs = range(of_rank["outputs"])
            execution.outputs.append([tuple(arrays[f"{index}.{output}"] for output in outputs) for index in sets])
            execution.replays.append([_numbered(arrays, f"{index}.replayed.") for index in sets])
            execution.halves.append([_numbered(arrays, f"{index}.halves.") for index in sets])
            execution.rows.append([_outputs_by_cut(arrays, f"{index}.rows.", len(outputs)) for index in sets])
            execution.sums.append([_with_prefix(arrays, f"{index}.sum.") for index in sets])
        return execution


def _with_prefix(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _numbered(arrays: Mapping[str, Array], prefix: str) -> dict[int, Array]:
    return {int(name): array for name, array in _with_prefix(arrays, prefix).items()}


def _outputs_by_cut(arrays: Mapping[str, Array], prefix: str, count: int) -> dict[int, tuple[Array, ...]]:
    found = _with_prefix(arrays, prefix)
    cuts_in_order = sorted({int(name.partition(".")[0]) for name in found})
    return {cut: tuple(found[f"{cut}.{output}"] for output in range(count)) for cut in cuts_in_order}


def _execute(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """One rank's part of `execute_on_ranks`."""
    directory, sets = Path(payload["exchange"]), payload["sets"]

    def choose(artifact: Artifact) -> Backend[Any]:
        return backend_of(artifact, payload["backend"])

    artifact, model = open_model(payload["artifact"], ranks, choose, checking=True)
    arrays = load_file(directory / "in.safetensors")
    results: dict[str, Array] = {}
    count, record = 0, None
    for index in range(sets):
        inputs = {name: arrays[f"{index}.{name}"] for name in payload["names"]}
        observation = model.observe(inputs, last=index + 1 == sets)
        count, record = len(observation.outputs), observation.record
        results |= {f"{index}.{position}": array.copy() for position, array in enumerate(observation.outputs)}
        results |= {f"{index}.sum.{name}": array for name, array in observation.sums.items()}
        ranks.status.progress("executing")
        for cut in _row_cuts(artifact.manifest, [*inputs.values()]) if model.can_cut_rows else ():
            outputs = model.run_rows(inputs, cut)
            results |= {f"{index}.rows.{cut}.{position}": array.copy() for position, array in enumerate(outputs)}
            ranks.status.progress("executing in halves")
    for index in range(sets if artifact.manifest.cache is not None else 0):
        ids = arrays[f"{index}.{payload['names'][0]}"]
        decoder = None
        for capacity in capacities(ids.shape[1], model.positions):
            decoder = model.decoder(len(ids), capacity)
            if decoder is not None:
                results[f"{index}.replayed.{capacity}"] = replay(decoder, ids)
            ranks.status.progress("decoding")
        prompts, steps = split_lengths(*ids.shape)
        if steps > 1 and isinstance(decoder, CacheDecoder) and decoder.can_split:
            for cut in cuts(max(prompts)):
                results[f"{index}.halves.{cut}"] = replay_halves(decoder, ids, cut)
                ranks.status.progress("decoding in halves")
    save_file({name: np.ascontiguousarray(array) for name, array in results.items()}, _results(directory, ranks.rank))
    return {"outputs": count, "record": record}


def _row_cuts(manifest: Manifest, arrays: Sequence[Array]) -> list[int]:
    """Where to cut a batch, so that both halves keep to the program's rules for sizes."""
    assert manifest.rows is not None, "nothing says where the rows are"
    dims = manifest.rows.dims
    return [cut for cut in cuts(dims.count(arrays)) if dims.suits(manifest.call, manifest.inputs, arrays, cut)]


def _results(directory: Path, rank: int) -> Path:
    return directory / f"out-{rank}.safetensors"
