"""Options that kraken-compile and kraken-verify share, spelled once. None means that an option was not given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_TIMEOUT = 120.0
"""Seconds; ranks that check a program may load and run a large one."""

TextOption = Annotated[
    Path | None,
    typer.Option(help="Text, or token ids (.npy), to measure the form's cost on. (default: a small built-in sample)"),
]
TextTokensOption = Annotated[int | None, typer.Option(min=2, help="Most tokens of the text to read. (default: all)")]
TrustPickleOption = Annotated[
    bool | None, typer.Option("--trust-pickle", help="Open files that can run any code when they are opened.")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which a rank counts as hanging that gets nothing done, while no rank computes. "
        f"(default: {DEFAULT_TIMEOUT:g})"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what every pass did.")]
