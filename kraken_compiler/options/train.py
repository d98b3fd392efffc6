"""Options of a training from scratch, beside those of every training (`TrainSettings`). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kraken_compiler.options.command_options import CommandLineType, CommandOptions
from kraken_compiler.options.shared import CHECK_TIMEOUT, Curves, Restart, Timeout


@dataclass(frozen=True, kw_only=True)
class TrainOptions(CommandOptions):
    """Options of a training from scratch; `begin` and `teacher` are files and directories as `compile` takes them."""

    texts: Annotated[
        Sequence[Any],
        CommandLineType(list[Path]),
        typer.Option("--text", help="Text to train on, or a directory of texts; may be repeated."),
    ] = ()
    tokens: Annotated[
        Sequence[Any],
        CommandLineType(list[Path]),
        typer.Option(help="Token ids to train on, .npy or .safetensors, instead of texts."),
    ] = ()
    tokenizer: Annotated[
        Any,
        CommandLineType(Path | None),
        typer.Option(help="Directory of a tokenizer. (default: one is learnt from the texts)"),
    ] = None
    begin: Annotated[
        Any,
        CommandLineType(Path | None),
        typer.Option("--from", help="A standard model whose weights, projected onto the lanes, are the first."),
    ] = None
    teacher: Annotated[
        Any,
        CommandLineType(Path | None),
        typer.Option(help="A standard model to distil from; without, the text alone is learnt."),
    ] = None
    output: Annotated[
        Any, CommandLineType(Path | None), typer.Option("--output", "-o", help="Directory for the model.")
    ] = None
    restart: Restart = False
    tensorboard: Curves = None
    timeout: Timeout = CHECK_TIMEOUT
