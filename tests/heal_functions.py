"""What ranks run in the tests of healing. Apart from the tests, so that a rank does not import pytest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.lane_graph.lane_files import read_weights
from kraken_compiler.backends.torch_dist.lanes import load_program
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.quality.healing.build import trainer_of_one_lane
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.ranks.communicators.choose import default_communicator
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.training.parameters import LaneParameters
from kraken_compiler.training.trainer import Trainer, logits_of
from tests.torch_ranks import device_of, group_of


def compare_with_one_process(payload: Mapping[str, Any], ranks: Ranks) -> list[dict[str, float]]:
    """Train every artifact on ranks, and all its lanes in this process beside; returns the largest differences.

    Per artifact: relative errors of the loss, the gradients of the first step, the gradient's norm, and the weights
    after three steps; how far this rank's copies of what all lanes share are from rank 0's; and the KL on other rows.
    """
    group, device = group_of(ranks), device_of(ranks)
    found = []
    batches = torch.tensor(payload["batches"])
    for case in payload["cases"]:
        ranks.status.progress(f"training {case['artifact']}")
        artifact, source = (open_artifact(case[name], verify=False) for name in ("artifact", "source"))
        settings = HealSettings(**case["settings"])
        communicator = default_communicator(device, group, kind=case["communicator"])
        on_ranks = trainer_of_one_lane(artifact, source, settings, communicator, device)
        alone = _all_lanes(artifact, source, settings)
        differences: dict[str, float] = {}
        losses = []
        for trainer in (on_ranks, alone):
            loss = trainer.loss(batches[0])
            loss.backward()  # type: ignore[no-untyped-call]
            trainer.share_gradients()
            losses.append(trainer.peers.total(loss.detach()))
        differences["loss"] = _relative(losses[0], losses[1])
        differences["gradients"] = max(
            _relative(*pair) for pair in _pairs(on_ranks, alone, ranks.rank, lambda parameter: parameter.grad)
        )
        differences["norm"] = abs(on_ranks.clip_gradients() / alone.clip_gradients() - 1)
        for ids in batches:
            kls = [trainer.step(ids, 1e-3).loss for trainer in (on_ranks, alone)]
        differences["kl"] = abs(kls[0] / kls[1] - 1)
        differences["weights"] = max(
            _relative(*pair) for pair in _pairs(on_ranks, alone, ranks.rank, lambda parameter: parameter.detach())
        )
        differences["copies"] = max(
            (
                _from_first(parameter.detach())
                for name, parameter in on_ranks.parameters.trained().items()
                if on_ranks.parameters.shared(name)
            ),
            default=0.0,
        )
        rows = batches.flatten(0, 1)
        qualities = [trainer.evaluate(rows).loss for trainer in (on_ranks, alone)]
        differences["evaluated"] = abs(qualities[0] / qualities[1] - 1)
        found.append(differences)
    return found


def _all_lanes(artifact: Artifact, source: Artifact, settings: HealSettings) -> Trainer:
    program, standard = load_program(artifact), load_program(source)
    parameters = LaneParameters(program.weights, _stacked(artifact, program))
    read = _stacked(source, standard)
    weights = {name: read(spec) for name, spec in standard.weights.items()}
    return Trainer(
        LaneRunner(program), parameters, Distillation(logits_of(LaneRunner(standard), lambda: weights)), settings
    )


def _stacked(artifact: Artifact, program: Program) -> Any:
    lanes = range(program.degree)
    read_lane = read_weights(artifact, program.degree)

    def stacked(spec: WeightSpec) -> Tensor:
        return torch.stack([read_lane(spec, lane) for lane in lanes]) if spec.shards else read_lane(spec, 0)

    return stacked


def _pairs(ranks: Trainer, alone: Trainer, lane: int, take: Any) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    others = alone.parameters.trained()
    for name, parameter in ranks.parameters.trained().items():
        have, want = take(parameter), take(others[name])
        if have is None or want is None:
            assert have is None, f"{name}: only one of them has a gradient"
            assert want is None, f"{name}: only one of them has a gradient"
            continue
        pairs.append((have, want if ranks.parameters.shared(name) else want[lane]))
    assert pairs
    return pairs


def _relative(have: Tensor, want: Tensor) -> float:
    return ((have - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()


def _from_first(tensor: Tensor) -> float:
    first = tensor.clone()
    dist.broadcast(first, src=0)
    return (tensor - first).abs().max().item()
