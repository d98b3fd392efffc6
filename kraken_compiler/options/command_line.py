"""A dataclass of options as a command: its command line, and `--config` for a file of the same keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic import BeforeValidator
from typer.models import ArgumentInfo

from kraken_compiler.backends.base import AT_RUN
from kraken_compiler.backends.registry import backend_class, backend_rows
from kraken_compiler.errors import UsageError
from kraken_compiler.options.command_options import BACKEND_OPTIONS, Option, merged, options_in

CONFIG, JSON, QUIET, VERBOSE = "config", "json_output", "quiet", "verbose"


@dataclass(frozen=True)
class Output:
    """Output options of a command.

    Attributes:
        json: One JSON document instead of text.
        quiet: No progress, no tables.
        verbose: Show what every pass did.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class CommandLine:
    """Options that a command line gives.

    Attributes:
        values: Options that were given, by field name.
        config: A file with more of them.
        output: How to write results.
    """

    values: Mapping[str, Any]
    config: Path | None
    output: Output

    def options(self, *kinds: type[Any], tables: Collection[str] = ()) -> list[Any]:
        """These options and those of the config file, as one object of every dataclass.

        Args:
            kinds: The dataclasses.
            tables: Keys of the file that are no options, which somebody else reads.

        Raises:
            UsageError: An option that is needed was not given; and see `merged`.
            InputFileError: See `merged`.
        """
        options = command_options(*kinds)
        merged_values = merged(options, self.config, self.values, tables)
        missing_key = next(
            (option.key for option in options.values() if option.required and option.name not in merged_values), None
        )
        if missing_key is not None:
            raise UsageError(f"--{missing_key} is needed, on the command line or as '{missing_key}' in a config file")
        instances = []
        for kind in kinds:
            own = {item.name for item in fields(kind)}
            values = {name: value for name, value in merged_values.items() if name in own}
            if BACKEND_OPTIONS in own:
                others = {
                    name: merged_values[name] for name in backend_options(kind) if merged_values.get(name) is not None
                }
                values |= {BACKEND_OPTIONS: others}
            instances.append(kind(**values))
        return instances


def command_options(*kinds: type[Any]) -> dict[str, Option]:
    """The options of a command, by field name: those of its dataclasses, and of the backends if one holds them."""
    options: dict[str, Option] = {}
    for kind in kinds:
        options |= options_in(kind)
        if any(item.name == BACKEND_OPTIONS for item in fields(kind)):
            options = {**backend_options(kind), **options}
    return options


def backend_options(kind: type[Any]) -> dict[str, Option]:
    """The options of all backends that a dataclass may hold, by field name: those of a compile, or of a run."""
    at_run = bool(getattr(kind, "AT_RUN", False))
    options: dict[str, Option] = {}
    for name in backend_rows():
        for option in options_in(backend_class(name).Options).values():
            if (AT_RUN in option.more) == at_run:
                options.setdefault(option.name, option)
    return options


def command(
    act: Callable[[CommandLine], None],
    *kinds: type[Any],
    description: str,
    epilog: str | None = None,
    has_output_options: bool = True,
    has_config: bool = True,
) -> typer.Typer:
    """A command line.

    Args:
        act: Called with the options that were given.
        kinds: Dataclasses whose fields are the options.
        description, epilog: First and last words of `--help`.
        has_output_options: It has `--json`, `--quiet` and `--verbose`; else it has its own.
        has_config: It has `--config`; else an argument names such a file.
    """
    parameters = [_parameter(option) for option in command_options(*kinds).values()]
    if has_config:
        parameters.append(
            _flag(CONFIG, Path | None, typer.Option(help="TOML file with the same keys; the command line wins."))
        )
    if has_output_options:
        parameters += [
            _flag(JSON, bool, typer.Option("--json", help="Print one JSON document."), False),
            _flag(QUIET, bool, typer.Option("--quiet", "-q", help="No progress, no tables."), False),
            _flag(VERBOSE, bool, typer.Option("--verbose", "-v", help="Show what every pass did."), False),
        ]

    def run(**values: Any) -> None:
        config = values.pop(CONFIG) if has_config else None
        output = Output(values.pop(JSON), values.pop(QUIET), values.pop(VERBOSE)) if has_output_options else Output()
        act(CommandLine({name: value for name, value in values.items() if value not in (None, [])}, config, output))

    # typer reads the signature; written out it would be a second list of all options.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=description, epilog=epilog)(run)
    return app


def _parameter(option: Option) -> inspect.Parameter:
    kind = option.kind
    if any(isinstance(part, BeforeValidator) for part in option.validators) and get_origin(kind) is not list:
        kind = str  # the validator makes it what it is
    if getattr(option.info, "parser", None) is not None:
        kind = str  # so does a parser
    if option.required and isinstance(option.info, ArgumentInfo):
        return _flag(option.name, kind, option.info, inspect.Parameter.empty)
    return _flag(option.name, kind | None, option.info)


def _flag(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
