"""Options of a compile. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BeforeValidator

from kraken_compiler.backends.registry import BACKEND_NAMES, DEFAULT_BACKEND
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.schedule import AUTO
from kraken_compiler.options.command_options import CommandLineType, CommandOptions
from kraken_compiler.options.shared import (
    CHECK_TIMEOUT,
    Degree,
    Force,
    Text,
    TextTokens,
    Timeout,
    TrustPickle,
    degrees_in,
    names_in,
)

CALIBRATION_TOKENS = 65536
CALIBRATION_PASSES = 3


def share_of(value: Any) -> Any:
    """A share such as `2%` or `0.02`."""
    if not isinstance(value, str):
        return value
    try:
        return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"--max-ppl-increase {value}: give a share such as 2% or 0.02") from error


@dataclass(frozen=True, kw_only=True)
class CompileOptions(CommandOptions):
    """Options of a compile.

    In Python, `form` also takes a `Form`, or one of those for every layer, `layers` numbers, and `dtype` a torch dtype.
    """

    degree: Annotated[
        int | Sequence[int] | None,
        CommandLineType(Degree | list[Degree] | None),
        typer.Option(
            parser=degrees_in,
            metavar="INTEGER",
            help="Number of lanes; several for --plan --machine, or for --auto. (default: the visible accelerators, "
            "else the smallest valid degree above 1)",
        ),
    ] = None
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Choose degree, overlap and, within a budget, forms: those of the least predicted time of --prompt "
            "and --new-tokens on --machine.",
        ),
    ] = False
    form: Annotated[
        Any,
        CommandLineType(str),
        typer.Option(help="standard, kraken, ladder, delayed, sync-drop or parallel. (default: kraken)"),
    ] = "kraken"
    layers: Annotated[
        str | Sequence[int] | None,
        CommandLineType(str | None),
        typer.Option(help="Layers that take the form, e.g. 15-29 or -4--1; the others stay standard."),
    ] = None
    lanes: Annotated[
        str | None,
        typer.Option(
            help="Which heads and FFN columns share a lane of a changed form. affinity: those that read most of each "
            "other, on the texts of --calibrate or on random inputs; order: as they lie in the files. "
            "(default: affinity with --calibrate, else order)"
        ),
    ] = None
    overlap: Annotated[
        str,
        typer.Option(
            help="Run in two halves, whose sums are on their way while the other half computes, where that is faster. "
            "tokens: long prefills; rows: batches of several rows; auto: tokens with a KV cache, rows without; none. "
            "Changes no number. (default: auto)"
        ),
    ] = AUTO
    embedding: Annotated[
        str,
        typer.Option(
            help="What a lane holds of an embedding. split: its own rows, which a sum at the beginning puts together; "
            "whole: all rows; auto: its own where that saves a lane a hundredth of its memory. (default: auto)"
        ),
    ] = AUTO
    backends: Annotated[
        Sequence[str],
        CommandLineType(list[str]),
        typer.Option("--backend", help=f"{BACKEND_NAMES}; several separated by commas, or repeated. (default: torch)"),
        BeforeValidator(names_in),
    ] = (DEFAULT_BACKEND,)
    dtype: Annotated[
        Any, CommandLineType(str | None), typer.Option(help="float32, bfloat16 or float16. (default: the model's own)")
    ] = None
    input_specs: Annotated[
        Sequence[str],
        CommandLineType(list[str]),
        typer.Option("--input", help="Example input, e.g. input_ids=int64[2,16]. Inferred for Hugging Face."),
    ] = ()
    text: Text = None
    text_tokens: TextTokens = None
    calibrate: Annotated[
        Sequence[Any],
        CommandLineType(list[Path]),
        typer.Option(
            help="Text, token ids (.npy, .safetensors) or a directory of such files, to refit a changed form's weights "
            "on. May be repeated."
        ),
    ] = ()
    calibrate_tokens: Annotated[
        int, typer.Option(min=1, help=f"How many tokens of it. (default: {CALIBRATION_TOKENS})")
    ] = CALIBRATION_TOKENS
    calibrate_passes: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often to train on it end to end after the weights were refitted in closed form. "
            f"(default: {CALIBRATION_PASSES})",
        ),
    ] = CALIBRATION_PASSES
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Choose every layer's form: wait for as little communication as possible at no more than this KL to "
            "the source, nats per token on unseen text. Needs --calibrate."
        ),
    ] = None
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option("--max-ppl-increase", help="The same for the growth of the perplexity, e.g. 2%."),
        BeforeValidator(share_of),
    ] = None
    machine: Annotated[
        str | None,
        typer.Option(
            help="With --plan, predict times on this machine; with a budget or --auto, save most of its time. A .toml"
            " file (of kraken-probe, say), or a100-40gb-sxm, a100-80gb-sxm, h100-sxm, h200-sxm, l40s-pcie."
        ),
    ] = None
    prompt: Annotated[
        int, typer.Option(min=2, help="Tokens of a prompt, for a budget on a machine and --auto. (default: 2048)")
    ] = 2048
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that are generated behind it, for the same. (default: 256)")
    ] = 256
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the result. (default: on)")] = True
    dump_directory: Annotated[
        Any,
        CommandLineType(Path | None),
        typer.Option("--dump-graphs", help="Directory for the graph as text after every pass."),
    ] = None
    trust_pickle: TrustPickle = False
    force: Force = False
    timeout: Timeout = CHECK_TIMEOUT
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of backends, by field name (`Backend.Options`)."""
