"""Options of a probe. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from pydantic import BeforeValidator

from kraken_compiler.options.command_options import CommandLineType, CommandOptions
from kraken_compiler.options.shared import CHECK_TIMEOUT, Force, Timeout, names_in


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(CommandOptions):
    """Options of a probe."""

    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ranks to start here; under torchrun its own. (default: one for every accelerator, else 2)"
        ),
    ] = None
    dtypes: Annotated[
        Sequence[str],
        CommandLineType(list[str]),
        typer.Option("--dtype", help="Element types of products, separated by commas. (default: float32,bfloat16)"),
        BeforeValidator(names_in),
    ] = ()
    name: Annotated[str | None, typer.Option(help="What to call the machine. (default: the host's name)")] = None
    force: Force = False
    timeout: Timeout = CHECK_TIMEOUT
