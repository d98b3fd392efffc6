"""Report of what the compiler recognised and decided, for people (text) and for programs (dict)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import LaneProgram, parameter_count
from kraken_compiler.ir.schedule import Reduce, Window
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.passes.form.join_streams import NATIVE
from kraken_compiler.passes.manager import PassRecord
from kraken_compiler.passes.shard.degrees import even_degrees, kv_shares, padding, spread
from kraken_compiler.text import format_bytes, table
from kraken_compiler.verify.compare import Comparison
from kraken_compiler.verify.show_schedule import hiding


@dataclass(frozen=True)
class Report:
    """The recognition and schedule report of one lane program.

    Attributes:
        data: Everything, as plain values that serialize to JSON.
    """

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return self.data

    @property
    def text(self) -> str:
        """The report as a page of plain text."""
        return "\n".join(self.lines())

    def __str__(self) -> str:
        return self.text

    def lines(self) -> list[str]:
        data = self.data
        exact = "computes what the source model computes" if data["exact"] else "changes the function of the model"
        return [
            f"{data['model_class'] or 'model'}: {len(data['layers'])} layers, degree {data['degree']}, {exact}",
            _padding_line(data["padding"], data["degrees_without_padding"]),
            "",
            *table(("lane", "parameters", "bytes", "heads", "KV heads"), map(_lane_row, data["lanes"])),
            "",
            *table(
                ("layer", "module", "form", "reduces", "bytes/token", "window (matrix products)"),
                _layer_rows(data["layers"]),
            ),
            *_embedding_lines(data["embedding"]),
            *([data["halves"]] if data["halves"] else []),
            *(f"note      {note}" for note in data["notes"]),
            *_check_lines(data.get("check")),
        ]

    def with_halves(self, program: LaneProgram) -> Report:
        """The report with the halves that a program still has after it was compared with the model."""
        return Report({**self.data, "halves": _halves(program)})

    def with_check(
        self, comparisons: Sequence[Comparison], notes: Sequence[str], skipped: Sequence[str], seconds: float
    ) -> Report:
        """The report with the result of a comparison with the model, and its duration."""
        check = {
            "seconds": seconds,
            "comparisons": [comparison.to_dict() for comparison in comparisons],
            "skipped": list(skipped),
        }
        return Report({**self.data, "notes": [*self.data["notes"], *notes], "check": check})


def make_report(program: LaneProgram, history: Sequence[PassRecord] = (), notes: Sequence[str] = ()) -> Report:
    """Summarize a lane program.

    Args:
        program: A scheduled lane program.
        history: The records of the passes that made it.
        notes: What a user should know about the capture, one sentence each.
    """
    layers, plan = program.layers, program.plan
    attentions = [branch for branch in layers.branches if branch.kind == "attention"]
    windows = {window.reduce: window for window in program.windows}
    # The branches of a model with lanes of its own are a lane's already.
    shared_by = 1 if NATIVE in plan.forms else program.degree
    heads = spread(attentions[0].heads, shared_by, attentions[0].unit)[0]
    lane = {
        "parameters": parameter_count(program),
        "bytes": sum(spec.nbytes for spec in program.weights.values()),
        "heads": heads.stop - heads.start,
        "kv_heads": _kv_heads_of_a_lane(attentions[0], shared_by),
    }
    rows = []
    for layer in layers.layers:
        last = {branch.index for branch in layer.branches}
        reduces = [reduce for reduce in plan.reduces if reduce.last in last and not reduce.is_lookup]
        rows.append(
            {
                "layer": layer.index,
                "module": layer.path,
                "form": plan.forms[layer.index],
                "parallel": layer.parallel,
                "branches": [
                    {
                        "kind": branch.kind,
                        "module": branch.path,
                        "heads": branch.heads,
                        "kv_heads": branch.kv_heads,
                        "columns": branch.columns,
                    }
                    for branch in layer.branches
                ],
                "reduces": [_reduce_entry(reduce, windows.get(reduce.index)) for reduce in reduces],
            }
        )
    return Report(
        {
            "model_class": program.call.model_class,
            "degree": program.degree,
            "exact": is_exact(program),
            "padding": {kind: padding(layers, shared_by, kind) for kind in ("attention", "ffn")},
            "degrees_without_padding": [program.degree] if NATIVE in plan.forms else list(even_degrees(layers)),
            "lanes": [{"lane": index, **lane} for index in range(program.degree)],
            "embedding": [_reduce_entry(one, windows.get(one.index)) for one in plan.reduces if one.is_lookup],
            "layers": rows,
            "halves": _halves(program),
            "passes": [vars(record) for record in history],
            "notes": list(notes),
        }
    )


def _halves(program: LaneProgram) -> str:
    """What runs in two halves, and what hides its reduces, in words; "" if nothing does."""
    split = program.cached.split if program.cached is not None else None
    halves = split or program.rows
    if halves is None:
        return ""
    windows = measure_windows(halves.program.graph, halves.plan)
    return f"{'prefills' if split else 'batches'} in two halves: {len(windows)} reduces, {hiding(windows)}"


def _check_lines(check: dict[str, Any] | None) -> list[str]:
    if check is None:
        return []
    if not check["comparisons"]:
        return ["", *check["skipped"]]
    sizes = ", ".join("{} x {}".format(*entry["sizes"]) for entry in check["comparisons"])
    worst = max(entry["max_rel_error"] for entry in check["comparisons"])
    summary = (
        f"checked against the model at batch x sequence {sizes}: relative error {worst:.1e}, {check['seconds']:.1f} s"
    )
    return ["", summary, *check["skipped"]]


def _kv_heads_of_a_lane(branch: Branch, degree: int) -> int:
    kv_heads = branch.kv_heads or branch.heads
    if branch.heads % kv_heads:
        return max(1, kv_heads // degree)
    start, stop = kv_shares(branch.heads, kv_heads, degree, branch.unit)[0]
    return stop - start


def is_exact(program: LaneProgram) -> bool:
    """True if every branch reads what it reads in the source model, so that the function is unchanged."""
    return all(
        read.own == branch.reads and (read.peers == branch.reads or program.degree == 1)
        for read, branch in zip(program.plan.reads, program.layers.branches, strict=True)
    )


def _reduce_entry(reduce: Reduce, window: Window | None) -> dict[str, Any]:
    return {
        "reduce": reduce.index,
        "branches": [reduce.first, reduce.last],
        "awaited_by_branch": reduce.awaited_by,
        "bytes_per_token": reduce.bytes_per_token,
        "window_branches": list(reduce.window),
        "window_gemms": list(window.gemms) if window else [],
    }


def _embedding_lines(reduces: Sequence[dict[str, Any]]) -> list[str]:
    """A line on embeddings of which a lane has its own rows; none if all lanes have all rows."""
    if not reduces:
        return []
    sums = "1 reduce" if len(reduces) == 1 else f"{len(reduces)} reduces"
    width = sum(reduce["bytes_per_token"] for reduce in reduces)
    return [f"a lane looks up its own rows of the embedding: {sums} more, {width} bytes/token, where the stream begins"]


def _padding_line(shares: dict[str, float], without: Sequence[int]) -> str:
    """A line on how unevenly the model is divided, and on the degrees that divide it evenly."""
    more = [f"{share:.1%} more {what}" for share, what in _padding_shares(shares) if share]
    degrees = ", ".join(map(str, without))
    return f"lanes compute {' and '.join(more) or 'nothing twice'}; degrees without padding: {degrees}"


def _padding_shares(shares: dict[str, float]) -> tuple[tuple[float, str], ...]:
    return (shares["attention"], "heads than the model has"), (shares["ffn"], "FFN columns than the model has")


def _lane_row(lane: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(lane["lane"]),
        f"{lane['parameters']:,}",
        format_bytes(lane["bytes"]),
        str(lane["heads"]),
        str(lane["kv_heads"]),
    )


def _layer_row(layer: dict[str, Any]) -> tuple[str, ...]:
    reduces = layer["reduces"]
    windows = [str(len(reduce["window_gemms"])) if reduce["window_gemms"] else "none" for reduce in reduces]
    return (
        str(layer["layer"]),
        layer["module"],
        layer["form"],
        str(len(reduces)),
        str(sum(reduce["bytes_per_token"] for reduce in reduces)),
        ", ".join(windows),
    )


def _layer_rows(layers: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for every run of layers that differ in nothing but their number."""
    rows = []
    for _, run in itertools.groupby(layers, key=lambda layer: _layer_row(layer)[2:]):
        first, *rest = run
        row = _layer_row(first)
        if rest:
            last = _layer_row(rest[-1])
            row = (f"{row[0]}-{last[0]}", f"{row[1]} ... {last[1]}", *row[2:])
        rows.append(row)
    return rows
