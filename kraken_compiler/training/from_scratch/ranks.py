"""Train a Kraken model on ranks: this side starts them and listens, `train_rank` is one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kraken_compiler.capture import capture
from kraken_compiler.native.directory import load_native, save_native
from kraken_compiler.native.model import KrakenLM
from kraken_compiler.ranks.communicators.join import communicator_of, rank_device
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.training.from_scratch.build import objective_from, trainer_of
from kraken_compiler.training.from_scratch.settings import TrainSettings
from kraken_compiler.training.loop import Outcome
from kraken_compiler.training.on_ranks import train_on_rank, train_on_ranks
from kraken_compiler.training.results import write_results
from kraken_compiler.training.rows import TrainingText
from kraken_compiler.training.watch import Watch

_FIRST = "first"
"""Directory of the first weights, in the folder of the run."""
_BUILD_SECONDS = 600.0


def train_native_on_ranks(
    model: KrakenLM,
    teacher: Path | None,
    text: TrainingText,
    settings: TrainSettings,
    folder: Path,
    watch: Watch,
    timeout: float,
) -> Outcome:
    """Train in several processes; the results lie in the folder.

    Args:
        model: With its first weights.
        teacher: What to distil from; None trains on the text alone.
        text: What it is trained on.
        settings: The run's.
        folder: Where the run's state is.
        watch: Is told what happens.
        timeout: See `train_on_ranks`.

    Raises:
        RankFailedError, UsageError, InputFileError: See `train_on_ranks`.
    """
    first = folder / _FIRST
    save_native(model, first)
    payload = {
        "model": str(first.absolute()),
        "teacher": None if teacher is None else str(teacher.absolute()),
        "settings": asdict(settings),
        "folder": str(folder.absolute()),
    }
    function = f"{train_rank.__module__}:{train_rank.__name__}"
    return train_on_ranks(function, settings.processes, payload, text, folder, watch, timeout)


def train_rank(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """One rank's part of `train_native_on_ranks`."""
    folder, settings = Path(payload["folder"]), TrainSettings(**payload["settings"])
    device = rank_device(None, ranks.place)
    ranks.status.progress("building what is trained", _BUILD_SECONDS)
    communicator = communicator_of(ranks, device)
    model = load_native(Path(payload["model"]))
    teacher = None if payload["teacher"] is None else capture(payload["teacher"], dtype=torch.float32)
    objective = objective_from(teacher, device)
    trainer = trainer_of(model, objective, settings, device, communicator)
    ranks.status.computes_here = device.type == "cpu"
    outcome = train_on_rank(trainer, ranks, folder)
    write_results(trainer, folder, model.config.degree)
    return asdict(outcome)
