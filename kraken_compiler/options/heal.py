"""Options of a healing, beside those of training (`HealSettings`). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kraken_compiler.options.command_options import CommandLineType, CommandOptions
from kraken_compiler.options.shared import CHECK_TIMEOUT, Curves, Force, Restart, Source, Timeout, TrustPickle


@dataclass(frozen=True, kw_only=True)
class HealOptions(CommandOptions):
    """Options of a healing; in Python, `source` also takes a module."""

    texts: Annotated[
        Sequence[Any],
        CommandLineType(list[Path]),
        typer.Option("--text", help="Text to train on; may be repeated. The last part of each is held out."),
    ] = ()
    tokens: Annotated[
        Sequence[Any],
        CommandLineType(list[Path]),
        typer.Option(help="Token ids to train on, .npy or .safetensors, for models without a tokenizer."),
    ] = ()
    output: Annotated[
        Any,
        CommandLineType(Path | None),
        typer.Option("--output", "-o", help="The new artifact. (default: DIR's name .healed.kraken)"),
    ] = None
    restart: Restart = False
    tensorboard: Curves = None
    source: Source = None
    trust_pickle: TrustPickle = False
    force: Force = False
    timeout: Timeout = CHECK_TIMEOUT
