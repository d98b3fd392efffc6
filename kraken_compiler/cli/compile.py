"""`kraken-compile MODEL --degree N -o DIR`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kraken_compiler.backends.command_line import backend_parameters, not_given_is_none
from kraken_compiler.cli.config import CompileConfig, load_config, share_of
from kraken_compiler.cli.console import (
    EXIT_CODES,
    ConsoleProgress,
    errors_as_exit_codes,
    print_json,
    print_lines,
    quiet_libraries,
    run_app,
    set_up_interpreter,
    set_up_logging,
)
from kraken_compiler.cli.options import (
    JsonOption,
    QuietOption,
    TextOption,
    TextTokensOption,
    TimeoutOption,
    TrustPickleOption,
    VerboseOption,
)
from kraken_compiler.errors import UsageError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def compile_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face directory, a .gguf file, a torch.export archive, or a pickled module.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The artifact's directory. (default: MODEL's name .kraken)")
    ] = None,
    degree: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of lanes. (default: the visible accelerators, else the smallest valid degree above 1)"
        ),
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="standard, kraken, ladder, sync-drop or parallel. (default: kraken)")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers that take the form, e.g. 15-29 or -4--1; the others stay standard.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="torch or onnx; several separated by commas, or repeated. (default: torch)")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. (default: the model's own)")] = None,
    input: Annotated[
        list[str] | None, typer.Option(help="Example input, e.g. input_ids=int64[2,16]. Inferred for Hugging Face.")
    ] = None,
    text: TextOption = None,
    text_tokens: TextTokensOption = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, token ids (.npy, .safetensors) or a directory of such files, to refit a changed form's weights "
            "on. May be repeated."
        ),
    ] = None,
    calibrate_tokens: Annotated[int | None, typer.Option(min=1, help="How many tokens of it. (default: 65536)")] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Choose every layer's form: wait for as little communication as possible at no more than this KL to "
            "the source, nats per token on unseen text. Needs --calibrate."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="The same for the growth of the perplexity, e.g. 2%.")
    ] = None,
    plan: Annotated[
        bool | None, typer.Option("--plan", help="Only show what would be done: reads no weight, writes no file.")
    ] = None,
    verify: Annotated[bool | None, typer.Option("--verify/--no-verify", help="Check the result. (default: on)")] = None,
    dump_graphs: Annotated[Path | None, typer.Option(help="Directory for the graph as text after every pass.")] = None,
    trust_pickle: TrustPickleOption = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Replace an artifact that is there; no other files are.")
    ] = None,
    timeout: TimeoutOption = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with the same keys; the command line wins.")] = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    **backend_options: Any,
) -> None:
    """Rewrite a Transformer into N parallel lanes and write one program per device."""
    given: dict[str, Any] = {
        "model": model,
        "output": _text(output),
        "degree": degree,
        "form": form,
        "layers": layers,
        "backend": backend,
        "dtype": dtype,
        "input": input,
        "text": _text(text),
        "text_tokens": text_tokens,
        "calibrate": [str(path) for path in calibrate or ()],
        "calibrate_tokens": calibrate_tokens,
        "max_kl": max_kl,
        "max_ppl_increase": max_ppl_increase,
        "plan": plan,
        "verify": verify,
        "dump_graphs": _text(dump_graphs),
        "trust_pickle": trust_pickle,
        "force": force,
        "timeout": timeout,
        **backend_options,
    }
    set_up_logging(verbose)
    with errors_as_exit_codes(json_output, quiet), quiet_libraries(verbose):
        merged = load_config(config, {key: value for key, value in given.items() if value not in (None, [])})
        _compile(merged, json_output, quiet)


def _with_backend_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the options of all backends, too; None means that one was not given."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        one.replace(default=None, annotation=not_given_is_none(one.annotation))
        for one in backend_parameters(at_run=False).values()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (*own, *more)}
    return command


app.command(epilog=EXIT_CODES)(_with_backend_options(compile_command))


def _compile(config: CompileConfig, json_output: bool, quiet: bool) -> None:
    if config.model is None:
        raise UsageError("name the MODEL to compile, on the command line or as 'model' in the config file")
    # Imported late, so that --help does not load torch.
    from kraken_compiler.api import compile_model
    from kraken_compiler.cli.dtypes import dtype_named

    output = config.output or f"{_name_of(Path(config.model))}.kraken"
    result = compile_model(
        config.model,
        None if config.plan else output,
        degree=config.degree,
        form=config.form,
        layers=config.layers,
        backends=config.backend,
        dtype=dtype_named(config.dtype),
        input_specs=config.input,
        text=config.text,
        text_tokens=config.text_tokens,
        calibrate=config.calibrate,
        calibrate_tokens=config.calibrate_tokens,
        max_kl=config.max_kl,
        max_perplexity_increase=share_of(config.max_ppl_increase),
        verify=config.verify,
        trust_pickle=config.trust_pickle,
        force=config.force,
        dump_directory=config.dump_graphs,
        timeout=config.timeout,
        progress=ConsoleProgress(quiet or json_output),
        **{name: getattr(config, name) for name in backend_parameters(at_run=False)},
    )
    if json_output:
        print_json(
            {
                "artifact": str(result.directory) if result.directory else None,
                "report": result.report.to_dict(),
                "notes": list(result.notes),
                "choice": result.choice.to_dict() if result.choice else None,
                "calibration": result.calibration.to_dict() if result.calibration else None,
                "verification": result.verification.to_dict() if result.verification else None,
            }
        )
    elif not quiet:
        lines = result.report.lines()
        if result.choice is not None:
            lines += ["", f"forms within a budget of {result.choice.budget}", *result.choice.lines()]
        if result.calibration is not None:
            lines += ["", *(f"calibrated  {line}" for line in result.calibration.lines())]
        if result.verification is not None:
            lines += ["", *result.verification.lines()]
        if result.directory is not None:
            lines += ["", f"wrote {result.directory}"]
        print_lines(lines)


def _name_of(model: Path) -> str:
    """A model's name; only files have suffixes, the dot in a directory named `Llama-3.2-1B` begins none."""
    path = Path(os.path.abspath(model))
    return path.name if path.is_dir() else path.stem


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None


def main() -> None:
    """Entry point."""
    set_up_interpreter()
    run_app(app, "kraken-compile")


if __name__ == "__main__":
    main()
