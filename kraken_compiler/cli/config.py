"""`--config FILE.toml`: the options of `kraken-compile` from a file. What the command line gives wins."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from kraken_compiler.backends.command_line import backend_parameters, not_given_is_none
from kraken_compiler.backends.registry import DEFAULT_BACKEND
from kraken_compiler.cli.options import DEFAULT_TIMEOUT
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.runtime.environment import LONGEST_TIMEOUT
from kraken_compiler.text_files import ENCODING, not_utf8

_SHOWN_CHARACTERS = 60
_KINDS = {
    bool: "the truth value",
    int: "the number",
    float: "the number",
    str: "the text",
    list: "a list",
    dict: "a table",
}
"""Kinds of values as messages call them; a truth value is an int to Python, so it comes first."""

_WANTED = {
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list of texts",
    "finite_number": "a finite number",
}

Config = TypeVar("Config", bound=BaseModel)


class CompileConfig(BaseModel):
    """The keys of a config file: the long names of the command line's options."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, strict=True)

    model: str | None = None
    output: str | None = None
    degree: int | None = Field(default=None, ge=1)
    form: str = "kraken"
    layers: str | None = None
    backend: list[str] = Field(default=[DEFAULT_BACKEND], min_length=1)
    dtype: str | None = None
    input: list[str] = []
    text: str | None = None
    text_tokens: int | None = Field(default=None, alias="text-tokens", ge=2)
    calibrate: list[str] = []
    calibrate_tokens: int = Field(default=65536, alias="calibrate-tokens", ge=1)
    max_kl: float | None = Field(default=None, alias="max-kl")
    max_ppl_increase: str | None = Field(default=None, alias="max-ppl-increase")
    dump_graphs: str | None = Field(default=None, alias="dump-graphs")
    timeout: float = Field(default=DEFAULT_TIMEOUT, gt=0, le=LONGEST_TIMEOUT)
    verify: bool = True
    trust_pickle: bool = Field(default=False, alias="trust-pickle")
    force: bool = False
    plan: bool = False

    @field_validator("backend", mode="before")
    @classmethod
    def _separate(cls, value: Any) -> Any:
        """One text may name several backends, and so may each of a list."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return value
        return [name.strip() for text in texts for name in text.split(",")]


def share_of(text: str | None) -> float | None:
    """A share such as `2%` or `0.02`."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"--max-ppl-increase {text}: give a share such as 2% or 0.02") from error


def compile_config() -> type[CompileConfig]:
    """The keys of `kraken-compile`, those of all backends among them."""
    of_backends: dict[str, Any] = {
        name: (not_given_is_none(one.annotation), Field(default=None, alias=name.replace("_", "-")))
        for name, one in backend_parameters(at_run=False).items()
    }
    return create_model("CompileConfig", __base__=CompileConfig, **of_backends)


def load_config(path: Path | None, given: dict[str, Any]) -> CompileConfig:
    """The options of `kraken-compile`; see `merge_config`."""
    return merge_config(compile_config(), path, given)


def merge_config(kind: type[Config], path: Path | None, given: dict[str, Any]) -> Config:
    """Merge a config file with the options that the command line gave.

    Args:
        kind: The keys of the file and what their values are.
        path: The file, or None.
        given: Options by field name; those that were not given are left out.

    Raises:
        UsageError: An unknown key, with the nearest known one, or a value of the wrong type.
        InputFileError: The file cannot be read or is no TOML.
    """
    table = _read(path) if path is not None else {}
    known = [field.alias or name for name, field in kind.model_fields.items()]
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UsageError(f"{path}: there is no key {key!r}; did you mean {nearest[0]!r}?")
    try:
        config = kind.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{path}: {_first_problem(error)}") from error
    for name, field in kind.model_fields.items():
        values = getattr(config, name)
        if any("\0" in value for value in (values if isinstance(values, list) else [values]) if isinstance(value, str)):
            raise UsageError(f"{path}: {field.alias or name}: holds a NUL character, which no name has")
    try:
        return kind.model_validate({**config.model_dump(), **given})
    except ValidationError as error:
        raise UsageError(f"--{_first_problem(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding=ENCODING))
    except OSError as error:
        raise InputFileError(f"--config: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(path, "--config") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise InputFileError(f"--config: {path} is no TOML: {reason}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key, *inside = map(str, problem["loc"])
    place = f" (entry {int(inside[0]) + 1})" if inside else ""
    wanted = _WANTED.get(problem["type"])
    if wanted is None:
        return f"{key}: {problem['msg']}"
    return f"{key}{place}: must be {wanted}, not {_described(problem['input'])}"


def _described(value: Any) -> str:
    """A value of a config file by its kind; what is short, by itself."""
    for kind, name in _KINDS.items():
        if isinstance(value, kind):
            shown = json.dumps(value, default=str) if kind not in (dict, list) else ""
            return f"{name} {shown}".strip() if len(shown) <= _SHOWN_CHARACTERS else name
    return f"a {type(value).__name__} {value}"
