"""Linear layers whose weight was laid out for the CPU once, for graphs that are compiled.

oneDNN multiplies with a reordered copy of the weight. One copy serves every batch and sequence size. It is no ordinary
tensor, so compiled code holds its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("kraken_rank", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, str weight, int columns, Tensor? bias=None) -> Tensor")

SMALLEST = 1 << 16
"""Elements that a weight must have; for fewer, oneDNN's 20 us a call are not earned back."""

_packed_weights: dict[str, Tensor] = {}


def can_pack(weight: Tensor) -> bool:
    """True if a reordered copy can be multiplied with on this machine."""
    if weight.device.type != "cpu" or weight.dim() != 2 or weight.numel() < SMALLEST:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(name: str, weight: Tensor) -> None:
    """Keep a reordered copy of a weight (columns x inputs) under a name."""
    _packed_weights[name] = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def unpack(name: str) -> None:
    """Forget a copy."""
    _packed_weights.pop(name, None)


def _linear(x: Tensor, weight: str, columns: int, bias: Tensor | None = None) -> Tensor:
    result: Tensor = _pointwise(x, _packed_weights[weight], bias, "none", (), "")
    return result


def _linear_like(x: Tensor, weight: str, columns: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default
_library.impl("linear", _linear, "CPU")
torch.library.register_fake("kraken_rank::linear", _linear_like, lib=_library)
