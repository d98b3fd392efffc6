"""Element types by name."""

from __future__ import annotations

import torch

from kraken_compiler.errors import UsageError

_NAMES = ("float32", "bfloat16", "float16")


def dtype_named(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype called `name`; None and what is a dtype stay what they are.

    Raises:
        UsageError: There is none that a model can be compiled to.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in _NAMES:
        raise UsageError(f"--dtype {name}: choose one of {', '.join(_NAMES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
