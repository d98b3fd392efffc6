"""`kraken-heal DIR --text FILE... --steps N`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kraken_compiler.cli.config import merge_config
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
from kraken_compiler.cli.heal_bar import HealBar
from kraken_compiler.cli.heal_config import HealConfig
from kraken_compiler.cli.options import (
    JsonOption,
    QuietOption,
    TimeoutOption,
    TrustPickleOption,
    VerboseOption,
)
from kraken_compiler.formatting import number_text

if TYPE_CHECKING:
    from kraken_compiler.heal import HealResult

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=EXIT_CODES)
def heal_command(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote.")],
    more_texts: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE...]", help="More texts.", show_default=False)
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to train on; may be repeated. The last part of each is held out.")
    ] = None,
    tokens: Annotated[
        list[Path] | None,
        typer.Option(help="Token ids to train on, .npy or .safetensors, for models without a tokenizer."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new artifact. (default: DIR's name .healed.kraken)")
    ] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of a row, at most. (default: 256)")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a step. (default: 4)")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's at its highest. (default: 1e-4, with --lora 1e-3)")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps in which the learning rate grows. (default: a tenth of all)")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="The gradient's largest norm. (default: 1)")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's. (default: 0)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the rows. (default: 0)")] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train updates of this rank instead of whole weights.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. (default: float32 on CPUs, bfloat16 on GPUs)")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory: compute activations twice.")
    ] = None,
    ranks: Annotated[bool | None, typer.Option("--ranks", help="One process per lane.")] = None,
    hold_out: Annotated[float | None, typer.Option(help="Share of every text to evaluate on. (default: 0.1)")] = None,
    evaluate_tokens: Annotated[int | None, typer.Option(help="How many tokens of it, at most. (default: 8192)")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between evaluations. (default: 50)")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. (default: 50)")] = None,
    restart: Annotated[
        bool | None, typer.Option("--restart", help="Begin anew; without, an unfinished run is resumed.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Directory for TensorBoard curves.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="The source model. (default: where it was when the artifact was compiled)")
    ] = None,
    trust_pickle: TrustPickleOption = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Replace an artifact that is there; no other files are.")
    ] = None,
    timeout: TimeoutOption = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with the same keys; the command line wins.")] = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train an artifact's lanes until they say what the source model says; the result is an artifact again."""
    given: dict[str, Any] = {
        "text": _texts([*(text or []), *(more_texts or [])]),
        "tokens": _texts(tokens or []),
        "output": _text(output),
        "source": _text(source),
        "tensorboard": _text(tensorboard),
        "steps": steps,
        "sequence": sequence,
        "batch": batch,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "clip": clip,
        "weight_decay": weight_decay,
        "seed": seed,
        "lora": lora,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "ranks": ranks,
        "hold_out": hold_out,
        "evaluate_tokens": evaluate_tokens,
        "evaluate_every": evaluate_every,
        "save_every": save_every,
        "restart": restart,
        "force": force,
        "trust_pickle": trust_pickle,
        "timeout": timeout,
    }
    set_up_logging(verbose)
    with errors_as_exit_codes(json_output, quiet), quiet_libraries(verbose):
        merged = merge_config(
            HealConfig, config, {name: value for name, value in given.items() if value not in (None, [])}
        )
        _heal(artifact, merged, json_output, quiet)


def _heal(artifact: Path, config: HealConfig, json_output: bool, quiet: bool) -> None:
    # Imported late, so that --help does not load torch.
    from kraken_compiler.heal import heal_artifact

    with HealBar(quiet or json_output) as bar:
        result = heal_artifact(
            artifact,
            config.settings(),
            texts=config.text,
            tokens=config.tokens,
            output=config.output,
            source=config.source,
            trust_pickle=config.trust_pickle,
            force=config.force,
            restart=config.restart,
            tensorboard=config.tensorboard,
            timeout=config.timeout,
            progress=ConsoleProgress(quiet or json_output),
            watch=bar,
        )
    if json_output:
        print_json(result.to_dict())
    elif not quiet:
        print_lines([*result.verification.lines(), *_summary(result), "", f"wrote {result.directory}"])


def _summary(result: HealResult) -> list[str]:
    record = result.record
    before = math.inf if record.kl_before is None else record.kl_before
    less = f" ({1 - record.kl_after / before:.0%} less)" if 0 < before < math.inf else ""
    resumed = f", resumed after step {result.resumed_from}" if result.resumed_from else ""
    return [
        f"healed    {record.steps} steps, {record.tokens:,} tokens{resumed}; on the held-out text KL to the source "
        f"{number_text(before, '.3g')} -> {number_text(record.kl_after, '.3g')} nats/token{less}"
    ]


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None


def _texts(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


def main() -> None:
    """Entry point."""
    run_app(app, "kraken-heal")


if __name__ == "__main__":
    main()
