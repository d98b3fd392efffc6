from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from kraken_compiler.errors import InputFileError, UnsupportedModelError, UsageError
from kraken_compiler.ir.forms import FORMS
from kraken_compiler.passes.lower import find_degree, lower
from kraken_compiler.passes.pipelines import CACHE, RECOGNIZE, schedule_as, split_over
from kraken_compiler.verify.report import make_report
from tests.passes.helpers import Sample, captured
from tests.passes.models import Attention, Ffn, Gpt


@cache
def sample() -> Sample:
    return captured(Gpt(layers=2, attention=lambda: Attention(2)))


def refusal(**options: object) -> str:
    with pytest.raises(UsageError) as caught:
        lower(sample().program, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("karken", "kraken"), ("Standard", "standard"), ("sync_drop", "sync-drop"), ("laddr", "ladder"), ("", "standard")],
)
def test_an_unknown_form_suggests_the_nearest(typo: str, meant: str) -> None:
    message = refusal(degree=2, form=typo)
    assert f"there is no form '{typo}'" in message
    assert f"did you mean '{meant}'" in message or not typo
    assert all(name in message for name in FORMS)


@pytest.mark.parametrize("degree", [5, 8, 0, -2])
def test_a_wrong_degree_lists_the_valid_ones(degree: int) -> None:
    message = refusal(degree=degree)
    assert f"the model cannot be divided among {degree} lanes (4 heads, 2 KV heads, FFN columns 24)" in message
    assert message.endswith("valid degrees: 1 to 4, without padding: 1, 2, 4")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-2", "--layers: the model has layers 0 to 1, there is no layer 2"),
        ([5], "there is no layer 5"),
        ("-3", "there is no layer -3"),
        ("last", "'last' is no layer or range"),
    ],
)
def test_layers_out_of_range(layers: str | list[int], message: str) -> None:
    assert message in refusal(degree=2, layers=layers)


def test_layers_by_number() -> None:
    program, _ = lower(sample().program, 2, "kraken", [-1])
    assert program.plan.forms == ("standard", "kraken")


def test_a_form_for_every_layer() -> None:
    program, _ = lower(sample().program, 2, ["sync-drop", FORMS["kraken"]])
    assert program.plan.forms == ("sync-drop", "kraken")
    assert "3 forms were given for 2 layers" in refusal(degree=2, form=["kraken"] * 3)
    assert "not both" in refusal(degree=2, form=["kraken"] * 2, layers="1")
    assert "did you mean 'kraken'" in refusal(degree=2, form=["krake"] * 2)


def test_the_default_is_kraken_at_the_smallest_degree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    program, history = lower(sample().program)
    assert program.degree == 2
    assert program.plan.forms == ("kraken", "kraken")
    assert [record.name for record in history] == [
        step.name for step in (*RECOGNIZE, *split_over(2), *schedule_as(FORMS["kraken"]), *CACHE)
    ]


def test_the_default_degree_is_the_number_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert lower(sample().program)[0].degree == 4


def test_a_model_that_no_degree_divides_is_padded() -> None:
    odd = captured(Gpt(ffn=lambda: Ffn(columns=25)))
    assert lower(odd.program)[0].degree == 2
    assert lower(odd.program, 1)[0].degree == 1


def test_one_head_cannot_be_divided() -> None:
    layers = sample().recognized.layers
    first, *others = layers.layers
    attention, *rest = first.branches
    single = replace(layers, layers=(replace(first, branches=(replace(attention, heads=1), *rest)), *others))
    with pytest.raises(UnsupportedModelError, match="one attention head"):
        find_degree(None, single)
    assert find_degree(1, single) == 1


def test_graphs_are_dumped_after_every_pass(tmp_path: Path) -> None:
    seen: list[str] = []
    _, history = lower(sample().program, 2, dump_directory=tmp_path / "graphs", progress=seen.append)
    names = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert names == [f"{number:02d}-{record.name}.txt" for number, record in enumerate(history)]
    assert seen == [record.name for record in history]
    assert "kraken.wait" in (tmp_path / "graphs" / names[-1]).read_text()


def test_a_dump_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "graphs").write_text("")
    with pytest.raises(InputFileError, match="cannot write the graph dump"):
        lower(sample().program, 2, dump_directory=tmp_path / "graphs")


def test_the_report_says_what_was_decided() -> None:
    program, history = lower(sample().program, 2, "kraken", "1")
    report = make_report(program, history)
    data = report.to_dict()
    assert data["degree"] == 2
    assert not data["exact"]
    assert [layer["form"] for layer in data["layers"]] == ["standard", "kraken"]
    assert [len(layer["reduces"]) for layer in data["layers"]] == [2, 1]
    assert [lane["kv_heads"] for lane in data["lanes"]] == [1, 1]
    assert "changes the function" in report.text
    assert "computes what the source model computes" in make_report(lower(sample().program, 2, "standard")[0]).text


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_caller_that_needs_no_gradients(mode: type[torch.inference_mode] | type[torch.no_grad]) -> None:
    """Probing needs them all the same, and with constants that were made in that mode."""
    expected, _ = lower(sample().program, 2)
    with mode():
        there = sample().program.copy()
        there.constants.update({name: value.clone() for name, value in there.constants.items()})
        program, _ = lower(there, 2)
    assert program.layers == expected.layers
    assert program.weights == expected.weights


@pytest.mark.parametrize(("degree", "wanted"), [(2, "nothing twice"), (3, "50.0% more heads than the model has")])
def test_the_report_tells_what_is_padded(degree: int, wanted: str) -> None:
    report = make_report(lower(sample().program, degree)[0])
    assert f"lanes compute {wanted}; degrees without padding: 1, 2, 4" in report.lines()
    assert report.data["padding"] == {"attention": {2: 0.0, 3: 0.5}[degree], "ffn": 0.0}
    assert report.data["degrees_without_padding"] == [1, 2, 4]
