"""`kraken-report`: the page says what the artifact and its measurements say, and needs nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.report import report_on
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.options.report import ReportOptions
from kraken_compiler.ranks.trace import COMPUTE, LINK, RUN, Span, chrome_trace, spans_of_chrome
from kraken_compiler.report.draw import Bar, Point, frontier, timeline
from kraken_compiler.report.page import Section, page
from kraken_compiler.report.sections import frontier_section, quality_section, runs_of
from tests.test_cli_compile import save_model
from tests.test_latency import TOML


class _Page(HTMLParser):
    """Collects what a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    save_model("llama", place / "llama")
    compile_model(place / "llama", place / "llama.kraken", degree=2, form="kraken", verify=False)
    return place / "llama.kraken"


@pytest.fixture
def machine(tmp_path: Path) -> str:
    (tmp_path / "machine.toml").write_text(TOML)
    return str(tmp_path / "machine.toml")


def trace(folder: Path) -> Path:
    """Two ranks, a prefill and a step each."""
    spans = [
        *(Span("compute", COMPUTE, 0.0, 0.01), Span("start reduce 0", COMPUTE, 0.01, 0.011)),
        *(Span("wait reduce 0", COMPUTE, 0.011, 0.02), Span("reduce 0", LINK, 0.01, 0.02)),
        Span("prefill", RUN, 0.0, 0.02),
        *(Span("compute", COMPUTE, 0.03, 0.04), Span("step", RUN, 0.03, 0.04)),
    ]
    file = folder / "trace.json"
    file.write_text(json.dumps(chrome_trace([spans, spans])))
    return file


def test_traces_are_read_as_they_were_written(tmp_path: Path) -> None:
    spans = spans_of_chrome(json.loads(trace(tmp_path).read_text()), 1)
    prefill, step = runs_of(spans)
    assert [span.name for span in prefill] == [
        *("compute", "start reduce 0", "wait reduce 0", "reduce 0", "prefill"),
    ]
    assert (step[0].begin, step[0].end) == pytest.approx((0.0, 0.01))


def test_a_page_of_all_there_is(artifact: Path, tmp_path: Path, machine: str) -> None:
    file = tmp_path / "report.html"
    report_on(artifact, file, ReportOptions(machine=machine, trace=trace(tmp_path), prompt=32))
    text = file.read_text()
    shown = _Page(text)
    headings = [
        shown.words[at] for at, word in enumerate(shown.words) if word in ("Model", "Layers", "Predicted times")
    ]
    assert headings == ["Model", "Layers", "Predicted times"]
    assert sum(tag == "svg" for tag, _ in shown.tags) == 8, "whole and middle, predicted and measured, prefill and step"
    assert any("a prefill of 32 tokens, measured on rank 0: 20 ms" in word for word in shown.words)
    assert any("no communication" in word for word in shown.words)
    # Nothing is fetched: no scripts, no links to elsewhere.
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in shown.tags}
    assert not re.search(r"https?://", text)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []


def test_of_many_decode_steps_the_median_is_shown(artifact: Path, tmp_path: Path, machine: str) -> None:
    ends = (0.5, 0.004, 0.003)
    begins = (0.0, 1.0, 2.0)
    runs = [(begin, begin + seconds) for begin, seconds in zip(begins, ends)]
    spans = [span for run in runs for span in (Span("compute", COMPUTE, *run), Span("step", RUN, *run))]
    (tmp_path / "trace.json").write_text(json.dumps(chrome_trace([spans])))
    report_on(
        artifact,
        tmp_path / "report.html",
        ReportOptions(machine=machine, trace=tmp_path / "trace.json", prompt=32),
    )
    assert "a decode step, measured on rank 0, the median of 3: 4 ms" in (tmp_path / "report.html").read_text()


def test_without_a_machine_there_are_no_times(artifact: Path, tmp_path: Path) -> None:
    report_on(artifact, tmp_path / "report.html")
    assert "Predicted times" not in (tmp_path / "report.html").read_text()
    with pytest.raises(UsageError, match="name a --machine"):
        report_on(artifact, tmp_path / "report.html", ReportOptions(trace=trace(tmp_path)))


def test_costs_of_layers_are_shown_where_they_are_known(artifact: Path, tmp_path: Path) -> None:
    costs = [{"form": "kraken", "first": layer, "last": layer, "kl": 0.125, "top1_agreement": 1.0} for layer in (0, 1)]
    costs[1]["kl"] = None
    source = open_artifact(artifact).manifest.source.sha256
    record: dict[str, Any] = {"source": source, "degree": 2, "lanes": "", "text": "", "tokens": 1, "digest": ""}
    file = Path(f"{artifact}.by-layer.json")

    def shown(**changes: Any) -> str:
        file.write_text(json.dumps(record | {"calibrated": 0, "costs": costs} | changes))
        report_on(artifact, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    try:
        assert shown().count("<td>0.125</td>") == shown().count("<td>not a number</td>") == 1
        assert "<td>0.125</td>" not in shown(degree=3) + shown(source="another")
        for content in ("null", "3", '"abc"', "[]"):
            file.write_text(content)
            with pytest.raises(InputFileError, match="is no record of sensitivities"):
                report_on(artifact, tmp_path / "report.html")
    finally:
        file.unlink()


def test_what_is_no_number_is_shown_as_such() -> None:
    quality = {
        "text": "t",
        "kl": None,
        "top1_agreement": 0.5,
        "perplexity": None,
        "source_perplexity": 2.0,
        "tokens": 9,
    }
    found = quality_section({"calibration": {"quality": [{"before": quality, "after": quality}]}})
    assert found is not None
    assert found.rows[0][1:4] == ("not a number", "50.0%", "not a number")
    one = {"forms": ["kraken"], "kl": None, "spared": 0.5}
    rows = frontier_section({"budget": "b", "frontier": [one, {**one, "kl": 0.5}], "best": None}).rows
    assert [row[1] for row in rows] == ["0", "0.5"]


def test_a_timeline_is_of_a_prompt_that_fits(artifact: Path, tmp_path: Path, machine: str) -> None:
    report_on(artifact, tmp_path / "report.html", ReportOptions(machine=machine))
    assert "a prefill of 32 tokens, predicted" in (tmp_path / "report.html").read_text()
    with pytest.raises(UsageError, match="the model takes sequences of 64 tokens"):
        report_on(artifact, tmp_path / "report.html", ReportOptions(machine=machine, prompt=100_000))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"traceEvents": [{"ph": "X", "name": "k", "pid": 0, "tid": 9, "ts": 0, "dur": 1}]}',
        '{"traceEvents": [{"ph": "X"}]}',
        '{"traceEvents": 3}',
    ],
)
def test_what_is_no_trace_is_refused(artifact: Path, tmp_path: Path, machine: str, content: str) -> None:
    file = tmp_path / "trace.json"
    file.write_text(content)
    with pytest.raises(InputFileError):
        report_on(artifact, tmp_path / "report.html", ReportOptions(machine=machine, trace=file))
    assert not (tmp_path / "report.html").exists()


def test_texts_are_escaped() -> None:
    text = page("<b>", "&", [Section("<script>", ("<i>",), ("<",), [("<td>",)])])
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;" in text
    assert "<script>" not in text
    drawn = timeline([Bar("compute", "wait", '<"&', 0.0, 1.0)], ("compute",), 0.0, 1.0)
    assert "&lt;&quot;&amp;" in drawn


def test_narrow_bars_are_drawn_as_one() -> None:
    bars = [Bar("compute", "products", str(at), at * 1e-4, (at + 1) * 1e-4) for at in range(10_000)]
    drawn = timeline(bars, ("compute",), 0.0, 1.0)
    assert 1000 < drawn.count("<rect") < 3000


def test_the_frontier_shows_what_was_chosen() -> None:
    forms = ["kraken", "standard"]
    one = {"forms": forms, "seconds": 0.01, "spared": 0.5, "kl": 0.1}
    other = {"forms": ["kraken", "kraken"], "seconds": 0.008, "spared": 0.9, "kl": 0.3}
    choice = {"budget": "KL at most 0.2", "best": one, "frontier": [one, other], "standard_seconds": 0.012}
    section = frontier_section(choice)
    assert section.rows == [
        ("standard", "0", "12", ""),
        ("1 kraken, 1 standard", "0.1", "10", "chosen"),
        ("2 kraken", "0.3", "8", ""),
    ]
    assert section.header[2] == "predicted ms of the load"
    assert section.pictures[0].svg.count("<circle") == 3
    in_bytes = frontier_section({**choice, "standard_seconds": None})
    assert [row[2] for row in in_bytes.rows] == ["0", "50", "90"]
    nothing = frontier_section({**choice, "best": None})
    assert [row[3] for row in nothing.rows] == ["chosen", "", ""]
    assert frontier([Point(1.0, 0.0, "alone")], "x", "y").count("<circle") == 1
