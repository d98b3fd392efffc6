"""Heal with one process per lane: this side starts the ranks and listens to them, `heal_rank` is one of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.registry import DEFAULT_BACKEND, backend_class, backend_named
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.quality.healing.build import trainer_of_one_lane
from kraken_compiler.quality.healing.lora import merge_lora
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.ranks.communicators.agreement import THE_ARTIFACT, Claims
from kraken_compiler.ranks.communicators.join import communicator_of, rank_device
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.training.loop import Outcome
from kraken_compiler.training.on_ranks import train_on_rank, train_on_ranks
from kraken_compiler.training.results import write_results
from kraken_compiler.training.rows import TrainingText
from kraken_compiler.training.watch import Watch

_TEACHER = "teacher.kraken"


def heal_on_ranks(
    artifact: Artifact,
    source: LaneProgram,
    read: SourceReader,
    text: TrainingText,
    settings: HealSettings,
    folder: Path,
    watch: Watch,
    timeout: float,
) -> Outcome:
    """Train every lane in a process of its own; the results lie in the folder.

    Args:
        artifact: What is healed.
        source: Its source in standard form, of the same degree.
        read: Gives the source's tensors.
        text: What it is trained on.
        settings: The run's.
        folder: Where the run's state is.
        watch: Is told what happens.
        timeout: Seconds without progress, beyond what work like this takes, after which a rank counts as hanging.

    Raises:
        RankFailedError: A rank died or hung.
        UsageError, InputFileError: See `train`.
    """
    degree = artifact.manifest.degree
    teacher = folder / _TEACHER
    if not teacher.exists():
        source_record = artifact.manifest.source
        write_artifact(
            source, source.reader(read), teacher, source=source_record, backends=[backend_named(DEFAULT_BACKEND)]
        )
    payload = {
        "artifact": str(artifact.directory.absolute()),
        "folder": str(folder.absolute()),
        "settings": asdict(settings),
    }
    function = f"{heal_rank.__module__}:{heal_rank.__name__}"
    outcome = train_on_ranks(function, degree, payload, text, folder, watch, timeout)
    shutil.rmtree(teacher, ignore_errors=True)
    return outcome


def heal_rank(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """One rank's part of `heal_on_ranks`."""
    folder = Path(payload["folder"])
    artifact = open_artifact(payload["artifact"], verify=False)
    teacher = open_artifact(folder / _TEACHER, verify=False)
    ranks.agree(Claims({THE_ARTIFACT: f"{artifact.fingerprint()}, healed beside {teacher.fingerprint()}"}))
    device = rank_device(None, ranks.place)
    ranks.status.computes_here = device.type == "cpu"
    ranks.status.computes_in = backend_class(DEFAULT_BACKEND).computes_in
    communicator = communicator_of(ranks, device)
    trainer = trainer_of_one_lane(artifact, teacher, HealSettings(**payload["settings"]), communicator, device)
    outcome = train_on_rank(trainer, ranks, folder)
    merge_lora(trainer.parameters)
    write_results(trainer, folder, artifact.manifest.degree)
    return asdict(outcome)
