"""`kraken-compile MODEL --degree N -o DIR`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kraken_compiler.cli.console import (
    EXIT_CODES,
    ConsoleProgress,
    around_command,
    print_json,
    print_lines,
    run_app,
    set_up_interpreter,
)
from kraken_compiler.errors import UsageError
from kraken_compiler.options.command_line import CommandLine, Output, command
from kraken_compiler.options.compile import CompileOptions

if TYPE_CHECKING:
    from kraken_compiler.commands.compile import CompileResult


@dataclass(frozen=True, kw_only=True)
class CompileCommand:
    """Arguments of the command line beside `CompileOptions`."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face directory, a .gguf file, a torch.export archive, or a pickled module.",
            show_default=False,
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The artifact's directory. (default: MODEL's name .kraken)")
    ] = None
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show what would be done: reads no weight, writes no file.")
    ] = False
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Image of a search within a budget: what every choice of forms costs against its predicted time, or "
            "without --machine the bytes that are waited for (.png, .svg, .pdf)."
        ),
    ] = None


def compile_command(command_line: CommandLine) -> None:
    """Compile, and show the result."""
    output = command_line.output
    with around_command(output) as quiet:
        arguments, options = command_line.options(CompileCommand, CompileOptions)
        if arguments.model is None:
            raise UsageError("name the MODEL to compile, on the command line or as 'model' in the config file")
        if arguments.plot is not None:
            _require_plot(arguments.plot, options)
        # Imported late, so that --help does not load torch.
        from kraken_compiler.commands.compile import compile_model

        directory = arguments.output or Path(f"{_name_of(Path(arguments.model))}.kraken")
        progress = ConsoleProgress(quiet)
        result = compile_model(arguments.model, None if arguments.plan else directory, options, progress=progress)
        if arguments.plot is not None:
            _plot(arguments.plot, result, options)
        _show(result, directory, output)


def _require_plot(path: Path, options: CompileOptions) -> None:
    """Refuse a picture that there will not be, before hours of search."""
    if options.max_kl is None and options.max_perplexity_increase is None:
        raise UsageError(
            "--plot draws what a search within a budget finds, and there is none: give --max-kl, or leave it out"
        )
    from kraken_compiler.quality.plot import require_plot

    require_plot(path)


def _plot(path: Path, result: CompileResult, options: CompileOptions) -> None:
    """Draw the searches of a compile."""
    from kraken_compiler.quality.budget import Budget
    from kraken_compiler.quality.plot import plot_choices

    budget = Budget(options.max_kl, options.max_perplexity_increase)
    if result.auto is not None:
        searched = {f"{one.degree} devices": one.choice for one in result.auto.degrees if one.choice is not None}
        plot_choices(path, searched, budget, result.auto.of_degree.best)
    else:
        assert result.choice is not None, "there is a budget"
        plot_choices(path, {"": result.choice}, budget, result.choice.best)


def _show(result: CompileResult, directory: Path, output: Output) -> None:
    """Print what became of a compile; people read the artifact's path as they gave it, machines the whole one."""
    from kraken_compiler.latency.table import compared_lines

    if output.json:
        print_json(
            {
                "artifact": str(result.directory) if result.directory else None,
                "report": result.report.to_dict(),
                "notes": list(result.notes),
                "latency": [one.to_dict() for one in result.latencies],
                "choice": result.choice.to_dict() if result.choice else None,
                "auto": result.auto.to_dict() if result.auto else None,
                "calibration": result.calibration.to_dict() if result.calibration else None,
                "verification": result.verification.to_dict() if result.verification else None,
            }
        )
    elif not output.quiet:
        lines = result.report.lines() if len(result.latencies) < 2 else compared_lines(result.latencies)
        if len(result.latencies) == 1:
            lines += ["", *result.latencies[0].lines()]
        if result.auto is not None:
            lines += ["", *result.auto.lines()]
        if result.choice is not None:
            lines += ["", f"forms within a budget of {result.choice.budget}", *result.choice.lines()]
        if result.calibration is not None:
            lines += ["", *(f"calibrated  {line}" for line in result.calibration.lines())]
        if result.verification is not None:
            lines += ["", *result.verification.lines()]
        if result.directory is not None:
            lines += ["", f"wrote {directory}"]
        print_lines(lines)


def _name_of(model: Path) -> str:
    """A model's name; only files have suffixes, the dot in a directory named `Llama-3.2-1B` begins none."""
    path = Path(os.path.abspath(model))
    return path.name if path.is_dir() else path.stem


app = command(
    compile_command,
    CompileCommand,
    CompileOptions,
    description="Rewrite a Transformer into N parallel lanes and write one program per device.",
    epilog=EXIT_CODES,
)


def main() -> None:
    """Entry point."""
    set_up_interpreter()
    run_app(app, "kraken-compile")


if __name__ == "__main__":
    main()
