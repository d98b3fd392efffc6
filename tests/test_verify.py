"""Verification finds what is broken: a weight, a shard, a lane file, a schedule; and says where."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
from kraken_compiler.backends.lane_graph.graph_file import save_graph
from kraken_compiler.backends.lane_graph.lane_files import GRAPH_FILE, lane_file, read_weights
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.capture import capture
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.lanes.reference import ReadLane, read_from_source
from kraken_compiler.passes.sample_inputs import position_limit, sample_inputs, token_input, vocabulary
from kraken_compiler.verify.against_source import compare_with_source
from kraken_compiler.verify.compare import Comparison, errors, largest_errors, worst_comparison
from kraken_compiler.verify.noise import measure_noise
from kraken_compiler.verify.overlap import require_overlap
from kraken_compiler.verify.tolerances import NOISE_FACTOR, rank_tolerance, source_tolerance
from kraken_compiler.verify.verification import Verification, verify_programs
from kraken_compiler.weights.store import MemoryStore
from tests.test_families import lane_program, recognized
from tests.zoo import SUPPORTED

pytestmark = pytest.mark.slow

SIZES = ((2, 5),)
NAME = "plain_gpt"
START, WAIT = torch.ops.kraken.all_reduce_start.default, torch.ops.kraken.wait.default


def compare(standard: Program, captured_read: SourceReader | None = None) -> Comparison:
    source = recognized(NAME)
    (comparison,) = compare_with_source(source.captured, standard, captured_read or source.read, SIZES)
    return comparison


def with_weight(program: Program, source: str, change: Callable[[Any], Any]) -> Program:
    """A program whose weight-table entries for one source tensor are changed."""
    broken = program.copy()
    names = [name for name, spec in program.weights.items() if spec.source == source]
    assert names, source
    broken.weights.update({name: change(broken.weights[name]) for name in names})
    return broken


def swapped(spec: Any) -> Any:
    """The lanes hold each other's parts."""
    return replace(spec, shards=tuple(replace(shard, lanes=shard.lanes[::-1]) for shard in spec.shards))


# against the source --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standard() -> Program:
    return lane_program(NAME, 2, "standard")


def test_a_right_program_passes(standard: Program) -> None:
    comparison = compare(standard)
    assert comparison.passed
    assert comparison.first_diverging == ""
    assert comparison.max_rel_error < 1e-5
    assert comparison.sizes == SIZES[0]
    Verification((comparison,)).require_passed()


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("blocks.1.o.weight", "layer 1, attention (blocks.1)"),
        ("blocks.2.ffn.2.weight", "layer 2, ffn (blocks.2"),
        ("blocks.0.q.bias", "layer 0, attention (blocks.0)"),
    ],
)
def test_swapped_shards_are_found_where_they_are(standard: Program, weight: str, where: str) -> None:
    comparison = compare(with_weight(standard, weight, swapped))
    assert not comparison.passed
    assert comparison.first_diverging.startswith(where)
    with pytest.raises(
        VerificationError, match=r"computes something else: standard form .* FAILED, relative error"
    ) as e:
        Verification((comparison,)).require_passed()
    assert where in str(e.value)


def test_a_bias_that_every_lane_adds_is_found(standard: Program) -> None:
    comparison = compare(with_weight(standard, "blocks.1.o.bias", lambda spec: replace(spec, scale=1.0)))
    assert comparison.first_diverging.startswith("layer 1, attention")


def test_a_wrong_embedding_is_found(standard: Program) -> None:
    comparison = compare(with_weight(standard, "positions.weight", lambda spec: replace(spec, scale=0.5)))
    assert comparison.first_diverging == "the embedding"


def test_one_changed_number_in_the_weights_is_found(standard: Program) -> None:
    """The lanes read one value that differs from the source's."""
    broken = standard.copy()
    (name,) = [name for name, spec in broken.weights.items() if spec.source == "blocks.1.ffn.0.weight"]
    broken.weights[name] = replace(broken.weights[name], source="broken")
    value = recognized(NAME).read("blocks.1.ffn.0.weight").clone()
    value[3, 5] += 5
    broken.constants["broken"] = value
    assert compare(broken).first_diverging.startswith("layer 1, ffn")


def test_a_changed_form_is_no_standard_form() -> None:
    comparison = compare(lane_program(NAME, 2, "sync-drop"))
    assert not comparison.passed
    assert comparison.max_rel_error > 1e-2


def test_not_a_number_never_passes(standard: Program) -> None:
    comparison = compare(with_weight(standard, "blocks.1.o.bias", lambda spec: replace(spec, scale=math.nan)))
    assert not comparison.passed
    assert math.isnan(comparison.max_rel_error)
    assert "not finite: 970 of the values that the standard form computes, none of the source" in str(comparison)
    assert comparison.first_diverging.startswith("layer 1")


def test_the_noise_of_rounding_is_allowed_and_no_more(standard: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured where the usual tolerance is exceeded; a program that computes something else is found all the same."""
    assert compare(standard).noise is None
    monkeypatch.setattr("kraken_compiler.verify.tolerances._SOURCE_TOLERANCE", {"float32": 1e-9})
    comparison = compare(standard)
    assert comparison.passed
    assert comparison.noise is not None
    assert 1e-8 < comparison.noise < 1e-5
    assert comparison.tolerance == NOISE_FACTOR * comparison.noise
    assert f"for its rounding alone makes {comparison.noise:.1e}" in str(comparison)
    broken = compare(with_weight(standard, "positions.weight", lambda spec: replace(spec, scale=0.9)))
    assert not broken.passed
    assert broken.first_diverging == "the embedding"


def test_noise_follows_the_element_type_and_the_condition() -> None:
    class Powers(nn.Module):
        """Cancels almost all of what it computes."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * x + 1e4) - 1e4

    def noise(module: nn.Module, dtype: torch.dtype) -> float:
        program = capture(module, example_inputs=(torch.ones(2, 3, dtype=dtype),)).program
        inputs = list(sample_inputs(program, 2, 3).values())
        results = [measure_noise(program, read_from_source(program, MemoryStore({}).read), inputs) for _ in range(2)]
        assert results[0] == results[1], "the same every time"
        return results[0]

    assert noise(Powers(), torch.float32) > 1e-4
    assert noise(nn.Tanh(), torch.float32) == pytest.approx(2**-23, rel=0.1)
    assert noise(nn.Tanh(), torch.float64) == pytest.approx(2**-52, rel=0.1)


# against ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kraken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program, read = lane_program(NAME, 2, "kraken"), recognized(NAME).read
    target = tmp_path_factory.mktemp("verify") / "kraken"
    source = Source(kind="module", name=NAME)
    return write_artifact(program, program.reader(read), target, source=source, backends=[TorchBackend()])


@pytest.fixture
def artifact(kraken: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(kraken, tmp_path / "kraken"))


def rehash(artifact: Path) -> None:
    """Make the manifest agree with the files again, as whoever tampers with them on purpose would."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        content = (artifact / name).read_bytes()
        record.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    open_artifact(artifact)


def test_ranks_that_compute_the_same_pass(kraken: Path) -> None:
    verification = verify_programs(kraken, ((1, 7), (3, 4)))
    comparisons, windows = verification.comparisons, verification.windows
    assert [comparison.sizes for comparison in comparisons] == [(1, 7), (1, 7), (3, 4), (3, 4)]
    assert all(comparison.passed and comparison.max_rel_error < 1e-5 for comparison in comparisons)
    assert all("2 ranks against the lanes in one process" in str(comparison) for comparison in comparisons[::2])
    assert all("2 ranks with a KV cache against the lanes without" in str(one) for one in comparisons[1::2])
    assert sum(bool(window.promised) for window in windows) == 2


def test_a_rank_that_computes_something_else(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of lane 1's file is changed after the reference was taken, and the manifest with it."""
    path = artifact / lane_file(1)
    tensors = load_file(path)
    name = next(name for name in tensors if "ffn_2_weight" in name)
    whole = {key: value.clone() for key, value in tensors.items()}
    tensors[name][0, 0] += 3
    save_file(tensors, path)
    rehash(artifact)

    def untampered(artifact: Artifact, degree: int) -> ReadLane:
        read = read_weights(artifact, degree)
        return lambda spec, lane: whole[spec.name] if lane == 1 and spec.name in whole else read(spec, lane)

    monkeypatch.setattr("kraken_compiler.backends.lane_graph.lane_files.read_weights", untampered)
    comparison, cached = verify_programs(artifact, SIZES, timeout=60).comparisons
    for found in (comparison, cached):
        assert not found.passed
        assert found.max_rel_error > 1e-3
    with pytest.raises(VerificationError, match="2 ranks against the lanes in one process"):
        Verification((comparison,)).require_passed()


# the schedule --------------------------------------------------------------------------------------------------------


def emptied(program: Program) -> Program:
    """A program whose first promised wait stands right behind its start."""
    broken = program.copy()
    window = next(window for window in program.windows if window.promised)
    nodes = {node.name: node for node in broken.graph.nodes}
    nodes[window.start].append(nodes[window.wait])
    broken.module.recompile()
    return broken


def test_an_emptied_window_is_found() -> None:
    program = lane_program(NAME, 2, "kraken")
    require_overlap(check_schedule(program.module, program.plan))
    windows = check_schedule(emptied(program).module, program.plan)
    with pytest.raises(
        VerificationError, match=r"1 of 4 reduces lost their overlap: no matrix multiplication .*reduce"
    ):
        require_overlap(windows)


def test_an_emptied_window_still_computes_the_same() -> None:
    """So no comparison of numbers would find it."""
    program, read = lane_program(NAME, 2, "kraken"), recognized(NAME).read
    ids = torch.arange(10).view(2, 5)
    whole, broken = (LaneModule.from_program(made, read).run_flat([ids])[0] for made in (program, emptied(program)))
    assert torch.equal(whole, broken)


def test_an_artifact_that_lost_its_overlap_is_found(artifact: Path) -> None:
    save_graph(emptied(lane_program(NAME, 2, "kraken")).graph, artifact / GRAPH_FILE)
    rehash(artifact)
    with pytest.raises(VerificationError, match="lost their overlap"):
        verify_programs(artifact, SIZES)


def test_a_reduce_that_is_never_awaited_is_found() -> None:
    program = lane_program(NAME, 2, "kraken").copy()
    wait = next(node for node in program.graph.nodes if node.target is WAIT)
    wait.replace_all_uses_with(wait.args[0].args[0])
    program.graph.erase_node(wait)
    with pytest.raises(VerificationError, match="must go to its wait and only there"):
        check_schedule(program.module, program.plan)


# what it is tried on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt", "plain_gpt", "plain_alibi"])
def test_tokens_are_drawn_from_the_vocabulary(name: str) -> None:
    """Also where the model reshapes them before it looks them up, as GPT-2 does."""
    program = recognized(name).captured
    spec = token_input(program)
    assert spec is not None
    assert spec.name == "input_ids"
    assert vocabulary(program) == SUPPORTED[name].vocab
    ids = sample_inputs(program, 4, 50)["input_ids"]
    assert ids.shape == (4, 50)
    assert len(ids.unique()) > 60
    # OPT has two rows more than it has positions.
    assert (position_limit(program) <= 66) == (name != "plain_alibi")


# the measure ---------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    want = torch.tensor([[1.0, -4.0]])
    assert errors(want + 0.5, want) == (0.5, 0.125)
    assert errors(torch.zeros(2), torch.zeros(2)) == (0, 0)
    assert errors(torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)) == (math.inf, math.inf)
    one, nan = (torch.ones(1), torch.ones(1)), (torch.full((1,), math.nan), torch.ones(1))
    assert largest_errors(one, one) == (0, 0)
    assert all(map(math.isnan, largest_errors((one[0], nan[0]), one)))


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
def test_what_is_filled_in_hides_no_error(fill: float) -> None:
    want = torch.tensor([[1.0, -4.0, fill], [2.0, 3.0, fill]])
    assert errors(want, want) == (0, 0)
    wrong = want.clone()
    wrong[0, 0] += 0.5
    assert errors(wrong, want) == (0.5, 0.125)
    wrong[1, 2] = -5.0
    assert not errors(wrong, want)[1] < 0.5, "and it must be filled in alike"
    everywhere = torch.full((4,), fill)
    assert errors(everywhere, everywhere) == (0, 0)
    once = torch.tensor([1.0, -math.inf])
    assert errors(once, once) == (0, 0)
    assert not errors(torch.zeros(4), everywhere)[1] < 0.5


def test_large_values_are_a_measure_where_they_are_computed() -> None:
    want = torch.tensor([1000.0, 1000.5, 1.0, 2.0])
    assert errors(want + torch.tensor([0.0, 0.0, 0.1, 0.0]), want)[1] == pytest.approx(1e-4, rel=1e-2)


def test_a_rank_that_computes_nan_is_never_hidden_by_others() -> None:
    want = (torch.ones(2, 3),)
    wrong = (torch.tensor([[1.0, math.nan, math.inf], [1.0, 1.0, 1.0]]),)
    for ranks, rank in (((wrong, want), 0), ((want, wrong), 1)):
        comparison = worst_comparison("ranks", (1, 2), ranks, want, 1e-5, 0.0)
        assert not comparison.passed
        assert str(comparison) == (
            f"ranks (worst: rank {rank}), batch 1 x 2: FAILED, "
            f"not finite: 2 of the values that rank {rank} computes, none of the lanes"
        )
    # The other side may be to blame.
    assert "none of the values that rank 0 computes, 2 of the lanes" in str(
        worst_comparison("ranks", (1, 2), [want], wrong, 1e-5, 0.0)
    )


def test_tolerances_follow_the_element_type() -> None:
    ordered = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    for tolerance in (source_tolerance, partial(rank_tolerance, noise=0.0)):
        tolerances = [tolerance([dtype]) for dtype in ordered]
        assert tolerances == sorted(tolerances)
    assert source_tolerance([torch.float64, torch.float32]) == 1e-4
    assert rank_tolerance([torch.float32], 0) == 1e-5
    # An ill-conditioned program may be as far off as rounding alone makes it, up to a limit.
    assert rank_tolerance([torch.float32], 1e-4) == pytest.approx(1e-3)
    assert rank_tolerance([torch.float32], 1.0) == 1e-2


def test_a_verification_as_text_and_as_values() -> None:
    good = Comparison("one", (1, 2), 1e-6, 1e-7, 1e-4)
    bad = Comparison("two", (1, 2), 2.0, 0.5, 1e-4, "layer 3, ffn (h.3.mlp)")
    verification = Verification((good, bad), skipped=("something: no reason",))
    data = json.loads(json.dumps(verification.to_dict()))
    assert (data["program"]["max_abs_error"], data["program"]["max_rel_error"]) == (2.0, 0.5)
    assert [entry["passed"] for entry in data["program"]["comparisons"]] == [True, False]
    assert data["skipped"] == ["something: no reason"]
    text = "\n".join(verification.lines())
    assert "one, batch 1 x 2: ok" in text
    assert "two, batch 1 x 2: FAILED, relative error 5.0e-01" in text
    assert "first diverging: layer 3, ffn (h.3.mlp)" in text
    assert "skipped   something: no reason" in text
