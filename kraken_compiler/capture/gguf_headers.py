"""GGUF headers read once: transformers reads one for the config, the weights and the tokenizer, seconds each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray


class GgufHeaders:
    """GGUF readers by path, for as long as somebody will read the same files again.

    A header of a tokenizer's hundred thousand texts is millions of small arrays.
    """

    def __init__(self) -> None:
        self._readers: dict[str, Any] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Read headers once, and tables of names, which transformers asks for once a module, once by architecture.

        Whoever reads such files meanwhile in another thread only shares what is read.

        Raises:
            ImportError: `gguf` or transformers is not installed.
        """
        import gguf
        from transformers import modeling_gguf_pytorch_utils

        tables = functools.cache(gguf.get_tensor_name_map)
        parse = getattr(modeling_gguf_pytorch_utils, "_gguf_parse_value", None)
        with (
            patch.object(gguf, "GGUFReader", functools.partial(self._reader, gguf.GGUFReader)),
            patch.object(gguf, "get_tensor_name_map", tables),
            patch.object(modeling_gguf_pytorch_utils, "_gguf_parse_value", _fast(parse), create=True),
        ):
            yield

    def forget(self) -> None:
        """Let go of what was read."""
        self._readers.clear()

    def _reader(self, reader_class: Any, path: Any) -> Any:
        key = str(path)
        if key not in self._readers:
            self._readers[key] = _plain(reader_class)(path)
        return self._readers[key]


def _plain(reader_class: Any) -> Any:
    """A reader of a plain array: a slice of a `memmap` calls Python, and a header takes millions of slices."""

    class PlainReader(reader_class):  # type: ignore[misc]
        @property
        def data(self) -> NDArray[Any]:
            return self._plain_array

        @data.setter
        def data(self, array: NDArray[Any]) -> None:
            self._plain_array = array.view(np.ndarray)

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> NDArray[Any]:
            if self.byte_order != "I" or override_order is not None:
                return super()._get(offset, dtype, count, override_order)  # type: ignore[no-any-return]
            # In this machine's order there is nothing to turn around.
            return self._plain_array[offset : offset + np.dtype(dtype).itemsize * int(count)].view(dtype)

    return PlainReader


def _fast(parse: Any) -> Any:
    """transformers' parser of a field's value, which turns texts into lists of numbers and back."""
    import gguf

    text, array = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY

    def parse_value(value: Any, types: Any) -> Any:
        if isinstance(types, list) and types[-1:] == [text] and types[:-1] in ([], [array]):
            return value.tobytes().decode()
        return parse(value, types)

    return parse_value
