"""One rank that generates text: `python -m kraken_compiler.runtime.worker DIR --prompt TEXT`.

`kraken-run` starts it on this machine; torchrun starts it on several, with the same options:
`torchrun --nnodes 2 --nproc-per-node 2 ... -m kraken_compiler.runtime.worker DIR --prompt TEXT`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.runtime.engine import Engine
from kraken_compiler.runtime.options import RunOptions, options_app
from kraken_compiler.runtime.session import load_rank_program, rank_session
from kraken_compiler.runtime.speak import speak

REDUCE_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}

OPTIONS_FILE = "--options-file"
"""What kraken-run gives instead of options: a file with `RunOptions` as JSON, as an argument has a greatest length."""


def run_rank(options: RunOptions) -> None:
    """Be a rank until all is generated; rank 0 prints the result, and nothing else, to standard output.

    Raises:
        UsageError: No launcher started this, or the options ask for what cannot be done.
        InputFileError: A file of the artifact is missing, truncated or tampered with.
    """
    options.check()
    with rank_session(options.timeout, options.device) as session:
        reduce_dtype = REDUCE_DTYPES[options.reduce_dtype]
        artifact, program = load_rank_program(options.artifact, session, reduce_dtype=reduce_dtype)
        engine = Engine(artifact, program, session)
        if session.rank == 0:
            speak(engine, options)
            engine.end()
        else:
            engine.follow()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == [OPTIONS_FILE]:
            run_rank(RunOptions.from_json(Path(given[1]).read_text(encoding="utf-8")))
        else:
            options_app(run_rank, __doc__ or "")(given, prog_name="kraken_compiler.runtime.worker")
    except (UsageError, InputFileError) as error:
        # These are for users, who do not want to see where in our code they come from.
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
