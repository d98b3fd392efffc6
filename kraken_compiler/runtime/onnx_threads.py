"""All ONNX devices of an artifact in this process, a thread each: to measure what they say without starting ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.feeds import whole_feeds
from kraken_compiler.backends.onnx_ort.format import INPUT_IDS, LOGITS, device_path
from kraken_compiler.communicators.threads import Meeting, ThreadCollectives, in_threads
from kraken_compiler.runtime.logits import logits_function


def logits_of_devices(directory: Path) -> Callable[[Tensor], Tensor]:
    """An artifact's ONNX devices as one language model.

    Args:
        directory: The artifact.

    Returns:
        Token ids [batch, sequence] -> logits [batch, sequence, vocabulary], until the next call.

    Raises:
        InputFileError: A file of the artifact is damaged.
    """
    manifest = open_artifact(directory, verify=False).manifest
    models = [DeviceModel.load(directory / device_path(lane), verify=False) for lane in range(manifest.degree)]
    meeting = Meeting(manifest.degree)
    programs = [DeviceProgram(model, ThreadCollectives(meeting, model.lane)) for model in models]

    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: value.numpy() for name, value in given.items()}
        outputs = in_threads(meeting, lambda rank: programs[rank].run(whole_feeds(models[rank], arrays)))
        return {name: torch.from_numpy(value) for name, value in outputs[0].items()}

    if models[0].caches is not None:
        return lambda ids: run({INPUT_IDS: ids})[LOGITS]
    names = [spec.name for spec in manifest.inputs]
    return logits_function(manifest.inputs, manifest.call, lambda flat: list(run(dict(zip(names, flat))).values()))
