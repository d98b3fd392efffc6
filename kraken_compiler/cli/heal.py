"""`kraken-heal DIR --text FILE... --steps N`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kraken_compiler.cli.console import (
    EXIT_CODES,
    ConsoleProgress,
    around_command,
    print_json,
    print_lines,
    run_app,
)
from kraken_compiler.cli.training_bar import TrainingBar
from kraken_compiler.options.command_line import CommandLine, command
from kraken_compiler.options.command_options import COMMAND_LINE_ONLY, CommandLineType
from kraken_compiler.options.heal import HealOptions
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.text import number_text

if TYPE_CHECKING:
    from kraken_compiler.commands.heal import HealResult


@dataclass(frozen=True, kw_only=True)
class HealCommand:
    """Arguments of the command line beside `HealOptions` and `HealSettings`."""

    artifact: Annotated[
        Path, COMMAND_LINE_ONLY, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote.")
    ]
    more_texts: Annotated[
        Sequence[Path],
        COMMAND_LINE_ONLY,
        CommandLineType(list[Path]),
        typer.Argument(metavar="[FILE...]", help="More texts.", show_default=False),
    ] = ()


def heal(command_line: CommandLine) -> None:
    """Heal, and show the result."""
    output = command_line.output
    with around_command(output) as quiet:
        arguments, options, settings = command_line.options(HealCommand, HealOptions, HealSettings)
        options = replace(options, texts=[*options.texts, *arguments.more_texts])
        # Imported late, so that --help does not load torch.
        from kraken_compiler.commands.heal import heal_artifact

        with TrainingBar("heal", "KL", quiet) as bar:
            result = heal_artifact(arguments.artifact, settings, options, progress=ConsoleProgress(quiet), watch=bar)
        if output.json:
            print_json(result.to_dict())
        elif not output.quiet:
            print_lines([*result.verification.lines(), *_summary(result), "", f"wrote {result.directory}"])


def _summary(result: HealResult) -> list[str]:
    record = result.record
    before = math.inf if record.kl_before is None else record.kl_before
    less = f" ({1 - record.kl_after / before:.0%} less)" if 0 < before < math.inf else ""
    resumption = f", resumed after step {result.resumed_from}" if result.resumed_from else ""
    return [
        f"healed    {record.steps} steps, {record.tokens:,} tokens{resumption}; on the held-out text KL to the source "
        f"{number_text(before, '.3g')} -> {number_text(record.kl_after, '.3g')} nats/token{less}",
        *(f"note      {note}" for note in result.notes),
    ]


app = command(
    heal,
    HealCommand,
    HealOptions,
    HealSettings,
    description="Train an artifact's lanes until they say what the source model says; the result is an artifact again.",
    epilog=EXIT_CODES,
)


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-heal")


if __name__ == "__main__":
    main()
