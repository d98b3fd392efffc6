"""Pictures of a page as SVG: timelines of a device and its link, and quality against what is saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLORS = {
    "products": "#4c78a8",
    "attention": "#72b7b2",
    "others": "#9ecae9",
    "compute": "#4c78a8",
    "launch": "#d8d8d8",
    "busy": "#f2a65a",
    "wait": "#e45756",
    "reduce": "#b279a2",
}
"""By what a stream is taken by."""
_WIDTH, _ROW, _LABEL = 1080.0, 26.0, 70.0
_LEAST = 0.4
"""Narrower bars, in pixels, are drawn as one with what follows."""


@dataclass(frozen=True)
class Bar:
    """Something that takes a stream.

    Attributes:
        stream: Which one.
        kind: A key of `COLORS`.
        name: What it is, shown under the pointer.
        begin, end: Seconds.
    """

    stream: str
    kind: str
    name: str
    begin: float
    end: float


def timeline(bars: Sequence[Bar], streams: Sequence[str], begin: float, end: float) -> str:
    """Bars on their streams, from one time to another.

    Args:
        bars: In the order of their beginnings.
        streams: From the top.
        begin, end: Seconds.
    """
    scale = (_WIDTH - _LABEL) / max(end - begin, 1e-12)
    height = _ROW * len(streams) + 16
    parts = [f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" class="timeline" role="img">']
    for row, stream in enumerate(streams):
        top = _ROW * row
        parts.append(f'<text x="0" y="{top + 16:g}">{escape(stream)}</text>')
        shown = [bar for bar in bars if bar.stream == stream and bar.end > begin and bar.begin < end]
        for bar in _joined(shown, _LEAST / scale):
            left, right = (_LABEL + (min(max(at, begin), end) - begin) * scale for at in (bar.begin, bar.end))
            title = f"{bar.name}: {(bar.end - bar.begin) * 1e6:,.1f} us"
            parts.append(
                f'<rect x="{left:.2f}" y="{top + 3:g}" width="{max(right - left, 0.2):.2f}" height="{_ROW - 6:g}" '
                f'fill="{COLORS[bar.kind]}"><title>{escape(title)}</title></rect>'
            )
    for part in range(5):
        at = begin + (end - begin) * part / 4
        anchor = ("start", "middle", "middle", "middle", "end")[part]
        x = _LABEL + (at - begin) * scale
        parts.append(
            f'<text x="{x:.1f}" y="{height - 3:g}" text-anchor="{anchor}" class="axis">{at * 1e3:.3g} ms</text>'
        )
    return "".join([*parts, "</svg>"])


def _joined(bars: Iterable[Bar], least: float) -> Iterable[Bar]:
    """Bars that are wide enough to be seen: narrow neighbours become one of the kind that takes most of them."""
    group: list[Bar] = []
    for bar in bars:
        if group and bar.begin - group[-1].end > least:
            yield _one(group)
            group = []
        group.append(bar)
        if group[-1].end - group[0].begin >= least:
            yield _one(group)
            group = []
    if group:
        yield _one(group)


def _one(group: Sequence[Bar]) -> Bar:
    if len(group) == 1:
        return group[0]
    longest = max(group, key=lambda bar: bar.end - bar.begin)
    return Bar(longest.stream, longest.kind, f"{longest.name} and {len(group) - 1} more", group[0].begin, group[-1].end)


@dataclass(frozen=True)
class Point:
    """A choice of forms.

    Attributes:
        x: What it takes, or what it saves.
        y: KL to the source.
        label: What it is, shown under the pointer.
        chosen: It is the artifact's.
    """

    x: float
    y: float
    label: str
    chosen: bool = False


def frontier(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Points of quality against what is saved."""
    width, height, left, right, bottom = 560.0, 300.0, 60.0, 60.0, 40.0
    most_x, most_y = (max([*values, 1e-12]) * 1.08 for values in ([one.x for one in points], [one.y for one in points]))
    least_x = min(one.x for one in points) * 0.92

    def place(point: Point) -> tuple[float, float]:
        across = (point.x - least_x) / (most_x - least_x)
        return left + across * (width - left - right), height - bottom - point.y / most_y * (height - bottom - 10)

    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" class="frontier" role="img">']
    parts.append(f'<path d="M{left} 5V{height - bottom}H{width - 5}" fill="none" stroke="#999"/>')
    for point in points:
        x, y = place(point)
        color = COLORS["wait"] if point.chosen else COLORS["products"]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"><title>{escape(point.label)}</title></circle>'
            f'<text x="{x + 8:.1f}" y="{y - 6:.1f}" class="axis">{point.y:.3g}</text>'
        )
    for share in (0.0, 0.5, 1.0):
        at = least_x + (most_x - least_x) * share
        x = left + share * (width - left - right)
        parts.append(f'<text x="{x:.1f}" y="{height - 22:g}" text-anchor="middle" class="axis">{at:.3g}</text>')
    parts.append(f'<text x="{width / 2:g}" y="{height - 5:g}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text x="4" y="14">{escape(y_title)}</text>')
    return "".join([*parts, "</svg>"])
