"""The tokens that a rewritten model is measured on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kraken_compiler._torch_compat import largest_size
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import position_limit, sample_inputs, token_input
from kraken_compiler.quality.evaluate import token_batches

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture

_ROW = 256
_RANDOM_BATCHES = 2


def batches_for(captured: Capture, path: Path | None) -> tuple[list[Tensor], str] | str:
    """Token batches of a text file or of the built-in sample, and what they are.

    A model without a tokenizer is measured on random tokens, and the description says so.

    Args:
        captured: The source model.
        path: The text file; None means the built-in sample.

    Returns:
        The batches, int64 [2, sequence] each, and their description; or the reason why the model cannot be measured.

    Raises:
        UsageError: A text was given for a model that reads no text, or it is too short.
        InputFileError: The text cannot be read.
    """
    program = captured.program
    if token_input(program) is None:
        if path is not None:
            raise UsageError("--text: the model reads no tokens")
        return "no quality measurement: the model reads no tokens"
    row = min(_ROW, position_limit(program), _proven_limit(program), _config_limit(captured.config))
    if captured.origin.tokenizer is None:
        if path is not None:
            raise UsageError(f"--text: {captured.origin.path or 'the model'} has no tokenizer, so it cannot read text")
        return _random_batches(program, row), "random tokens (the model has no tokenizer)"
    name = str(path) if path is not None else "the built-in sample"
    ids = captured.origin.tokenizer.load()(_read(path), verbose=False)["input_ids"]
    batches = token_batches(ids, row)
    if not batches:
        raise UsageError(f"--text: {name} is too short to measure anything on")
    return batches, name


def _read(path: Path | None) -> str:
    if path is None:
        return files("kraken_compiler.quality").joinpath("sample.txt").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputFileError(f"--text: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputFileError(f"--text: {path} is not UTF-8 text") from error


def _random_batches(program: Program, row: int) -> list[Tensor]:
    spec = token_input(program)
    assert spec is not None
    return [sample_inputs(program, 2, row, seed)[spec.name] for seed in range(_RANDOM_BATCHES)]


def _proven_limit(program: Program) -> int:
    """The longest sequence that fits the graph's own tables, such as a causal mask that the model keeps."""
    spec = token_input(program)
    assert spec is not None
    ids = next(node.meta["val"] for node in program.graph.nodes if node.name == spec.name)
    return largest_size(ids.shape[1]) or _ROW


def _config_limit(config: dict[str, Any] | None) -> int:
    """The longest sequence that the source's config allows; a lower bound for tables that the graph hides."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    limits = [config[name] for name in names if isinstance(config.get(name), int)] if config else []
    return min(limits, default=_ROW)
