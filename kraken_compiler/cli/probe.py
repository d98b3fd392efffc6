"""`kraken-probe -o machine.toml`."""

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
from kraken_compiler.options.probe import ProbeOptions


@dataclass(frozen=True, kw_only=True)
class ProbeCommand:
    """Arguments of the command line beside `ProbeOptions`."""

    output: Annotated[Path, typer.Option("--output", "-o", help="The machine's TOML file.")] = Path("machine.toml")


def probe(command_line: CommandLine) -> None:
    """Measure, and say where the figures are."""
    output = command_line.output
    with around_command(output) as quiet:
        arguments, options = command_line.options(ProbeCommand, ProbeOptions)
        # Imported late, so that --help does not load torch.
        from kraken_compiler.commands.probe import probe_machine

        machine = probe_machine(arguments.output, options, progress=ConsoleProgress(quiet))
        if machine is None:
            return
        if output.json:
            print_json(machine.model_dump())
        elif not output.quiet:
            print_lines([*machine.lines(), "", f"wrote {arguments.output}"])


app = command(
    probe,
    ProbeCommand,
    ProbeOptions,
    description="Measure what this machine does: products, attention, copies and all-reduces, for --plan --machine.",
    epilog=EXIT_CODES,
)


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-probe")


if __name__ == "__main__":
    main()
