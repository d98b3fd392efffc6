"""`kraken-report DIR -o report.html`."""

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
from kraken_compiler.options.report import ReportOptions


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Arguments of the command line beside `ReportOptions`."""

    artifact: Annotated[
        Path, COMMAND_LINE_ONLY, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote.")
    ]
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html")


def report(command_line: CommandLine) -> None:
    """Write the page, and say where it is."""
    output = command_line.output
    with around_command(output) as quiet:
        arguments, options = command_line.options(ReportCommand, ReportOptions)
        # Imported late, so that --help does not load torch.
        from kraken_compiler.commands.report import report_on

        progress = ConsoleProgress(quiet)
        report_on(arguments.artifact, arguments.output, options, progress=progress)
        if output.json:
            print_json({"report": str(arguments.output)})
        elif not output.quiet:
            print_lines([f"wrote {arguments.output}"])


app = command(
    report,
    ReportCommand,
    ReportOptions,
    description="Write one page about an artifact: its forms, what they cost, where its time goes. Needs no network.",
    epilog=EXIT_CODES,
)


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-report")


if __name__ == "__main__":
    main()
