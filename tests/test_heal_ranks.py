"""Healing with one process per lane computes what all lanes in one process compute. One launch does all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.ranks.run_ranks import run_ranks
from tests.healing_models import captured, lowered, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

BOUNDS = {"loss": 1e-5, "gradients": 1e-5, "norm": 1e-5, "kl": 1e-3, "weights": 1e-3, "copies": 0.0, "evaluated": 1e-3}
"""AdamW's steps have the size of the learning rate even where a gradient is rounding noise, so what comes after one is
compared more loosely than the gradients."""

CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "kraken"): {},
    ("llama", "ladder"): {"communicator": "group"},
    # A standard form has nothing to learn from its source, so it learns from something else.
    ("llama", "standard"): {"teacher": "kraken", "settings": {"gradient_checkpointing": True}},
    ("gpt2", "kraken"): {"settings": {"gradient_checkpointing": True}},
}


def write_program(family: str, form: str, directory: Path) -> str:
    program = lowered(family, form)
    read = program.reader(captured(family).store.read)
    write_artifact(program, read, directory, source=Source(kind="module", name=family), backends=[TorchBackend()])
    return str(directory)


def test_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    def written(family: str, form: str) -> str:
        directory = tmp_path / f"{family}-{form}"
        return str(directory) if directory.exists() else write_program(family, form, directory)

    cases = [
        {
            "artifact": written(family, form),
            "source": written(family, options.get("teacher", "standard")),
            "settings": {"steps": 3, "batch": 3, "precision": "float32", "clip": 0.5, **options.get("settings", {})},
            "communicator": options.get("communicator"),
        }
        for (family, form), options in CASES.items()
    ]
    batches = rows(9).view(3, 3, -1).tolist()
    results = run_ranks("tests.heal_functions:compare_with_one_process", 2, {"cases": cases, "batches": batches})
    for rank, found in enumerate(results):
        for case, differences in zip(CASES, found, strict=True):
            too_large = {name: value for name, value in differences.items() if not value <= BOUNDS[name]}
            assert not too_large, f"rank {rank}, {case}: {differences}"
