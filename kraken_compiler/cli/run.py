"""`kraken-run DIR --prompt TEXT --max-new-tokens K`: N local ranks, and only the text on standard output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kraken_compiler.cli.console import EXIT_CODES, errors_as_exit_codes, set_up_logging
from kraken_compiler.errors import UsageError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=EXIT_CODES)
def run_command(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    input_ids: Annotated[
        str | None, typer.Option(help="Token ids to continue, e.g. 1,2,3, for a model without a tokenizer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")] = 32,
    timeout: Annotated[
        float, typer.Option(help="Seconds without progress after which a rank counts as hanging.")
    ] = 60.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the launcher does.")] = False,
) -> None:
    """Run an artifact on this machine, one process per lane, and print the continuation."""
    set_up_logging(verbose)
    with errors_as_exit_codes():
        if (prompt is None) == (input_ids is None):
            raise UsageError("give either --prompt TEXT or --input-ids 1,2,3")
        # Imported late, so that --help does not load torch.
        from kraken_compiler.artifact.read import open_artifact
        from kraken_compiler.runtime.launch import launch

        manifest = open_artifact(artifact, verify=False).manifest
        what = ["--prompt", prompt] if prompt is not None else ["--input-ids", str(input_ids)]
        arguments = [str(artifact), *what, "--max-new-tokens", str(max_new_tokens)]
        launch(manifest.degree, arguments, timeout=timeout)


def main() -> None:
    """Entry point."""
    app(prog_name="kraken-run")


if __name__ == "__main__":
    main()
