"""One process's part of a checkpoint: the trained weights, AdamW's moments, and the random generator."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.training.state import RunState, finished_step, keep_only, write_state, write_whole
from kraken_compiler.training.trainer import Trainer
from kraken_compiler.weights.io.safetensors_format import read_header, read_tensor
from kraken_compiler.weights.io.safetensors_writer import new_safetensors

_GENERATOR = "generator"
_DIGEST_BYTES = hashlib.sha256().digest_size
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(trainer: Trainer, folder: Path, state: RunState, step: int) -> RunState:
    """Write a checkpoint; all processes must do so together. The one before is removed when this one is whole.

    Args:
        trainer: What is saved.
        folder: The run's.
        state: Where the run was.
        step: Number of steps that are done.

    Returns:
        Where it is now.

    Raises:
        InputFileError: A file cannot be written; the checkpoint before is still there.
    """
    peers = trainer.peers
    digest = bytes(_DIGEST_BYTES)
    if peers.rank < peers.parts:
        tensors = _tensors(trainer)
        digest = write_whole(folder / _file(step, peers.rank), lambda partial: _write(partial, tensors))
    digests = peers.gather(digest)[: peers.parts]
    state = finished_step(state, step, {_file(step, rank): one.hex() for rank, one in enumerate(digests)})
    if peers.rank == 0:
        write_state(folder, state)
        keep_only(folder, state)
    return state


def load_checkpoint(trainer: Trainer, folder: Path, state: RunState) -> None:
    """Restore a trainer from a checkpoint.

    Raises:
        InputFileError: The checkpoint is missing, damaged, or one of other weights.
    """
    name = _file(state.step, min(trainer.peers.rank, trainer.peers.parts - 1))
    path = folder / name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror or error}; use --restart") from error
    if digest != state.files.get(name):
        raise InputFileError(f"{path}: damaged (its hash differs); begin anew with --restart")
    entries = read_header(path)
    parameters = trainer.parameters.trained()
    shapes = {f"weight/{name}": tuple(parameter.shape) for name, parameter in parameters.items()}
    if any(name not in entries or tuple(entries[name].shape) != shape for name, shape in shapes.items()):
        raise InputFileError(f"{path}: holds other weights than those that are trained; begin anew with --restart")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(read_tensor(name, entries[f"weight/{name}"]))
        moments = {
            moment: read_tensor(name, entries[f"{moment}/{name}"])
            for moment in _MOMENTS
            if f"{moment}/{name}" in entries
        }
        if moments:
            trainer.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
    torch.set_rng_state(read_tensor(_GENERATOR, entries[_GENERATOR]))


def _file(step: int, rank: int) -> str:
    return f"step-{step}.rank-{rank}.safetensors"


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {_GENERATOR: torch.get_rng_state()}
    for name, parameter in trainer.parameters.trained().items():
        tensors[f"weight/{name}"] = parameter.detach()
        moments = trainer.optimizer.state.get(parameter, {})
        tensors |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS if moment in moments}
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    contents = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_safetensors(path, contents) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)
