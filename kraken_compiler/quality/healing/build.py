"""Student and teacher of a run, in this process: all lanes, or this rank's."""

from __future__ import annotations

import torch

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.registry import keeper_of_lanes, require_lanes
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.collectives import OnRanks
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.quality.healing.lora import add_lora
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.training.parameters import LaneParameters
from kraken_compiler.training.peers import RankPeers
from kraken_compiler.training.trainer import Trainer, logits_of


def trainer_of_all_lanes(
    artifact: Artifact, source: Program, read: SourceReader, settings: HealSettings, device: torch.device
) -> Trainer:
    """All lanes of an artifact, and its source as one lane that does everything.

    Args:
        artifact: The artifact.
        source: Its source in standard form, of degree 1.
        read: Gives the source's tensors.
        settings: The run's.
        device: Where all of it computes.

    Raises:
        InputFileError: A file of the artifact is missing or damaged.
    """
    lanes = require_lanes(artifact)
    program, read_lane = lanes.program, lanes.read_lane
    parameters = _parameters(LaneParameters.of_all_lanes(program, read_lane, device), settings, settings.seed)
    student = LaneRunner(program, recompute=settings.gradient_checkpointing, device=device)
    objective = Distillation.from_source(source, read, device)
    return Trainer(student, parameters, objective, settings, device=device)


def trainer_of_one_lane(
    artifact: Artifact, teacher: Artifact, settings: HealSettings, communicator: Communicator, device: torch.device
) -> Trainer:
    """This rank's lane of an artifact, and the same of its source in standard form.

    Args:
        artifact: The artifact.
        teacher: Its source in standard form, of the same degree.
        settings: The run's.
        communicator: What connects the ranks.
        device: Where this rank computes.

    Raises:
        InputFileError: A file of an artifact is missing or damaged.
    """
    lane = communicator.rank
    for each in (artifact, teacher):
        keeper = keeper_of_lanes(each)
        each.verify(*(keeper.rank_files(each, lane) if keeper is not None else ()))
    lanes, source = require_lanes(artifact), require_lanes(teacher)
    program = lanes.program
    lane_parameters = LaneParameters(program.weights, lambda spec: lanes.read_lane(spec, lane), device)
    # Every lane has weights of its own to update, so their first updates need not be alike.
    parameters = _parameters(lane_parameters, settings, settings.seed + lane)
    student = LaneRunner(program, OnRanks(communicator), recompute=settings.gradient_checkpointing, device=device)
    weights = {spec.name: source.read_lane(spec, lane).to(device) for spec in source.program.weights.values()}
    exact = LaneRunner(source.program, OnRanks(communicator), device=device)
    objective = Distillation(logits_of(exact, lambda: weights))
    return Trainer(student, parameters, objective, settings, peers=RankPeers(communicator, device), device=device)


def _parameters(parameters: LaneParameters, settings: HealSettings, seed: int) -> LaneParameters:
    if settings.lora is not None:
        add_lora(parameters, settings.lora, seed)
    return parameters
