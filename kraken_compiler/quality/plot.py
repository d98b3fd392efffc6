"""Draws what a rewrite costs: KL by layer and by position, and by choices of forms against what these save."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kraken_compiler.errors import InputFileError, UsageError, missing_packages
from kraken_compiler.lanes.evaluate import Quality
from kraken_compiler.quality.budget import Budget, Candidate, Choice
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
    plt = _pyplot()
    panels = [part for part in (sensitivity, quality) if part is not None]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(6.4 * max(1, len(panels)), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        if isinstance(panel, Sensitivity):
            _by_layer(axis, panel)
        else:
            _by_position(axis, panel)
        axis.set_ylabel("KL to the source (nats/token)")
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_choices(path: Path, choices: Mapping[str, Choice], budget: Budget, chosen: Candidate | None) -> None:
    """Draw the choices of forms that searches have measured: what they cost against what the load takes with them.

    That is predicted time where a machine is known, and else the bytes that are waited for. The standard form is at a
    cost of 0.

    Args:
        path: The file, see `plot_quality`.
        choices: What searches found, by what distinguishes them (degrees, say); "" if there is one.
        budget: The limit.
        chosen: The candidate that was taken; None if that is the standard form.

    Raises:
        UsageError, InputFileError: See `plot_quality`.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4))
    by_kl = budget.max_kl is not None
    timed = all(choice.standard_seconds is not None for choice in choices.values())
    for name, choice in choices.items():
        points = [(_takes(one, timed), _cost(one, by_kl)) for one in choice.frontier]
        standard = _standard_takes(choice, timed)
        points += [(standard, 0.0)] if standard is not None else []
        axis.plot(*zip(*sorted(points)), marker="o", linewidth=1, label=name or "measured")
        if standard is not None:
            axis.annotate("standard", (standard, 0.0), (-8, -3), textcoords="offset points", ha="right", fontsize=8)
    if chosen is not None:
        place = (_takes(chosen, timed), _cost(chosen, by_kl))
        axis.plot(*place, marker="o", markersize=12, fillstyle="none", color="black", linestyle="", label="chosen")
    limit = budget.max_kl if by_kl else budget.max_perplexity_increase
    assert limit is not None, "a budget has a limit"
    axis.axhline(limit if by_kl else limit * 100, color="gray", linestyle="--", linewidth=1, label="budget")
    axis.set_ylabel("KL to the source (nats/token)" if by_kl else "increase of the perplexity (%)")
    axis.set_xlabel("predicted time of the load (ms)" if timed else "all-reduce bytes per token that are waited for")
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def require_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before there is anything to draw.

    Raises:
        UsageError: matplotlib is not installed, or does not know the format.
        InputFileError: There is no such folder, or the name is a folder's.
    """
    plt = _pyplot()
    figure = plt.figure()
    formats = figure.canvas.get_supported_filetypes()
    plt.close(figure)
    suffix = path.suffix.removeprefix(".").lower()
    # Without a suffix it writes a .png.
    if suffix and suffix not in formats:
        raise UsageError(f"--plot {path}: there is no format '{suffix}'; choose from {', '.join(sorted(formats))}")
    if path.is_dir():
        raise InputFileError(f"--plot: cannot write {path}: it is a directory")
    if not path.absolute().parent.is_dir():
        raise InputFileError(f"--plot: cannot write {path}: there is no directory {path.parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputFileError(f"--plot: cannot write {path}: {path.parent} is not writable")


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise missing_packages("drawing a plot", error, extra="bench") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise InputFileError(f"--plot: cannot write {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)


def _takes(candidate: Candidate, timed: bool) -> float:
    if not timed:
        return candidate.traffic.standard - candidate.traffic.spared_bytes
    assert candidate.seconds is not None, "a machine is known"
    return candidate.seconds * 1e3


def _standard_takes(choice: Choice, timed: bool) -> float | None:
    if timed and choice.standard_seconds is not None:
        return choice.standard_seconds * 1e3
    return next((float(one.traffic.standard) for one in choice.frontier), None)


def _cost(candidate: Candidate, by_kl: bool) -> float:
    return candidate.kl if by_kl else candidate.perplexity_increase * 100


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
