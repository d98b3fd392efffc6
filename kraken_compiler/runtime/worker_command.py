"""The command line of a worker: the options of a run, or a file with them; errors end in one line. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kraken_compiler.errors import KrakenError
from kraken_compiler.runtime.options import RunOptions, options_app
from kraken_compiler.standard_streams import prepare_streams, tell

OPTIONS_FILE = "--options-file"
"""What kraken-run gives instead of options: a file with `RunOptions` as JSON, as an argument has a greatest length."""


def run_worker(
    run_rank: Callable[[RunOptions], None], module: str, description: str, arguments: Sequence[str] | None
) -> None:
    """Be the entry point of a worker.

    Args:
        run_rank: Is a rank until all is done.
        module: The worker's name.
        description: First words of `--help`.
        arguments: What follows the command's name; None takes this process's.
    """
    prepare_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == [OPTIONS_FILE]:
            run_rank(RunOptions.from_json(Path(given[1]).read_text(encoding="utf-8")))
        else:
            options_app(run_rank, description)(given, prog_name=module)
    except KrakenError as error:
        # These are for users, who do not want to see where in our code they come from.
        tell(f"error: {error}")
        raise SystemExit(error.exit_code) from None
