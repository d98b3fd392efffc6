"""`report_on`: one page about an artifact."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.manifest import REPORT_FILE
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.registry import backends_of
from kraken_compiler.errors import InputFileError, UsageError, os_errors_as
from kraken_compiler.latency.forms import require_fits
from kraken_compiler.latency.machine import load_machine
from kraken_compiler.latency.predict import Load, Predictor, RunGraphs
from kraken_compiler.latency.table import latency_table
from kraken_compiler.options.report import ReportOptions
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.sensitivity import costs_alone
from kraken_compiler.ranks.trace import Span, spans_of_chrome
from kraken_compiler.report import sections
from kraken_compiler.report.page import Section, page
from kraken_compiler.text import replace_text

_PROMPT = 512
"""Tokens of the prompt whose timeline is drawn, where the model takes as many."""


def report_on(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ReportOptions | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a page about an artifact: its forms, what they cost, and where its time goes.

    Args:
        directory: The artifact.
        output: The HTML file, which is replaced.
        options: What is asked for; None takes the defaults.
        progress: Is told about long stages.

    Raises:
        InputFileError: The artifact or the trace is damaged, or the page cannot be written.
        UsageError: Times cannot be predicted of the artifact, or there is no such machine.
    """
    options = options if options is not None else ReportOptions()
    show, path = progress or Silent(), Path(output)
    with show.stage("check hashes"):
        artifact = open_artifact(Path(directory))
    manifest = artifact.manifest
    report = _json(artifact.path(REPORT_FILE))
    runs = sections.runs_of(_first_rank(options.trace)) if options.trace is not None else []
    costs = _costs(artifact)
    found: list[Section | None] = [
        sections.model_section(manifest, report),
        sections.quality_section(report),
        sections.layers_section(manifest, report, costs),
    ]
    if report.get("choice"):
        found.append(sections.frontier_section(report["choice"]))
    if options.machine is not None:
        with show.stage("predict"):
            predictor, graphs = Predictor(load_machine(options.machine)), _graphs(artifact)
            most = graphs.longest(manifest.source.max_positions)
            prediction = predictor.fastest(graphs, _load(options.prompt, most))
            found += [
                sections.times_section(latency_table({"as compiled": graphs}, predictor, most=most)),
                sections.timeline_section(prediction, runs),
            ]
    elif runs:
        raise UsageError("--trace is shown beside what is predicted: name a --machine")
    title = f"{manifest.source.name}, {manifest.degree} devices"
    text = page(title, str(artifact.directory), [section for section in found if section is not None])
    with os_errors_as(f"--output: cannot write {path}"):
        replace_text(path, text)


def _load(prompt: int | None, most: int | None) -> Load:
    """The load whose timeline is drawn, of a prompt that was asked for or of one that fits."""
    if prompt is None:
        prompt = _PROMPT if most is None else min(_PROMPT, max(1, most // 2))
    load = Load(prompt)
    if most is not None:
        load = replace(load, new_tokens=max(1, min(load.new_tokens, most - prompt)))
    require_fits(load, most)
    return load


def _costs(artifact: Artifact) -> dict[tuple[str, int], float]:
    """What forms cost in single layers: as a search within a budget found, or else `kraken-verify --by-layer`."""
    manifest = artifact.manifest
    files = (Path(f"{artifact.directory}.{name}.json") for name in ("sensitivity", "by-layer"))
    found = (costs_alone(file, manifest.source.sha256, manifest.degree) for file in files)
    return next((costs for costs in found if costs), {})


def _graphs(artifact: Artifact) -> RunGraphs:
    manifest = artifact.manifest
    if manifest.cache is None:
        raise UsageError(f"times are predicted of programs with a KV cache only: {manifest.no_cache}")
    graphs = (backend.run_graphs(artifact) for backend in backends_of(artifact))
    found = next((one for one in graphs if one is not None), None)
    if found is None:
        raise UsageError(f"{artifact.directory}: no backend in it keeps graphs of which times can be predicted")
    return found


def _first_rank(path: Path) -> list[Span]:
    try:
        return spans_of_chrome(_json(path), 0)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputFileError(f"--trace: {path} is no trace of kraken-run") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputFileError(f"{path}: is no JSON") from error
    if not isinstance(found, dict):
        raise InputFileError(f"{path}: is no JSON object")
    return found
