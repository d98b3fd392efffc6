"""Options of a verification. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from kraken_compiler.options.command_options import CommandOptions
from kraken_compiler.options.shared import CHECK_TIMEOUT, Source, Text, TextTokens, Timeout, TrustPickle


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
