"""`kraken-serve DIR`: `vllm serve` with the options that a compiled model needs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kraken_compiler.cli.console import EXIT_CODES, errors_as_exit_codes, run_app
from kraken_compiler.errors import RankFailedError, UsageError
from kraken_compiler.standard_streams import tell

_DESCRIPTION = """Serve an artifact with vLLM, behind an API like OpenAI's.

All other options are vLLM's own and go to `vllm serve` as they are, e.g. --port 8000 --max-model-len 4096."""

_TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")

_ASK_AGAIN_SECONDS = 5

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    help=_DESCRIPTION,
    epilog=EXIT_CODES,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(
    context: typer.Context,
    artifact: Annotated[
        Path, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote with --backend vllm.")
    ],
) -> None:
    """Run vLLM's server, and say so if it ends by itself."""
    with errors_as_exit_codes():
        command = serve_command(artifact, context.args)
        # Imported late, so that --help answers at once.
        from kraken_compiler.backends.vllm.run.environment import serve_environment

        supervise(command, serve_environment(os.environ))


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a server until it ends; it ends with this process, and gets its signals.

    Args:
        command, environment: Of the server.

    Raises:
        RankFailedError: It ended though nobody asked it to, whatever it gives as its exit code.
    """
    from kraken_compiler.ranks.start_rank import end_with_launcher

    # This process has no other threads, in which the function could find a lock taken.
    tie = partial(end_with_launcher, os.getpid())
    process = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=tie)  # noqa: PLW1509
    asked = []

    def forward(number: int, _: object) -> None:
        asked.append(number)
        process.send_signal(number)
        signal.alarm(_ASK_AGAIN_SECONDS)

    def ask_again(*_: object) -> None:
        # While it starts, it loses what it is sent.
        process.send_signal(signal.SIGTERM)
        signal.alarm(_ASK_AGAIN_SECONDS)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    signal.signal(signal.SIGALRM, ask_again)
    code = process.wait()
    if not asked:
        tell("")  # the last line of what it said may have no end
        raise RankFailedError(
            f"vLLM's server ended by itself (exit code {code}): it could not start, or one of its workers died; what "
            "it said above says why"
        )


def serve_command(directory: Path, others: list[str]) -> list[str]:
    """The command line of vLLM's server for an artifact.

    Args:
        directory: The artifact.
        others: Options of vLLM's own.

    Raises:
        UsageError: vLLM is not installed, the artifact is not for it, or an option contradicts it.
        InputFileError: The artifact is damaged.
    """
    from kraken_compiler.artifact.read import open_artifact
    from kraken_compiler.backends.registry import backend_of
    from kraken_compiler.backends.vllm.run.environment import require_vllm, server

    artifact = open_artifact(directory, verify=False)
    backend_of(artifact, "vllm")
    degree = artifact.manifest.degree
    for place, option in enumerate(others):
        name, _, value = option.partition("=")
        if name not in _TENSOR_PARALLEL:
            continue
        value = value or (others[place + 1] if place + 1 < len(others) else "")
        if value != str(degree):
            raise UsageError(
                f"{directory} has {degree} lanes, so {name} {value} is refused; leave it out, or compile "
                "for that degree"
            )
    names = {option.partition("=")[0] for option in others}
    if artifact.tokenizer is None and not names & {"--tokenizer", "--skip-tokenizer-init"}:
        raise UsageError(
            f"{directory} has no tokenizer: name one with --tokenizer DIR, or serve token ids with "
            "--skip-tokenizer-init"
        )
    require_vllm("kraken-serve")
    size = [] if names & {*_TENSOR_PARALLEL} else ["--tensor-parallel-size", str(degree)]
    return [*server(str(directory)), *size, *others]


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-serve")


if __name__ == "__main__":
    main()
