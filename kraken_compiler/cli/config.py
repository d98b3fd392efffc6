"""`--config FILE.toml`: the options of `kraken-compile` from a file. What the command line gives wins."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kraken_compiler.cli.options import DEFAULT_TIMEOUT
from kraken_compiler.errors import InputFileError, UsageError

Config = TypeVar("Config", bound=BaseModel)


class CompileConfig(BaseModel):
    """The keys of a config file: the long names of the command line's options."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, strict=True)

    model: str | None = None
    output: str | None = None
    degree: int | None = Field(default=None, ge=1)
    form: str = "kraken"
    layers: str | None = None
    backend: list[str] = Field(default=["torch"], min_length=1)
    collectives: str = "kraken"
    onnx_weights: str | None = Field(default=None, alias="onnx-weights")
    dtype: str | None = None
    input: list[str] = []
    text: str | None = None
    text_tokens: int | None = Field(default=None, alias="text-tokens", ge=2)
    calibrate: list[str] = []
    calibrate_tokens: int = Field(default=65536, alias="calibrate-tokens", ge=1)
    max_kl: float | None = Field(default=None, alias="max-kl")
    max_ppl_increase: str | None = Field(default=None, alias="max-ppl-increase")
    dump_graphs: str | None = Field(default=None, alias="dump-graphs")
    timeout: float = Field(default=DEFAULT_TIMEOUT, gt=0)
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


def load_config(path: Path | None, given: dict[str, Any]) -> CompileConfig:
    """The options of `kraken-compile`; see `merge_config`."""
    return merge_config(CompileConfig, path, given)


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
            raise UsageError(f"{path}: there is no key '{key}'; did you mean '{nearest[0]}'?")
    try:
        config = kind.model_validate({**table, "timeout": float(table.get("timeout", DEFAULT_TIMEOUT))})
        return kind.model_validate({**config.model_dump(), **given})
    except (ValidationError, ValueError, TypeError) as error:
        reason = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"{path or 'options'}: {reason}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InputFileError(f"--config: cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputFileError(f"--config: {path} is no TOML: {error}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
