"""`kraken-train CONFIG --text DIR -o DIR`."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
)
from kraken_compiler.cli.training_bar import TrainingBar
from kraken_compiler.options.command_line import CommandLine, command
from kraken_compiler.options.command_options import COMMAND_LINE_ONLY
from kraken_compiler.options.train import TrainOptions
from kraken_compiler.text import number_text
from kraken_compiler.training.from_scratch.config_file import MODEL_TABLE, model_in
from kraken_compiler.training.from_scratch.settings import TrainSettings

if TYPE_CHECKING:
    from kraken_compiler.commands.train import TrainResult


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Arguments of the command line beside `TrainOptions` and `TrainSettings`."""

    config: Annotated[
        Path,
        COMMAND_LINE_ONLY,
        typer.Argument(
            metavar="CONFIG",
            help=f"TOML file: a table [{MODEL_TABLE}], and any of the options below, which the command line changes.",
        ),
    ]


def train(command_line: CommandLine) -> None:
    """Train, and show the result."""
    output = command_line.output
    with around_command(output) as quiet:
        path = command_line.values["config"]
        config = model_in(path)
        whole = replace(command_line, config=path)
        _, options, settings = whole.options(TrainCommand, TrainOptions, TrainSettings, tables=(MODEL_TABLE,))
        # Imported late, so that --help does not load torch.
        from kraken_compiler.commands.train import train_model

        objective = "loss" if options.teacher is None else "KL"
        with TrainingBar("train", objective, quiet) as bar:
            result = train_model(config, settings, options, progress=ConsoleProgress(quiet), watch=bar)
        if output.json:
            print_json(result.to_dict())
        elif not output.quiet:
            print_lines([*_summary(result), "", f"wrote {result.directory}"])


def _summary(result: TrainResult) -> list[str]:
    config, (trained, there) = result.config, result.tokens
    resumption = f", resumed after step {result.resumed_from}" if result.resumed_from else ""
    share = f"{trained / there:.2g} times the texts"
    before, after = (number_text(one["perplexity"], ".4g") for one in (result.outcome.before, result.outcome.after))
    return [
        f"model     {config.parameters:,} parameters: {config.degree} lanes of {config.layers} layers, width "
        f"{config.width}, vocabulary {config.vocabulary:,}",
        f"trained   {result.settings.steps} steps, {trained:,} tokens ({share}){resumption}",
        f"held out  perplexity {before} -> {after}",
        *(f"note      {note}" for note in result.notes),
    ]


app = command(
    train,
    TrainCommand,
    TrainOptions,
    TrainSettings,
    description="Train a Kraken model from scratch; what comes of it is a directory that kraken-compile reads.",
    epilog=EXIT_CODES,
    has_config=False,
)


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-train")


if __name__ == "__main__":
    main()
