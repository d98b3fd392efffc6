"""Tiny models for the tests of healing: a lane program, its weights, and its source in standard form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kraken_compiler.capture import Capture, capture
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec, lane_weights
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.healing.lora import add_lora
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.training.parameters import LaneParameters
from kraken_compiler.training.trainer import Trainer, logits_of
from tests.zoo import SUPPORTED, random_tokens

VOCABULARY = 97


@cache
def captured(family: str) -> Capture:
    """A model of the zoo."""
    return capture(SUPPORTED[family]())


@cache
def lowered(family: str, form: str, degree: int = 2) -> LaneProgram:
    """Its lane program; nobody changes it."""
    return lower(captured(family).program, degree, form)[0]


def rows(count: int, sequence: int = 12, seed: int = 0) -> Tensor:
    """Token ids, int64 [count, sequence]."""
    return random_tokens(VOCABULARY, count, sequence, seed)


def stacked_reader(program: LaneProgram, read: SourceReader) -> Callable[[WeightSpec], Tensor]:
    """All lanes' tensors of a weight, one behind the other in a new first dim, or the one that all share."""
    read_lane = read_from_source(program, read)

    def stacked(spec: WeightSpec) -> Tensor:
        if not spec.shards:
            return read_lane(spec, 0).clone()
        return torch.stack([read_lane(spec, lane) for lane in range(program.degree)])

    return stacked


def parameters_of(family: str, form: str, lora: int | None = None, degree: int = 2) -> LaneParameters:
    """All lanes' weights, to be trained."""
    program = lowered(family, form, degree)
    made = LaneParameters(program.weights, stacked_reader(program, captured(family).store.read))
    if lora is not None:
        add_lora(made, lora, seed=0)
    return made


def trainer_for(family: str, form: str, settings: HealSettings, degree: int = 2) -> Trainer:
    """All lanes in this process, and the source model as teacher."""
    student = LaneRunner(lowered(family, form, degree), recompute=settings.gradient_checkpointing)
    source = lowered(family, "standard", 1)
    weights = lane_weights(source.weights, 0, source.reader(captured(family).store.read))
    teacher = Distillation(logits_of(LaneRunner(source), lambda: weights))
    return Trainer(student, parameters_of(family, form, settings.lora, degree), teacher, settings)
