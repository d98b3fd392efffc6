"""GGUF headers read once: transformers reads one for the config, the weights and the tokenizer, seconds each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray


@contextmanager
def headers_read_once() -> Iterator[None]:
    """Share GGUF readers by path, and tables of names by architecture, inside the block.

    transformers asks for the table once a module of the model, which takes longer than to convert the weights. Whoever
    reads such files meanwhile in another thread only shares what is read.

    Raises:
        ImportError: `gguf` is not installed.
    """
    import gguf

    reader_class: Any = gguf.GGUFReader

    class PlainReader(reader_class):  # type: ignore[misc]
        """A reader of a plain array: a slice of a `memmap` calls Python, and a header takes millions of slices."""

        @property
        def data(self) -> NDArray[Any]:
            return self._plain_array

        @data.setter
        def data(self, array: NDArray[Any]) -> None:
            self._plain_array = array.view(np.ndarray)

    readers, tables = functools.cache(PlainReader), functools.cache(gguf.get_tensor_name_map)
    with (
        patch.object(gguf, "GGUFReader", lambda path: readers(str(path))),
        patch.object(gguf, "get_tensor_name_map", tables),
    ):
        yield
