"""What ranks run in the tests of the model families. Apart from the tests, so that a rank does not import pytest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.generate.loop import generate
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.replay import replay, replay_halves
from tests.torch_ranks import group_of, model_of


def run_programs(payload: Mapping[str, Any], ranks: Ranks) -> None:
    """Run every artifact of a directory on the same token batches, one after the other.

    The first output of each is saved in `out-RANK.safetensors`, by program and number of the batch; under "cached" what
    the KV cache makes of the last batch, a ragged prompt first and then token by token; under "halves" the same with
    all tokens read as two halves.
    """
    directory = Path(payload["directory"])
    group_of(ranks)
    batches = [tensor for _, tensor in sorted(load_file(directory / "batches.safetensors").items())]
    outputs: dict[str, Tensor] = {}
    for name in payload["programs"]:
        # Nothing is caught: a rank that goes on alone would leave its peers waiting for it.
        ranks.status.progress(f"running {name}")
        program = RankProgram.load(open_artifact(directory / name, verify=False), verify=False)
        with torch.inference_mode():
            for number, ids in enumerate(batches):
                outputs[f"{name} {number}"] = program.run_flat([ids])[0].contiguous()
            if program.can_cut_rows:
                outputs[f"{name} rows"] = program.run_flat([batches[-1]], 1)[0].contiguous()
            if program.has_cache:
                decoder, ids = program.decoder(*batches[-1].shape), batches[-1].numpy()
                outputs[f"{name} cached"] = torch.from_numpy(replay(decoder, ids))
                outputs[f"{name} halves"] = torch.from_numpy(replay_halves(decoder, ids, 2))
    save_file(outputs, directory / f"out-{ranks.rank}.safetensors")


def run_on_inputs(payload: Mapping[str, Any], ranks: Ranks) -> None:
    """Run every artifact of a directory, called MODEL.FORM, on its model's inputs in `MODEL.safetensors`.

    The logits are saved in `out-RANK.safetensors`, by artifact, and of batches in two halves by "ARTIFACT rows".
    """
    group_of(ranks)
    directory = Path(payload["directory"])
    outputs: dict[str, Tensor] = {}
    for name in payload["programs"]:
        ranks.status.progress(f"running {name}")
        program = RankProgram.load(open_artifact(directory / name, verify=False), verify=False)
        given = load_file(directory / f"{name.split('.')[0]}.safetensors")
        with torch.inference_mode():
            outputs[name] = program(**given).logits.contiguous()
            if program.can_cut_rows:
                program.rows_from = 2
                outputs[f"{name} rows"] = program(**given).logits.contiguous()
    save_file(outputs, directory / f"out-{ranks.rank}.safetensors")


def generate_greedily(payload: Mapping[str, Any], ranks: Ranks) -> list[list[int]]:
    """Continue a batch of prompts with the KV cache, read as two halves if that is asked for; EOS ends nothing."""
    prompts, tokens = payload["prompts"], payload["tokens"]
    model = model_of(payload["artifact"], ranks)
    decoder = model.decoder(len(prompts), max(map(len, prompts)) + tokens)
    if payload.get("halves"):
        assert decoder.can_split
        decoder.split_from = 2
    steps = []
    for done, step in enumerate(generate(decoder, prompts, tokens)):
        ranks.status.progress(f"token {done}")
        steps.append(step)
    return [list(row) for row in zip(*steps, strict=True)]
