"""Moves a graph between devices: factory calls such as `arange` name theirs as a literal. And where a module is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from kraken_compiler._torch_compat import tree_map


def device_of(module: nn.Module) -> torch.device | None:
    """The device of a module's first parameter that has values; None if there is none."""
    return next((tensor.device for tensor in module.parameters() if tensor.device.type != "meta"), None)


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


def move_program(module: fx.GraphModule, device: torch.device | str) -> None:
    """Rewrite a traced graph, and those that it calls, as if traced on `device`: what they name, and their metadata."""
    target = torch.device(device)
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        retarget(part, target)
        for node in part.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map(lambda value: _moved(value, target), node.meta["val"])


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.device != device else value
