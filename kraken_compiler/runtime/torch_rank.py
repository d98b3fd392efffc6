"""A rank that generates text with torch; see `worker`."""

from __future__ import annotations

from functools import partial

import torch

from kraken_compiler.runtime.choose_backend import require_backend
from kraken_compiler.runtime.engine import Engine
from kraken_compiler.runtime.options import RunOptions
from kraken_compiler.runtime.session import load_rank_program, rank_session
from kraken_compiler.runtime.speak import speak
from kraken_compiler.runtime.torch_model import TorchModel

REDUCE_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_rank(options: RunOptions) -> None:
    """Be a rank until all is generated; rank 0 prints the result, and nothing else, to standard output.

    Raises:
        UsageError: No launcher started this, or the options ask for what cannot be done.
        InputFileError: A file of the artifact is missing, truncated or tampered with.
    """
    options.check()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with rank_session(options.timeout, options.device) as session:
        artifact, program = load_rank_program(
            options.artifact,
            session,
            reduce_dtype=REDUCE_DTYPES[options.reduce_dtype],
            check=partial(require_backend, "torch", options),
        )
        engine = Engine(artifact, TorchModel(artifact.manifest, program, session.device), session)
        if session.rank == 0:
            speak(engine, options)
            engine.end()
        else:
            engine.follow()
