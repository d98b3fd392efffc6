"""Files of token ids, for models without a tokenizer and for text that is tokenized once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.io.safetensors_format import read_header, read_tensor

TokenIds = np.ndarray[Any, np.dtype[Any]]


def is_token_file(path: Path) -> bool:
    """True for a file that holds token ids and not text, by its name."""
    return path.suffix in (".npy", ".safetensors")


def read_token_file(path: Path, vocabulary_size: int, option: str) -> TokenIds:
    """Read token ids.

    Args:
        path: `.npy`, or `.safetensors` with one tensor.
        vocabulary_size: How many tokens the model knows.
        option: The option that named the file, for messages.

    Returns:
        Whole numbers, [tokens], or, if every row is a document, [rows, tokens].

    Raises:
        InputFileError: The file cannot be read, or its tokens are not the model's.
    """
    ids = _array(path, option)
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2) or not ids.size:
        raise _not_ids(option, path, str(ids.dtype), ids.shape)
    if ids.shape[-1] < 2:
        raise InputFileError(f"{option}: {path} holds {list(ids.shape)} tokens; nothing follows from a single one")
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        raise InputFileError(
            f"{option}: {path} holds ids from {ids.min()} to {ids.max()}; the model knows 0 to {vocabulary_size - 1}"
        )
    return ids


def token_rows(ids: TokenIds, length: int) -> Tensor:
    """Whole rows of a stream, or of every document; what is left of it and fills no row is left out.

    Args:
        ids: Whole numbers [tokens] or [rows, tokens].
        length: Tokens of a row.

    Returns:
        int64 [rows, length].
    """
    whole = ids[..., : ids.shape[-1] // length * length]
    return torch.from_numpy(whole.astype(np.int64).reshape(-1, length))


def spread(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, from all over: the first ones would be those of the first document."""
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]


def _array(path: Path, option: str) -> TokenIds:
    if path.suffix == ".safetensors":
        entries = read_header(path)
        if len(entries) != 1:
            raise InputFileError(f"{option}: {path} holds {len(entries)} tensors; it must be one")
        ((name, entry),) = entries.items()
        tensor = read_tensor(name, entry)
        if tensor.is_floating_point() or tensor.is_complex():  # some of these numpy does not have
            raise _not_ids(option, path, str(tensor.dtype).removeprefix("torch."), tensor.shape)
        return tensor.numpy()
    if not is_token_file(path):
        raise InputFileError(f"{option}: {path}: must be a .npy or .safetensors file of token ids")
    try:
        with path.open("rb") as file:
            # `np.load` takes archives, too.
            ids: TokenIds = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise InputFileError(f"{option}: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, SyntaxError, TokenError, MemoryError) as error:
        raise InputFileError(f"{option}: {path} is no .npy file of numbers: {error}") from error
    return ids


def _not_ids(option: str, path: Path, dtype: str, shape: Sequence[int]) -> InputFileError:
    return InputFileError(f"{option}: {path} holds {dtype} {list(shape)}, not whole numbers [tokens] or [rows, tokens]")
