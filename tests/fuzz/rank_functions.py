"""What ranks run for random decoders. Apart from the tests, so that a rank does not import pytest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.ranks.session import Ranks
from tests.fuzz.decoding import CAPACITY, ROWS, decoded
from tests.torch_ranks import group_of


def decode_all(payload: Mapping[str, Any], ranks: Ranks) -> None:
    """Decode with every artifact of a directory; the logits are saved in `out-RANK.safetensors`, by artifact."""
    group_of(ranks)
    directory = Path(payload["directory"])
    outputs = {}
    for name in payload["programs"]:
        ranks.status.progress(f"running {name}")
        program = RankProgram.load(open_artifact(directory / name, verify=False), verify=False)
        with torch.inference_mode():
            outputs[name] = decoded(program.decoder(ROWS, CAPACITY))
    save_file(outputs, directory / f"out-{ranks.rank}.safetensors")
