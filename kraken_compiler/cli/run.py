"""`kraken-run DIR --prompt TEXT`: N local ranks, and only the text on standard output."""

from __future__ import annotations

import os
import select
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kraken_compiler.cli.console import EXIT_CODES, around_command, run_app
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.request import NEW_TOKENS, RunOptions, options_app
from kraken_compiler.options.command_line import Output

_DESCRIPTION = """Run an artifact on this machine, one process per lane, and print the continuation of prompts.

Without --prompt, --prompt-file and --input-ids, every line of standard input is answered (with a chat template) or
continued (without). /reset begins a new conversation, /exit or Ctrl-D ends it."""

_CHUNK = 1 << 16


def run(options: RunOptions) -> None:
    """Start the ranks, and wait for them."""
    with around_command(Output(json=options.json, verbose=options.verbose)):
        options.check()
        # Imported late, so that --help answers at once.
        from kraken_compiler.artifact.read import open_artifact
        from kraken_compiler.backends.base import EngineSettings
        from kraken_compiler.generate.frontend import serve
        from kraken_compiler.generate.run_rank import OPTIONS_FILE
        from kraken_compiler.generate.tokenizer import require_tokenizer
        from kraken_compiler.ir.size_checks import require_generation
        from kraken_compiler.lanes.derived_inputs import reads_source
        from kraken_compiler.ranks.environment import DEFAULT_TIMEOUT
        from kraken_compiler.ranks.launch import launch

        artifact = open_artifact(options.artifact, verify=False)
        backend = options.backend_of(artifact)
        prompts = options.ids()
        if not options.input_ids:
            require_tokenizer(artifact)
            # Read once: a prompt file may be a pipe.
            options = replace(options, prompt=options.prompts(), prompt_file=None)
            batch = len(options.prompt) or 1
        else:
            batch = len(prompts)
        manifest = artifact.manifest
        # An encoder reads its text once; a decoder's grows.
        new_tokens = 1 if reads_source(manifest.inputs) else options.max_new_tokens or NEW_TOKENS
        # Here and not only where ranks know the lengths of texts, because starting them takes seconds.
        require_generation(manifest.call, manifest.inputs, batch, map(len, prompts), new_tokens)
        settings = EngineSettings(
            rows=batch, capacity=options.max_context, threads=options.threads, verbose=options.verbose
        )
        engine = backend.engine(artifact, settings)
        if engine is not None:
            if options.reduce_dtype is not None:
                raise UsageError(f"--reduce-dtype does not go with the {backend.name} backend, whose engine sends sums")
            if options.timeout is not None:
                raise UsageError(f"--timeout does not go with the {backend.name} backend, whose engine runs the ranks")
            if options.trace is not None:
                raise UsageError(f"--trace does not go with the {backend.name} backend, whose engine runs the ranks")
            with engine as text_engine:
                serve(text_engine, options)
            return
        with tempfile.TemporaryDirectory(prefix="kraken-options-") as name, _input_for_ranks(options) as terminal:
            file = Path(name) / "options.json"
            # The launcher's timeout reaches the ranks by itself.
            file.write_text(replace(options, timeout=None, terminal=terminal).to_json(), encoding="utf-8")
            launch(
                artifact.manifest.degree,
                [OPTIONS_FILE, str(file)],
                timeout=options.timeout or DEFAULT_TIMEOUT,
            )


@contextmanager
def _input_for_ranks(options: RunOptions) -> Iterator[bool]:
    """Make standard input a pipe into which this process copies the real one; yields whether a person types there.

    Ranks inherit standard input, but live in sessions of their own: when this process is stopped or in the background,
    they would read what is typed for the shell.
    """
    if not options.interactive:
        yield False
        return
    try:
        real = os.dup(sys.stdin.fileno())
    except (AttributeError, OSError, ValueError):
        raise UsageError("give --prompt TEXT, --input-ids 1,2,3, or lines on standard input") from None
    reading, writing = os.pipe()
    stopping, stop = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    copier = threading.Thread(target=_copy, args=(real, writing, stopping), name="kraken-input", daemon=True)
    copier.start()
    try:
        yield os.isatty(real) and sys.stdout.isatty()
    finally:
        os.write(stop, b"\n")
        os.dup2(real, 0)


def _copy(source: int, target: int, stopping: int) -> None:
    """Copy until the source ends; a copy that waits for its reader dies with this process."""
    while True:
        ready, _, _ = select.select([source, stopping], [], [])
        if stopping in ready:
            return
        content = os.read(source, _CHUNK)
        if not content:
            # The ranks see the end of their input.
            os.close(target)
            return
        while content:
            content = content[os.write(target, content) :]


app = options_app(run, _DESCRIPTION, EXIT_CODES)


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-run")


if __name__ == "__main__":
    main()
