"""Every family in every form on real ranks: N processes compute what one computes.

Half of the families on two ranks and half on four; in standard and in kraken form with the KV cache, too. (All forms at
both degrees are compared with the source in one process, in `test_families.py`.) Starting ranks takes seconds, so all
programs of a degree are run in one launch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.ir.forms import FORMS
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.verify.prefixes import expected as expected_rows
from kraken_compiler.verify.replay import split_lengths
from tests.table_notes import note
from tests.test_families import DEGREES, SIZES, lane_program, recognized, relative_error
from tests.zoo import SUPPORTED, random_tokens

pytestmark = pytest.mark.slow

WITH_CACHE = ("standard", "kraken")
"""The forms that are run with the KV cache as well; to write its graphs takes longer than anything else here."""


def families(degree: int) -> list[str]:
    """The families that are run at a degree."""
    return list(SUPPORTED)[DEGREES.index(degree) :: len(DEGREES)]


def test_every_family_has_a_degree() -> None:
    assert sorted(name for degree in DEGREES for name in families(degree)) == sorted(SUPPORTED)


def write_programs(name: str, degree: int, directory: Path, batches: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Write a model in every form as an artifact.

    Yields:
        Program and number of the batch, and what all lanes compute in one process; last what must come of the last
        batch otherwise: with a KV cache token by token and in halves, without one in halves of the rows.
    """
    read = recognized(name).read
    for form in FORMS:
        program, made = lane_program(name, degree, form, cache=form in WITH_CACHE, overlap="auto"), f"{name}.{form}"
        source = Source(kind="module", name=name)
        write_artifact(program, program.reader(read), directory / made, source=source, backends=[TorchBackend()])
        lanes = LaneModule.from_program(program, read)
        with torch.no_grad():
            for number, ids in enumerate(batches):
                logits = lanes.run_flat([ids])[0]
                yield f"{made} {number}", logits
        if program.rows is not None:
            yield f"{made} rows", logits
        if program.cached is not None:
            rows = expected_rows(logits, *split_lengths(*batches[-1].shape))
            yield f"{made} cached", rows
            yield f"{made} halves", rows[:, [0, -1]]
        elif form in WITH_CACHE:
            assert SUPPORTED[name].no_cache, f"{name}: {program.no_cache}"


def errors_on_ranks(degree: int, directory: Path, expected: dict[str, Tensor]) -> dict[str, float]:
    """Run all programs of a directory; the largest relative error of any rank, by what was expected."""
    programs = sorted({name.split()[0] for name in expected})
    payload = {"directory": str(directory), "programs": programs}
    run_ranks("tests.rank_functions:run_programs", degree, payload, timeout=120)
    errors = dict.fromkeys(expected, 0.0)
    for rank in range(degree):
        found = load_file(directory / f"out-{rank}.safetensors")
        assert found.keys() == expected.keys()
        errors = {name: max(errors[name], relative_error(found[name], want)) for name, want in expected.items()}
    return errors


def wrong(errors: dict[str, float]) -> str:
    """What differs by more than rounding, a line each."""
    return "\n".join(f"{name}: a rank differs by {error:.1e}" for name, error in errors.items() if not error <= 1e-5)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.timeout(900)
def test_ranks_equal_the_single_process(degree: int, tmp_path: Path) -> None:
    vocabulary = min(build.vocab for build in SUPPORTED.values())
    batches = [random_tokens(vocabulary, *size, seed) for seed, size in enumerate(SIZES)]
    expected: dict[str, Tensor] = {}
    directory = tmp_path / "programs"
    for name in families(degree):
        expected.update(write_programs(name, degree, directory, batches))
    save_file({str(number): ids for number, ids in enumerate(batches)}, directory / "batches.safetensors")
    errors = errors_on_ranks(degree, directory, expected)
    # pytest keeps the folders of the last runs, and this one is large.
    shutil.rmtree(directory)
    for name in families(degree):
        of_family = [error for program, error in errors.items() if program.startswith(f"{name}.")]
        of_rows = [error for program, error in errors.items() if program.startswith(f"{name}.") and "rows" in program]
        note("ranks", name, degree=degree, forms=list(FORMS), error=max(of_family), rows=max(of_rows, default=None))
    assert not wrong(errors)
