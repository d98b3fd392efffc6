"""Linear layers whose weight was laid out for the CPU once, for graphs that are compiled.

oneDNN multiplies with a reordered copy of the weight. One copy serves every batch and sequence size. It is no ordinary
tensor, so compiled code holds its name.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kraken_compiler import _torch_compat as compat

_library: Any = torch.library.Library("kraken_rank", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, str weight, int columns, Tensor? bias=None) -> Tensor")

SMALLEST = 1 << 16
"""Elements that a weight must have; for fewer, oneDNN's 20 us a call are not earned back."""


class _PackedWeights:
    """The reordered copies there are: by name, for compiled code, and by the weight that each is of."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._numbers = itertools.count()

    def __getitem__(self, name: str) -> Tensor:
        return self._copies[name]

    def name_of(self, weight: Tensor) -> str:
        """The name of a weight's copy, which is made at the first call and lives as long as the weight."""
        key = id(weight)
        if key not in self._names:
            # Numbered, so that another run finds its code in the compiler's cache.
            self._names[key] = name = f"linear {next(self._numbers)}"
            self._copies[name] = compat.reorder_linear_weight(weight)
            weakref.finalize(weight, self._forget, key)
        return self._names[key]

    def _forget(self, key: int) -> None:
        del self._copies[self._names.pop(key)]


_PACKED = _PackedWeights()


def can_pack(weight: Tensor) -> bool:
    """True if a reordered copy can be multiplied with on this machine."""
    if weight.device.type != "cpu" or weight.dim() != 2 or weight.numel() < SMALLEST:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return compat.multiplies_bfloat16()
    return weight.dtype == torch.float32


def packed_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a weight (columns x inputs) that can be packed, as compiled programs call it."""
    copy = compat.reorder_linear_weight(weight)
    return lambda x: _multiply(x, copy, None, "none", (), "")


def packed_name(weight: Tensor) -> str:
    """The name by which `kraken_rank::linear` knows a weight (columns x inputs); one copy serves all graphs."""
    return _PACKED.name_of(weight)


def _linear(x: Tensor, weight: str, columns: int, bias: Tensor | None = None) -> Tensor:
    result: Tensor = _multiply(x, _PACKED[weight], bias, "none", (), "")
    return result


def _linear_like(x: Tensor, weight: str, columns: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_multiply = compat.reordered_linear()
_library.impl("linear", _linear, "CPU")
torch.library.register_fake("kraken_rank::linear", _linear_like, lib=_library)
