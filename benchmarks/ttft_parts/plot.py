"""The medians as bars: one panel per workload, metric, dtype and prompt, one group of bars per link."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttft_parts.ratios import METRICS, best_modes, of_families

_COLORS = {
    "tp_plan": "#9c9c9c",
    "dtensor": "#c9c9c9",
    "standard": "#4c78a8",
    "standard+split": "#9ecae9",
    "kraken": "#e45756",
    "kraken+split": "#ff9d98",
    "ladder": "#f2a65a",
    "delayed": "#b279a2",
    "sync-drop": "#72b7b2",
    "sync-drop+split": "#b2dfdb",
    "bound": "#2f2f2f",
    "single": "#9c755f",
}


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw the document's medians, each family in the mode that the ratios take.

    Raises:
        ImportError: matplotlib is not installed (the `bench` extra).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for workload in document["workloads"] for metric in METRICS for row in _rows(workload, metric)]
    columns = max((len(prompts) for *_, prompts in rows), default=1)
    size = (7.4 * columns, 3.4 * max(1, len(rows)))
    figure, axes = plt.subplots(max(1, len(rows)), columns, figsize=size, squeeze=False, layout="constrained")
    for line, (workload, metric, dtype, prompts) in zip(axes, rows):
        for axis in line[len(prompts) :]:
            axis.set_visible(False)
        for axis, prompt in zip(line, prompts):
            _panel(axis, workload, metric, dtype, prompt)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rows(workload: Mapping[str, Any], metric: str) -> list[tuple[Mapping[str, Any], str, str, list[int]]]:
    measured = [cell for cell in workload["cells"] if cell[metric]]
    return [
        (workload, metric, dtype, list(dict.fromkeys(cell["prompt"] for cell in measured if cell["dtype"] == dtype)))
        for dtype in dict.fromkeys(cell["dtype"] for cell in measured)
    ]


def _panel(axis: Any, workload: Mapping[str, Any], metric: str, dtype: str, prompt: int) -> None:
    families = of_families(workload["cells"], metric)
    modes = best_modes(workload["cells"], metric)
    links = list(dict.fromkeys(cell["link"] for cell in workload["cells"]))
    shown = [family for family in _COLORS if any(place[:2] == (dtype, prompt) for place in families.get(family, {}))]
    width = 0.8 / max(1, len(shown))
    for index, family in enumerate(shown):
        samples = (families[family].get((dtype, prompt, link), [math.nan]) for link in links)
        values = [statistics.median(found) * 1e3 for found in samples]
        places = [group + (index - (len(shown) - 1) / 2) * width for group in range(len(links))]
        axis.bar(places, values, width, color=_COLORS[family], label=f"{family} ({modes[dtype, family]})")
    axis.set_xticks(range(len(links)), [link if link == "unlimited" else f"{link} Gbit/s" for link in links])
    axis.set_ylabel(f"{metric.upper()}, ms")
    axis.set_title(f"{workload['name']}, {dtype}, prompt {prompt}", fontsize=10)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
