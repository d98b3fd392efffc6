"""Options of a report. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kraken_compiler.options.command_options import CommandOptions


@dataclass(frozen=True, kw_only=True)
class ReportOptions(CommandOptions):
    """Options of a report."""

    machine: Annotated[
        str | None, typer.Option(help="Predict times on this machine, see kraken-compile. (default: no times)")
    ] = None
    trace: Annotated[
        Path | None, typer.Option(help="A trace of kraken-run --trace, to be shown beside what is predicted.")
    ] = None
    prompt: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of the prompt whose timeline is drawn. (default: 512, or half of what the model takes)",
        ),
    ] = None
