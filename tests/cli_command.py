"""A command of ours, run as a user would: in this process, or in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
from click.testing import Result
from typer.testing import CliRunner


class Command:
    """A command line."""

    def __init__(self, app: typer.Typer) -> None:
        self._app = app

    def invoke(self, *arguments: str | Path) -> Result:
        """Run it, whatever comes of it."""
        return CliRunner().invoke(self._app, [str(argument) for argument in arguments])

    def answer(self, *arguments: str | Path) -> dict[str, Any]:
        """What it prints with --json; it must succeed and say nothing else."""
        result = self.invoke(*arguments, "--json")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def refused(self, code: int, *arguments: str | Path) -> str:
        """The one line it says when it ends with an exit code other than 0."""
        result = self.invoke(*arguments, "--quiet")
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr


def run_process(command: str, *arguments: str | Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; it must succeed."""
    line = [python, "-m", f"kraken_compiler.cli.{command}", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return done
