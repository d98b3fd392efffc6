"""What ranks run in the tests of the model families. Apart from the tests, so that a rank does not import pytest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.torch_dist.rank_program import RankProgram
from kraken_compiler.runtime.session import Session


def run_programs(payload: Mapping[str, Any], session: Session) -> None:
    """Run every artifact of a directory on the same token batches, one after the other.

    The first output of each is saved in `out-RANK.safetensors`, by program and number of the batch.
    """
    directory = Path(payload["directory"])
    batches = [tensor for _, tensor in sorted(load_file(directory / "batches.safetensors").items())]
    outputs: dict[str, Tensor] = {}
    for name in payload["programs"]:
        # Nothing is caught: a rank that goes on alone would leave its peers waiting for it.
        session.status.progress(f"running {name}")
        program = RankProgram.load(open_artifact(directory / name, verify=False), verify=False)
        with torch.inference_mode():
            for number, ids in enumerate(batches):
                outputs[f"{name} {number}"] = program.run_flat([ids])[0].contiguous()
    save_file(outputs, directory / f"out-{session.rank}.safetensors")
