"""Options of a verification. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BeforeValidator

from kraken_compiler.options.command_options import CommandLineType, CommandOptions
from kraken_compiler.options.shared import CHECK_TIMEOUT, Source, Text, TextTokens, Timeout, TrustPickle, names_in


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(CommandOptions):
    """Options of a verification; in Python, `source` also takes a module."""

    text: Text = None
    text_tokens: TextTokens = None
    source: Source = None
    trust_pickle: TrustPickle = False
    timeout: Timeout = CHECK_TIMEOUT
    backend: Annotated[
        str | None,
        typer.Option(
            help="Check this backend's programs alone, and in its own engine, if it has one: vllm. (default: all)"
        ),
    ] = None
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer", help="Also measure what the form costs in every layer alone, and from every layer to the end."
        ),
    ] = False
    forms: Annotated[
        Sequence[str],
        CommandLineType(list[str]),
        typer.Option(
            "--forms", help="Measure --by-layer for these forms, separated by commas. (default: the artifact's own)"
        ),
        BeforeValidator(names_in),
    ] = ()
    choices: Annotated[
        Sequence[Any],
        CommandLineType(list[Path]),
        typer.Option(
            help="Multiple-choice questions that the artifact and its source answer: JSON lines "
            '{"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}. May be repeated.'
        ),
    ] = ()
