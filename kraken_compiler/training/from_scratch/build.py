"""What is trained of a Kraken model, in this process: all lanes, or this rank's; and the model with what came of it."""

from __future__ import annotations

from pathlib import Path

import torch

from kraken_compiler.capture import Capture
from kraken_compiler.capture.from_native import capture_native
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.collectives import OnRanks
from kraken_compiler.lanes.reference import read_from_lane_files, read_from_source
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.native.config import KrakenConfig
from kraken_compiler.native.model import KrakenLM
from kraken_compiler.passes.form.join_streams import lane_source
from kraken_compiler.passes.lower import lower, lower_native
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.training.from_scratch.settings import TrainSettings
from kraken_compiler.training.objective import NextToken, Objective
from kraken_compiler.training.parameters import LaneParameters
from kraken_compiler.training.peers import Alone, Peers, RankPeers, Replicas
from kraken_compiler.training.trainer import Trainer
from kraken_compiler.weights.lane_file_names import SHARED_FILE, lane_file_name


def new_model(config: KrakenConfig, seed: int) -> KrakenLM:
    """A model with first weights that follow from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KrakenLM(config)


def objective_from(teacher: Capture | None, device: torch.device) -> Objective:
    """What is made small: KL(teacher || model), or without a teacher the cross-entropy of the text.

    Args:
        teacher: A standard model of the same tokens.
        device: Where it computes.

    Raises:
        UnsupportedModelError: It cannot be rewritten as a program of one lane.
    """
    if teacher is None:
        return NextToken()
    program, _ = lower(teacher.program, 1, "standard", cached=False)
    return Distillation.from_source(program, teacher.store.read, device)


def trainer_of(
    model: KrakenLM,
    objective: Objective,
    settings: TrainSettings,
    device: torch.device,
    communicator: Communicator | None = None,
) -> Trainer:
    """A model's lane program as what is trained.

    Args:
        model: With its first weights, which all ranks have alike; it is not changed.
        objective: What is made small.
        settings: The run's.
        device: Where this process computes.
        communicator: What connects the ranks: of as many as lanes each has one lane, of any other number all of them.
            None is this process alone.
    """
    program, read = trained_program(model)
    read_lane = read_from_source(program, read)
    if communicator is not None and communicator.degree == program.degree:
        lane = communicator.rank
        parameters = LaneParameters(program.weights, lambda spec: read_lane(spec, lane), device)
        runner = LaneRunner(program, OnRanks(communicator), recompute=settings.gradient_checkpointing, device=device)
        peers: Peers = RankPeers(communicator, device)
    else:
        parameters = LaneParameters.of_all_lanes(program, read_lane, device)
        runner = LaneRunner(program, recompute=settings.gradient_checkpointing, device=device)
        peers = Alone() if communicator is None else Replicas(communicator, device)
    return Trainer(
        runner,
        parameters,
        objective,
        settings,
        peers=peers,
        device=device,
        embedding_rate=settings.embedding_rate,
    )


def trained_program(model: KrakenLM) -> tuple[LaneProgram, SourceReader]:
    """The lane program that is trained, and what reads the model's tensors; embedding and head stay one."""
    captured = capture_native(model)
    assert captured.lanes is not None, "it is a Kraken model"
    return lower_native(captured.program, captured.lanes, cached=False, whole_head=True), captured.store.read


def fill_from_lanes(model: KrakenLM, program: LaneProgram, folder: Path) -> None:
    """Give a model the weights that a trainer's `write_results` has left.

    Args:
        model: It is changed.
        program: The program that was trained.
        folder: Where the lanes' files are.

    Raises:
        InputFileError: A file is missing or damaged.
    """
    tensors = model.state_dict()
    filled = set()
    read_lane = read_from_lane_files(
        [folder / lane_file_name(lane) for lane in range(program.degree)], folder / SHARED_FILE
    )
    for lane in range(program.degree):
        for spec in program.weights.values():
            name = lane_source(spec.source, lane)
            if name in tensors:
                tensors[name].copy_(read_lane(spec, lane))
                filled.add(name)
    missing = tensors.keys() - filled
    assert not missing, f"no lane has {sorted(missing)[:3]}"
