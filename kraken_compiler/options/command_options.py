"""The options of a command, once: its command line, its config file, its keyword arguments and its record.

Every command has a frozen dataclass, a `CommandOptions`. A field is an option; its annotation says how the command line
spells and explains it (`typer.Option`). `key_of` gives the name that a config file has for it.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic import Field as Key
from typer.models import ArgumentInfo, OptionInfo

from kraken_compiler.errors import InputFileError, UsageError, first_line
from kraken_compiler.text import ENCODING, not_utf8

_MOST_CHARACTERS = 60
_FIELD = "option_"
"""Before an option's name in a pydantic model, where some names mean something else."""
_KINDS = {
    bool: "the truth value",
    int: "the number",
    float: "the number",
    str: "the text",
    list: "a list",
    dict: "a table",
}
"""Kinds of values as messages call them; a truth value is an int to Python, so it comes first."""

_EXPECTED_TYPES = {
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list of texts",
    "finite_number": "a finite number",
}

COMMAND_LINE_ONLY = "command line only"
"""In the annotation of an option: a config file does not have it."""

BACKEND_OPTIONS = "backend_options"
"""The field that holds options of backends, by field name, in a dataclass that has one."""


@dataclass(frozen=True)
class CommandLineType:
    """Mark in an option's annotation: its type on the command line and in a config file, where Python takes more."""

    kind: Any


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options of a command."""

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """Options from keyword arguments.

        Args:
            keywords: By field name; what is no field is an option of a backend, if the command has backends.

        Raises:
            UsageError: There is no such option; names the nearest.
        """
        own = [item.name for item in fields(cls) if item.name != BACKEND_OPTIONS]
        values = {name: value for name, value in keywords.items() if name in own}
        others = {name: value for name, value in keywords.items() if name not in own}
        if not others:
            return cls(**values)
        if not any(item.name == BACKEND_OPTIONS for item in fields(cls)):
            name = next(iter(others))
            nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.0)
            raise UsageError(f"there is no option {name}; did you mean {nearest[0]}?")
        return cls(**values, **{BACKEND_OPTIONS: others})

    def noted(self) -> dict[str, Any]:
        """The options as a manifest notes them: plain values, without those that nobody chose."""
        default = type(self)()
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: _plain_value(value) for name, value in values.items() if value != getattr(default, name)}


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: The field's.
        key: What a config file calls it, and the command line behind two dashes.
        kind: Its type on the command line and in a config file.
        info: What typer reads.
        more: What else the annotation has: marks, and a pydantic validator.
        required: It has no default.
    """

    name: str
    key: str
    kind: Any
    info: OptionInfo | ArgumentInfo
    more: tuple[Any, ...]
    required: bool

    @property
    def in_config(self) -> bool:
        """True if a config file may have it."""
        return COMMAND_LINE_ONLY not in self.more

    @property
    def validators(self) -> tuple[Any, ...]:
        """The parts of the annotation that pydantic reads."""
        return tuple(part for part in self.more if not isinstance(part, str))


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_value(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(one) for one in value]
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain else str(getattr(value, "name", value))


def options_in(kind: type[Any]) -> dict[str, Option]:
    """The options that a dataclass describes, by field name."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        item.name: _option(item, hints[item.name]) for item in fields(kind) if get_origin(hints[item.name]) is Annotated
    }


def _option(item: Field[Any], hint: Any) -> Option:
    info = next(part for part in hint.__metadata__ if isinstance(part, OptionInfo | ArgumentInfo))
    kinds = [part.kind for part in hint.__metadata__ if isinstance(part, CommandLineType)]
    more = tuple(part for part in hint.__metadata__ if part is not info and not isinstance(part, CommandLineType))
    # typer takes the first name for a default until it reads the signature.
    names = (info.default, *(info.param_decls or ()))
    long = [name for name in names if isinstance(name, str) and name.startswith("--")]
    key = long[0].partition("/")[0].removeprefix("--") if long else item.name.replace("_", "-")
    required = item.default is MISSING and item.default_factory is MISSING
    return Option(item.name, key, kinds[0] if kinds else hint.__origin__, info, more, required)


def merged(
    options: Mapping[str, Option], path: Path | None, command_line: Mapping[str, Any], tables: Collection[str] = ()
) -> dict[str, Any]:
    """Merge the options of a config file and of the command line, which wins.

    Args:
        options: The options there are, by field name.
        path: The file, or None.
        command_line: Values from the command line, by field name.
        tables: Keys of the file that are no options.

    Returns:
        Values by field name, of those options that were given.

    Raises:
        UsageError: An unknown key, with the nearest known one, or a value of the wrong type.
        InputFileError: The file cannot be read or is no TOML.
    """
    model = _model(options)
    table = read_toml(path) if path is not None else {}
    table = {key: value for key, value in table.items() if key not in tables}
    keys = [option.key for option in options.values() if option.in_config]
    for key in table:
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
            raise UsageError(f"{path}: there is no key {key!r}; did you mean {nearest[0]!r}?")
    try:
        config = model.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{path}: {_first_problem(error)}") from error
    for field in config.model_fields_set:
        value, name = getattr(config, field), field.removeprefix(_FIELD)
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            raise UsageError(f"{path}: {options[name].key}: holds a NUL character, which no name has")
    by_key = {options[name].key: _as_text(value) for name, value in command_line.items()}
    try:
        whole = model.model_validate({**table, **by_key})
    except ValidationError as error:
        raise UsageError(f"--{_first_problem(error)}") from error
    names = [field.removeprefix(_FIELD) for field in whole.model_fields_set]
    return {name: _with_paths(options[name].kind, getattr(whole, _FIELD + name)) for name in names}


def _model(options: Mapping[str, Option]) -> type[BaseModel]:
    """The keys of a config file, and what their values may be."""
    definitions: dict[str, Any] = {}
    for option in options.values():
        info = option.info
        limits = {"ge": getattr(info, "min", None), "le": getattr(info, "max", None)}
        field = Key(
            default=None, alias=option.key, **{key: limit for key, limit in limits.items() if limit is not None}
        )
        plain = _plain(option.kind)
        definitions[_FIELD + option.name] = (
            Annotated[(plain, *option.validators)] if option.validators else plain,
            field,
        )
    return create_model("Config", __config__=ConfigDict(extra="forbid", strict=True), **definitions)


def _plain(kind: Any) -> Any:
    """A type as a config file has it: paths are texts there."""
    if kind is Path:
        return str
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(_plain(part) for part in get_args(kind))]  # noqa: UP007
    if get_origin(kind) is list:
        return list[_plain(get_args(kind)[0])]  # type: ignore[misc]
    return kind


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _with_paths(kind: Any, value: Any) -> Any:
    """A value from a config file with paths in it."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, list) and list[Path] in kinds:
        return [Path(one) for one in value]
    return value


def read_toml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The keys of a config file.

    Args:
        path: The file.
        option: What named it, for messages.

    Raises:
        InputFileError: It cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding=ENCODING))
    except OSError as error:
        raise InputFileError(f"{option}: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(path, option) from error
    except (ValueError, RecursionError) as error:
        reason = first_line(error) if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise InputFileError(f"{option}: {path} is no TOML: {reason}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key, *inside = map(str, problem["loc"])
    place = f" (entry {int(inside[0]) + 1})" if inside and inside[0].isdigit() else ""
    expected_type = _EXPECTED_TYPES.get(problem["type"])
    if expected_type is None:
        return f"{key}: {problem['msg']}"
    return f"{key}{place}: must be {expected_type}, not {_description(problem['input'])}"


def _description(value: Any) -> str:
    """A value of a config file by its kind; what is short, by itself."""
    for kind, name in _KINDS.items():
        if isinstance(value, kind):
            text = json.dumps(value, default=str) if kind not in (dict, list) else ""
            return f"{name} {text}".strip() if len(text) <= _MOST_CHARACTERS else name
    return f"a {type(value).__name__} {value}"
