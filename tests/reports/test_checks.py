"""What is checked before anything is written or returned, and what is not done without a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends import registry
from kraken_compiler.backends.base import Backend, BackendOptions, RankModel
from kraken_compiler.capture import capture
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.errors import UsageError, VerificationError
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.passes.lower import lower, lower_split
from kraken_compiler.progress import Advance
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.against_model import compare_with_model
from kraken_compiler.verify.choose_sizes import check_sizes
from kraken_compiler.verify.verification import verify_programs
from tests.reports.small_models import EXAMPLE, FFN, LM, TOLERANCE, relative_error, tokens
from tests.toy_lane_program import edit_manifest, write_toy

pytestmark = pytest.mark.slow


class AtOne(LM):
    """Another model for single tokens, as decoders that tell prefill from decode by the length have it."""

    def embed(self, ids: Tensor) -> Tensor:
        x_BSD = super().embed(ids)
        return 3 * x_BSD if ids.shape[1] == 1 else x_BSD


class ForOneText(FFN):
    """Another FFN for a batch of one."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(x_BSD if x_BSD.shape[0] > 1 else x_BSD.abs())


ONES = {"sequence": AtOne, "batch": lambda: LM(ffn=ForOneText)}


@pytest.mark.parametrize(("name", "form"), [("sequence", "standard"), ("batch", "kraken")])
def test_a_branch_for_one_is_found_by_comparing(name: str, form: str) -> None:
    model = ONES[name]()
    lanes = kraken_compiler.transform(model, 2, form, example_inputs=EXAMPLE)
    assert lanes.report is not None
    assert lanes.report.data["notes"] == [f"the {name} size must be at least 2: the model computes something else at 1"]
    with pytest.raises(UsageError, match=f"the {name} size must be at least 2"):
        lanes(tokens(1, 1))
    if form == "standard":
        assert relative_error(lanes, model, 3, 5) < TOLERANCE


def test_the_report_says_what_was_checked_and_what_it_took() -> None:
    lanes = kraken_compiler.transform(LM(), 2, example_inputs=EXAMPLE)
    assert lanes.report is not None
    check = lanes.report.to_dict()["check"]
    assert {tuple(entry["sizes"]) for entry in check["comparisons"]} == {(1, 7), (3, 19), (1, 1), (2, 1)}
    assert all(entry["passed"] for entry in check["comparisons"])
    assert check["seconds"] > 0
    assert "checked against the model" in lanes.report.text


def _swapped(spec: WeightSpec) -> WeightSpec:
    """The lanes hold each other's parts."""
    return replace(spec, shards=tuple(replace(shard, lanes=shard.lanes[::-1]) for shard in spec.shards))


@pytest.mark.parametrize("form", ["standard", "kraken"])
def test_a_wrong_program_is_not_returned(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def wrong(*arguments: object, **options: object) -> object:
        program = lower_split(*arguments, **options)
        name = next(name for name, spec in program.weights.items() if spec.source.endswith("up.weight"))
        program.weights[name] = _swapped(program.weights[name])
        return program

    monkeypatch.setattr("kraken_compiler.commands.transform.lower_split", wrong)
    with pytest.raises(VerificationError, match=r"the program computes something else.*layer 0, ffn"):
        kraken_compiler.transform(LM(), 2, form, example_inputs=EXAMPLE)
    assert kraken_compiler.transform(LM(), 2, form, example_inputs=EXAMPLE, check=False).report is not None


def test_a_mask_that_hides_tokens_is_tried() -> None:
    class OnlyFull(LM):
        """Right for a mask of ones alone, which is what examples hold."""

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids) * mask[:, :, None]

    captured = capture(OnlyFull(), example_inputs=(*EXAMPLE, torch.ones(2, 16, dtype=torch.int64)))
    without = captured.program.copy()
    product = next(node for node in without.graph.nodes if node.target is torch.ops.aten.mul.Tensor)
    product.replace_all_uses_with(product.args[0])
    standard, _ = lower(without, 2, "standard", cached=False)
    found = compare_with_model(captured, standard)
    assert not all(comparison.passed for comparison in found.comparisons)


def test_sizes_lie_inside_the_rules() -> None:
    program = capture(LM(), example_inputs=EXAMPLE).program

    def sizes(*rules: str) -> tuple[tuple[int, int], ...]:
        return check_sizes(replace(program, call=replace(program.call, sizes=rules)))

    assert sizes() == ((1, 7), (3, 19))
    assert sizes("sequence % 2 == 0") == ((1, 6), (3, 18))
    assert sizes("sequence <= 16", "batch >= 2") == ((3, 7), (3, 15))
    assert sizes("batch * sequence <= 16") == ((1, 7), (1, 15))


def test_a_model_that_fails_everywhere_is_said() -> None:
    class Fails(LM):
        def forward(self, ids: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                raise ValueError("this model runs nowhere")
            return super().forward(ids)

    with pytest.raises(VerificationError, match=r"nothing could be compared.*ValueError: this model runs nowhere"):
        kraken_compiler.transform(Fails(), 2, "standard", example_inputs=EXAMPLE)


def test_code_that_differs_while_it_is_traced_is_found() -> None:
    class Differs(LM):
        def embed(self, ids: Tensor) -> Tensor:
            x_BSD = super().embed(ids)
            return x_BSD if torch.compiler.is_exporting() else 2 * x_BSD

    with pytest.raises(VerificationError, match=r"what torch\.export captured, which is not what the model computes"):
        kraken_compiler.transform(Differs(), 2, "kraken", example_inputs=EXAMPLE)


class SilentBackend(Backend[BackendOptions]):
    name: ClassVar[str] = "silent"

    def write(
        self, program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
    ) -> tuple[Window, ...]:
        (directory / "nothing.txt").write_text("nothing")
        return program.windows

    def rank_files(self, artifact: Artifact, rank: int) -> tuple[str, ...]:
        return ()

    def open(self, artifact: Artifact, ranks: Ranks, *, checking: bool = False) -> RankModel:
        raise UsageError("nothing runs it")

    def schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        return artifact.manifest.windows


def test_programs_that_nothing_checks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {**registry.backend_rows(), "silent": f"{__name__}:SilentBackend"}
    monkeypatch.setattr(registry, "backend_rows", lambda: rows)
    model: nn.Module = LM()
    with pytest.raises(UsageError, match="nothing here can check what the backend 'silent' writes; pass --no-verify"):
        compile_model(model, tmp_path / "out", degree=2, backends=("silent",), example_inputs=EXAMPLE)
    assert not (tmp_path / "out").exists()
    made = compile_model(model, tmp_path / "out", degree=2, backends=("silent",), example_inputs=EXAMPLE, verify=False)
    assert made.directory is not None
    with pytest.raises(VerificationError, match="nothing here can check the programs of the backend 'silent'"):
        verify_artifact(made.directory)


@pytest.mark.parametrize(
    ("options", "named"), [({"max_kl": 0.1}, "--max-kl"), ({"max_perplexity_increase": 0.02}, "--max-ppl-increase")]
)
def test_a_plan_has_no_budget(options: dict[str, float], named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{named} .*--plan"):
        compile_model(LM(), None, degree=2, example_inputs=EXAMPLE, calibrate=[tmp_path / "text"], **options)


def test_no_backend_is_no_check(tmp_path: Path) -> None:
    """A program that nobody wrote would pass with nothing compared."""
    with pytest.raises(UsageError, match="no backend is named that writes programs"):
        compile_model(LM(), tmp_path / "out", degree=2, example_inputs=EXAMPLE, backends=())
    edit_manifest(write_toy(tmp_path / "toy", 2), backends={})
    with pytest.raises(VerificationError, match="toy holds no programs"):
        verify_programs(tmp_path / "toy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": "2"}, "the degree must be a whole number, got '2'"),
        ({"degree": 2.0}, r"the degree must be a whole number, got 2\.0"),
        ({"degree": True}, "the degree must be a whole number, got True"),
        ({"degree": 2, "form": None}, "a form must be one of standard, .* got None"),
    ],
)
def test_options_of_the_wrong_type_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kraken_compiler.transform(LM(layers=1), example_inputs=EXAMPLE, **options)


def test_whole_numbers_are_no_element_type(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a model cannot be compiled as int8"):
        compile_model(LM(), None, degree=2, example_inputs=EXAMPLE, dtype=torch.int8)
