"""`kraken-verify DIR [--text FILE]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kraken_compiler.cli.console import (
    EXIT_CODES,
    ConsoleProgress,
    errors_as_exit_codes,
    print_json,
    print_lines,
    quiet_libraries,
    run_app,
    set_up_logging,
)
from kraken_compiler.cli.options import (
    DEFAULT_TIMEOUT,
    JsonOption,
    QuietOption,
    TextOption,
    TextTokensOption,
    TimeoutOption,
    TrustPickleOption,
    VerboseOption,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=EXIT_CODES)
def verify_command(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote.")],
    text: TextOption = None,
    text_tokens: TextTokensOption = None,
    source: Annotated[
        Path | None, typer.Option(help="The source model. (default: where it was when the artifact was compiled)")
    ] = None,
    trust_pickle: TrustPickleOption = None,
    timeout: TimeoutOption = None,
    schedule: Annotated[
        bool, typer.Option("--schedule", help="List every reduce: its start, what runs meanwhile, its wait.")
    ] = False,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer", help="Also measure what the form costs in every layer alone, and from every layer to the end."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Image of the KL by position, and by layer with --by-layer (.png, .svg, .pdf).")
    ] = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check an artifact again: hashes, real ranks, overlap, the source model, and what the form costs on text."""
    set_up_logging(verbose)
    with errors_as_exit_codes(json_output, quiet), quiet_libraries(verbose):
        # Imported late, so that --help does not load torch.
        from kraken_compiler.api import verify_artifact

        result = verify_artifact(
            artifact,
            source=source,
            text=text,
            text_tokens=text_tokens,
            by_layer=by_layer,
            trust_pickle=bool(trust_pickle),
            timeout=DEFAULT_TIMEOUT if timeout is None else timeout,
            progress=ConsoleProgress(quiet or json_output),
        )
        if plot is not None:
            from kraken_compiler.quality.plot import plot_quality

            plot_quality(plot, result.quality, result.sensitivity)
        if json_output:
            print_json(result.to_dict())
        elif not quiet:
            print_lines(result.lines() + (["", *result.schedule_lines()] if schedule else []))


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-verify")


if __name__ == "__main__":
    main()
