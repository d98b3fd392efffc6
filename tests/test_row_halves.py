"""Batches that run as two halves of their rows: compiled, checked, measured and run, by both backends."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from kraken_compiler.artifact.consistency import check_rows
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.lane_graph.lane_files import ROWS_FILE
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.source import lowered_as, source_of
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.generate.decoder import RecomputingDecoder, SplitDecoder
from kraken_compiler.generate.split_threshold import split_threshold
from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.ir.rows import RowDims
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.execute import execute_on_ranks
from kraken_compiler.verify.verification import verify_programs
from tests.test_verify import rehash
from tests.zoo import SUPPORTED
from tests.zoo.builder import token_batch

Array = NDArray[Any]
INPUTS = (InputSpec("ids", "ids", "int64", ("batch", "sequence")), InputSpec("scale", "scale", "float32", (3,)))
CALL = CallSpec(("ids", "scale"), {}, {}, "", ("logits", "scale"))


def test_rows_are_cut_and_joined() -> None:
    dims = RowDims((0, None), (1, None))
    ids, scale = np.arange(10).reshape(5, 2), np.ones(3)
    assert dims.count([ids, scale]) == 5
    first, second = dims.halves([ids, scale], 2)
    assert (first[0].tolist(), second[0].tolist()) == ([[0, 1], [2, 3]], [[4, 5], [6, 7], [8, 9]])
    assert first[1] is scale is second[1]
    assert dims.flat((first, second)) == [first[0], scale, second[0]]
    assert [spec.name for spec in dims.specs(INPUTS)] == ["ids", "scale", "ids_second"]
    joined = dims.joined([first[0].T, scale], [second[0].T, scale], np.concatenate)
    assert np.array_equal(joined[0], ids.T)
    assert joined[1] is scale


@pytest.mark.parametrize(
    "dims",
    [
        RowDims((1, None), (0, None)),
        RowDims((0, 0), (0, None)),
        RowDims((None, None), (0, None)),
        RowDims((0,), (0, None)),
        RowDims((2, None), (0, None)),
        RowDims((0, None), (0,)),
        RowDims((0, None), (-1, None)),
    ],
)
def test_a_manifest_that_misplaces_the_rows_is_refused(dims: RowDims) -> None:
    check_rows(RowDims((0, None), (0, None)), INPUTS, CALL)
    with pytest.raises(ValueError, match="its rows lie in no dims of its"):
        check_rows(dims, INPUTS, CALL)


class Timed:
    """A language model that says the next number, and takes less time in halves from 128 tokens on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.ways: list[str] = []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def whole(self, ids: Array) -> Array:
        self.now += 0.001 * ids.shape[1]
        self.ways.append("whole")
        return np.eye(300)[np.minimum(ids + 1, 299)]

    def halves(self, ids: Array) -> Array:
        logits = self.whole(ids)
        self.now += 0.05 - 0.0005 * ids.shape[1]
        self.ways[-1] = "halves"
        return logits


def test_prompts_without_a_cache_are_read_in_halves_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Timed(monkeypatch)
    decoder = RecomputingDecoder(model.whole, 2, 200, model.halves)
    assert isinstance(decoder, SplitDecoder)
    assert decoder.can_split
    assert not RecomputingDecoder(model.whole, 2, 200).can_split
    ranks = Ranks(Place.alone(), StatusWriter(0, None), None)
    decoder.split_from = split_threshold(decoder, (64, 128), ranks, tmp_path, "here")
    assert decoder.split_from == 128
    model.ways.clear()
    logits = decoder.prefill(np.tile(np.arange(127), (2, 1)), np.array([127, 127]))
    for _ in range(2):
        logits = decoder.step(logits.argmax(axis=-1))
    assert model.ways == ["whole", "halves", "halves"]
    assert logits.argmax(axis=-1).tolist() == [129, 129]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return SUPPORTED["bert"]()


@pytest.fixture(scope="module")
def artifact(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An encoder for two ranks of both backends."""
    target = tmp_path_factory.mktemp("rows") / "bert.kraken"
    inputs = {"input_ids": token_batch(model, 2, 16)}
    result = compile_model(model, target, example_inputs=inputs, degree=2, form="standard", backends=["torch", "onnx"])
    assert result.verification is not None
    checked = [comparison.what for comparison in result.verification.comparisons if "as two halves" in comparison.what]
    assert {what.partition(" that")[0] for what in checked} == {"2 ranks", "2 ONNX devices"}
    halves = result.verification.halves
    # Nothing hides what the first half looks up, nor the last sum of the second.
    assert len(halves) == 2 + 12
    assert all(window.gemms for window in halves[1:-1])
    assert f"batches in two halves: {len(halves)} reduces, " in result.report.text
    return open_artifact(target)


@pytest.mark.slow
def test_an_encoder_s_batches_run_in_halves(artifact: Artifact) -> None:
    rows = artifact.manifest.rows
    assert rows is not None
    assert len(rows.plan.reduces) == 2 * len(artifact.manifest.plan.reduces)
    promised = [bool(reduce.window) for reduce in rows.plan.reduces]
    for backend in (TorchBackend(), OnnxBackend()):
        windows = backend.split_schedule(artifact)
        assert [bool(window.promised) for window in windows] == promised == [False, *[True] * (len(windows) - 2), False]
        assert all(window.gemms for window in windows[1:-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_ranks_are_compared_at_several_cuts(artifact: Artifact, model: nn.Module, backend: str) -> None:
    ids = token_batch(model, 5, 9)
    execution = execute_on_ranks(artifact.directory, [{"input_ids": ids.numpy()}], backend)
    with torch.no_grad():
        want = model(ids).logits
    for of_rank in execution.rows:
        assert list(of_rank[0]) == [1, 4]
        for outputs in of_rank[0].values():
            torch.testing.assert_close(torch.from_numpy(outputs[0]), want, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_wrong_half_is_found(artifact: Artifact, tmp_path: Path) -> None:
    """The graph on halves adds what the lanes do not; everything else is right."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact.directory, copy)
    text = (copy / ROWS_FILE).read_text()
    assert "aten.gelu.default" in text
    (copy / ROWS_FILE).write_text(text.replace("aten.gelu.default", "aten.relu.default"))
    rehash(copy)
    result = verify_programs(copy)
    failed = [comparison for comparison in result.comparisons if not comparison.passed]
    assert failed
    assert all("ranks that ran rows as two halves" in comparison.what for comparison in failed)


def on_rank(payload: Mapping[str, Any], ranks: Ranks) -> list[list[list[float]]]:
    """Run a batch whole, in halves and in compiled halves; measure, and run so."""
    from tests.rank_functions import group_of

    group_of(ranks)
    program = RankProgram.load(open_artifact(payload["artifact"]))
    ids = torch.tensor(payload["ids"])
    with pytest.raises(UsageError, match="a batch of one row"), torch.inference_mode():
        program.measure_halves(ids[:1])
    with torch.inference_mode():
        whole = program(ids).logits
        results = [whole, program.run_flat([ids], 1)[0]]
        seconds = program.measure_halves(ids)
        assert min(seconds) > 0
        assert program.rows_from in (None, len(ids))
        program.rows_from = len(ids)
        runs: list[int] = []
        run_halves = program._run_halves
        program._run_halves = lambda inputs, cut: runs.append(cut) or run_halves(inputs, cut)  # type: ignore
        results.append(program(ids).logits)
        program(ids[:3])
        assert runs == [len(ids) // 2]
        program.compile()
        results += [program(ids).logits, program.run_flat([ids], 3)[0]]
    return [(result - whole).abs().max().item() for result in results]  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_s_program_runs_large_batches_in_halves(artifact: Artifact, model: nn.Module) -> None:
    ids = token_batch(model, 4, 8)
    payload = {"artifact": str(artifact.directory), "ids": ids.tolist()}
    for differences in run_ranks(f"{__name__}:on_rank", 2, payload, timeout=300):
        assert max(differences) < 1e-5, differences


@pytest.mark.slow
def test_the_program_is_made_again_with_its_halves(artifact: Artifact, model: nn.Module) -> None:
    """As healing does it."""
    manifest = artifact.manifest
    captured = source_of(artifact, model, example_inputs={"input_ids": token_batch(model, 2, 16)})
    program = lowered_as(captured, manifest)
    assert program.rows is not None
    assert manifest.rows is not None
    assert (program.rows.plan, program.rows.dims) == (manifest.rows.plan, manifest.rows.dims)
    assert measure_windows(program.rows.program.graph, program.rows.plan) == TorchBackend().split_schedule(artifact)
    assert lowered_as(captured, manifest.model_copy(update={"rows": None})).rows is None


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["none", "tokens"])
def test_what_nobody_wants_is_not_written(model: nn.Module, overlap: str, tmp_path: Path) -> None:
    inputs = {"input_ids": token_batch(model, 2, 16)}
    result = compile_model(
        model, tmp_path / "out", example_inputs=inputs, degree=2, form="standard", overlap=overlap, verify=False
    )
    assert not (tmp_path / "out" / ROWS_FILE).exists()
    assert open_artifact(tmp_path / "out").manifest.rows is None
    said = "prefills are not read as two halves, which takes a KV cache" in result.notes
    assert said == (overlap == "tokens")
    with pytest.raises(UsageError, match="--overlap columns: choose from none, tokens, rows, auto"):
        compile_model(model, tmp_path / "out", overlap="columns", force=True)


@pytest.mark.slow
def test_rows_of_a_model_with_a_cache(tmp_path: Path) -> None:
    """Whole batches run as halves if that is asked for; prefills then do not."""
    model = SUPPORTED["llama"]()
    inputs = {"input_ids": token_batch(model, 2, 16)}
    options = {"degree": 2, "form": "kraken", "overlap": "rows", "backends": ["torch", "onnx"]}
    result = compile_model(model, tmp_path / "out", example_inputs=inputs, **options)
    manifest = open_artifact(tmp_path / "out").manifest
    assert manifest.cache is not None
    assert manifest.cache.split is None
    assert manifest.rows is not None
    assert result.verification is not None
    checked = {one.what.split(" that ")[0] for one in result.verification.comparisons if "ran rows" in one.what}
    assert checked == {"2 ranks", "2 ONNX devices"}


@pytest.mark.slow
def test_a_missing_graph_is_one_line(artifact: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.directory, copy)
    (copy / ROWS_FILE).unlink()
    with pytest.raises(InputFileError, match=r"split_rows\.json"):
        open_artifact(copy)
