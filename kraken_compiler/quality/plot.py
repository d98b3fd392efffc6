"""Draws what a rewrite costs: KL by layer and by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kraken_compiler.errors import InputFileError, UsageError, missing_packages
from kraken_compiler.lanes.evaluate import Quality
from kraken_compiler.quality.sensitivity import Sensitivity, ends, single_layers


def plot_quality(path: Path, quality: Quality | None, sensitivity: Sensitivity | None) -> None:
    """Draw measurements into an image file; its suffix names the format.

    Args:
        path: The file, e.g. `kl.png` or `kl.svg`.
        quality: Gives KL by position.
        sensitivity: Gives KL by layer: what a form costs in every layer alone, and from every layer to the end.

    Raises:
        UsageError: matplotlib is not installed, or does not know the format.
        InputFileError: The file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise missing_packages("drawing a plot", error, extra="bench") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [part for part in (sensitivity, quality) if part is not None]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(6.4 * max(1, len(panels)), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        if isinstance(panel, Sensitivity):
            _by_layer(axis, panel)
        else:
            _by_position(axis, panel)
        axis.set_ylabel("KL to the source (nats/token)")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise InputFileError(f"--plot: cannot write {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)


def _by_layer(axis: Any, sensitivity: Sensitivity) -> None:
    count = max(cost.last for cost in sensitivity.costs) + 1
    for form in dict.fromkeys(cost.form for cost in sensitivity.costs):
        for label, runs in (("that layer alone", single_layers(count)), ("from there on", ends(count))):
            points = [(cost.first, cost.kl) for run in runs if (cost := sensitivity.of(form, run)) is not None]
            if points:
                axis.plot(*zip(*points), marker=".", label=f"{form}, {label}")
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_title("by layer, not calibrated")
    axis.legend()


def _by_position(axis: Any, quality: Quality) -> None:
    axis.plot(quality.by_position.kl, linewidth=1)
    axis.set_xlabel("position")
    axis.set_title(f"by position, {quality.tokens:,} tokens")
