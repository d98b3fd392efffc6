"""`kraken-verify DIR [--text FILE]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kraken_compiler.cli.console import (
    EXIT_CODES,
    ConsoleProgress,
    around_command,
    print_json,
    print_lines,
    run_app,
)
from kraken_compiler.options.command_line import CommandLine, command
from kraken_compiler.options.command_options import COMMAND_LINE_ONLY
from kraken_compiler.options.verify import VerifyOptions


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """Arguments of the command line beside `VerifyOptions`."""

    artifact: Annotated[
        Path, COMMAND_LINE_ONLY, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote.")
    ]
    schedule: Annotated[
        bool, typer.Option("--schedule", help="List every reduce: its start, what runs meanwhile, its wait.")
    ] = False
    plot: Annotated[
        Path | None, typer.Option(help="Image of the KL by position, and by layer with --by-layer (.png, .svg, .pdf).")
    ] = None


def verify(command_line: CommandLine) -> None:
    """Verify, and show the result."""
    output = command_line.output
    with around_command(output) as quiet:
        arguments, options = command_line.options(VerifyCommand, VerifyOptions)
        # Imported late, so that --help does not load torch.
        from kraken_compiler.commands.verify import verify_artifact
        from kraken_compiler.quality.plot import plot_quality, require_plot

        if arguments.plot is not None:
            require_plot(arguments.plot)
        result = verify_artifact(arguments.artifact, options, progress=ConsoleProgress(quiet))
        if arguments.plot is not None:
            plot_quality(arguments.plot, result.quality, result.sensitivity)
        if output.json:
            print_json(result.to_dict())
        elif not output.quiet:
            print_lines(result.lines() + (["", *result.schedule_lines()] if arguments.schedule else []))


app = command(
    verify,
    VerifyCommand,
    VerifyOptions,
    description="Check an artifact again: hashes, real ranks, overlap, the source model, and the form's cost on text.",
    epilog=EXIT_CODES,
)


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-verify")


if __name__ == "__main__":
    main()
