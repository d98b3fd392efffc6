"""`python -m tests.reports.text_command WHAT`: a command as ours are, which writes what it is told to."""

from __future__ import annotations

from typing import Annotated

import typer

from kraken_compiler.cli.console import ConsoleProgress, errors_as_exit_codes, print_json, print_lines, run_app
from kraken_compiler.errors import UsageError
from kraken_compiler.standard_streams import write_out

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(what: str, json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Write something."""
    with errors_as_exit_codes(json):
        if what == "text":
            write_out("naïve ☃\n")
        elif what == "lines":
            print_lines(["naïve"] * 20_000)
        elif what == "json":
            print_json({"text": "\ud83c naïve"})
        elif what == "progress":
            with ConsoleProgress(quiet=False).stage("work"):
                pass
        else:
            raise UsageError("wrong")


if __name__ == "__main__":
    run_app(app, "text-command")
