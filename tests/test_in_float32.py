"""What is too noisy in half precision to be told from a wrong program is compared in float32."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import kraken_compiler
from kraken_compiler.verify import against_lanes, in_float32
from kraken_compiler.verify.verification import verify_programs
from tests.zoo import SUPPORTED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(params=["bfloat16", "float16"])
def strict(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact in half precision, and a world in which no error is small enough for that."""

    def tolerance(dtypes: Iterable[torch.dtype], noise: float = 0.0) -> float:
        return 1e-5 if set(dtypes) <= {torch.float32} else -1.0

    model = SUPPORTED["llama"]().to(getattr(torch, request.param))
    directory = tmp_path / "half.kraken"
    kraken_compiler.compile(model, directory, degree=2, backends=["torch", "vllm"], verify=False)
    monkeypatch.setattr(against_lanes, "rank_tolerance", tolerance)
    return directory


def test_a_noisy_program_is_right_in_float32(strict: Path) -> None:
    comparisons = verify_programs(strict, [(1, 7), (2, 5)]).comparisons
    assert all(one.passed for one in comparisons)
    exact = [one for one in comparisons if "in float32" in one.what]
    assert {one.what.split(" in float32")[0] for one in exact} == {"2 ranks", "2 lanes as vLLM runs them"}
    assert max(one.max_rel_error for one in exact) < 1e-5


def test_a_wrong_program_is_wrong_in_float32(strict: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = in_float32._write_in_float32

    def write_other_graph(source: Path, target: Path) -> None:
        write(source, target)
        if target.suffix == ".json" and target.stem == "lane":
            text = target.read_text()
            assert text.count("aten.silu.default") > 0
            target.write_text(text.replace("aten.silu.default", "aten.gelu.default"))

    monkeypatch.setattr(in_float32, "_write_in_float32", write_other_graph)
    comparisons = verify_programs(strict, [(1, 7)], backend="torch").comparisons
    assert not all(one.passed for one in comparisons if "in float32" in one.what)
