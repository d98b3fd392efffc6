"""A worker: its command line, and the work of a rank. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kraken_compiler.backends.open_model import open_model
from kraken_compiler.errors import KrakenError, os_errors_as
from kraken_compiler.generate.engine import Engine
from kraken_compiler.generate.frontend import serve
from kraken_compiler.generate.request import RunOptions, options_app
from kraken_compiler.ranks.session import joined
from kraken_compiler.ranks.trace import Trace, chrome_trace, spans_from
from kraken_compiler.standard_streams import prepare_streams, tell
from kraken_compiler.text import replace_text

OPTIONS_FILE = "--options-file"
"""Option of ranks that kraken-run starts: a file with `RunOptions` as JSON, as an argument has a greatest length."""


def run_worker(description: str, arguments: Sequence[str] | None) -> None:
    """Be a rank until all is done; errors end in one line.

    Args:
        description: First words of `--help`.
        arguments: What follows the command's name; None takes this process's.
    """
    prepare_streams()
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if argv[:1] == [OPTIONS_FILE]:
            run_rank(RunOptions.from_json(Path(argv[1]).read_text(encoding="utf-8")))
        else:
            options_app(run_rank, description)(argv, prog_name="kraken_compiler.generate.worker")
    except KrakenError as error:
        # These are for users, who do not want to see where in our code they come from.
        tell(f"error: {error}")
        raise SystemExit(error.exit_code) from None


def run_rank(options: RunOptions) -> None:
    """Be a rank until all is generated; rank 0 prints the result, and nothing else, to standard output.

    Raises:
        UsageError: The environment does not say which rank this is, or the options ask for what cannot be done.
        InputFileError: A file of the artifact is missing, truncated or tampered with, or the ranks have different ones.
        RankFailedError: A peer did not come in time, or went away.
    """
    options.check()
    if options.threads is not None:
        # Backends, which are imported later, take it from here.
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with joined(options.timeout, options.reduce_dtype) as ranks:
        if options.trace is not None:
            ranks.trace = Trace()
            ranks.trace.watch(ranks)
        artifact, model = open_model(options.artifact, ranks, options.backend_of)
        engine = Engine(artifact, model, ranks)
        if ranks.trace is not None:
            ranks.barrier()
            ranks.trace.begin()
        if ranks.rank == 0:
            serve(engine, options)
            engine.end()
        else:
            engine.follow()
        if ranks.trace is not None and options.trace is not None:
            of_ranks = [spans_from(content) for content in ranks.gather(ranks.trace.to_json())]
            if ranks.rank == 0:
                with os_errors_as(f"--trace: cannot write {options.trace}"):
                    replace_text(options.trace, json.dumps(chrome_trace(of_ranks)))
