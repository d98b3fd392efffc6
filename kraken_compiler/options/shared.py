"""Options that several commands have, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from annotated_types import Ge, Gt, Le

from kraken_compiler.options.command_options import CommandLineType
from kraken_compiler.ranks.environment import LONGEST_TIMEOUT

CHECK_TIMEOUT = 120.0
"""Seconds; ranks that check a program may load and run a large one."""

Text = Annotated[
    Any,
    CommandLineType(Path | None),
    typer.Option(help="Text, or token ids (.npy), to measure the form's cost on. (default: a small built-in sample)"),
]
TextTokens = Annotated[int | None, typer.Option(min=2, help="Most tokens of the text to read. (default: all)")]
Source = Annotated[
    Any,
    CommandLineType(Path | None),
    typer.Option(help="The source model. (default: where it was when the artifact was compiled)"),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Open files that can run any code when they are opened.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew; without, an unfinished run is resumed.")]
Curves = Annotated[Any, CommandLineType(Path | None), typer.Option(help="Directory for TensorBoard curves.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is there; no other files are.")]
Timeout = Annotated[
    float,
    typer.Option(
        help="Seconds after which a rank counts as hanging that gets nothing done, while no rank computes. "
        f"(default: {CHECK_TIMEOUT:g})"
    ),
    Gt(0),
    Le(LONGEST_TIMEOUT),
]


def names_in(value: Any) -> Any:
    """Split a text that names several things with commas between, or each of a list of such texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [name.strip() for text in texts for name in text.split(",")]


Degree = Annotated[int, Ge(1)]


def degrees_in(text: str) -> int | list[int]:
    """A degree as a command line has it: a whole number, or several with commas between.

    Raises:
        typer.BadParameter: It is neither.
    """
    try:
        degrees = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter("give a whole number, or several for --plan --machine: 2,4,8") from error
    return degrees[0] if len(degrees) == 1 else degrees
