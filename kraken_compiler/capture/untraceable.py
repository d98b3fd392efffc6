"""The reason why a module cannot be traced, in our words where the tracer's are about itself."""

from __future__ import annotations

from torch import nn

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import Rejection


def why_untraceable(model: nn.Module, error: BaseException) -> Rejection | None:
    """The rejection of code that no captured graph can follow; None if the tracer's own words must do.

    Args:
        model: The module.
        error: What tracing it raised.
    """
    line = compat.branch_on_numbers(error)
    if line is None:
        return None
    path = _dynamic_rotary(model)
    if path is not None:
        return Rejection(
            "its rotary positions are of the kind 'dynamic': their frequencies follow from the longest sequence that "
            "the module has been given so far, and a captured graph keeps no such state",
            path=path,
            hint="Choose another rope_type, e.g. 'linear' or 'yarn', or 'default' for sequences that are not longer "
            "than max_position_embeddings.",
        )
    return Rejection(
        f"its forward chooses a branch by the numbers in a tensor, and a captured graph has one branch: {line}",
        path=type(model).__name__,
        hint="Choose values with torch.where instead, or decide before the forward.",
    )


def _dynamic_rotary(model: nn.Module) -> str | None:
    """Path of the first module whose rotary frequencies change with what it is given, by its own `rope_type`."""
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if isinstance(kind, str) and "dynamic" in kind:
                return path or type(module).__name__
    return None
