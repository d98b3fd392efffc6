"""Moves a graph between devices: factory calls such as `arange` name theirs as a literal."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def retarget(module: fx.GraphModule, device: torch.device | str) -> bool:
    """Rewrite every device that a node of the graph names, as keyword or by position, to `device`.

    Returns:
        True if the graph changed (it is then recompiled).
    """
    target = torch.device(device)
    is_changed = False

    def rewrite(argument: Any) -> Any:
        nonlocal is_changed
        if isinstance(argument, torch.device) and argument != target:
            is_changed = True
            return target
        return argument

    for node in module.graph.nodes:
        args = fx.node.map_aggregate(node.args, rewrite)
        kwargs = fx.node.map_aggregate(node.kwargs, rewrite)
        if is_changed:
            node.args, node.kwargs = args, kwargs
    if is_changed:
        module.recompile()
    return is_changed
