"""Evaluation mode for capture, and notes about what a module computes in training mode only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from kraken_compiler._torch_compat import OpOverload, arguments_by_name, op_name

aten = torch.ops.aten

EVALUATION = "the model is in training mode, the lanes compute what it computes in evaluation mode"


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's flag as it was afterwards.

    A model in evaluation mode stays as it is, and what still trains in it, as some dropouts are made to, shows.
    """
    training = {module: module.training for module in model.modules()}
    try:
        # Flags one by one: `eval()` may be overridden to do more.
        for module in training if model.training else ():
            module.training = False
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def training_only_notes(graphs: Iterable[fx.Graph]) -> tuple[str, ...]:
    """One note for each thing that a module does in training only, with its number of places and the first of them.

    Args:
        graphs: The module as traced in training mode: its graph and those of its regions.
    """
    places: dict[str, list[str]] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        operation = _training_operation(node)
        if operation is not None:
            places.setdefault(operation, []).append(module_path(node))
    return tuple(
        f"{EVALUATION}: without {operation} at {len(paths)} place{'s' if len(paths) > 1 else ''}, first in '{paths[0]}'"
        for operation, paths in places.items()
    )


def _training_operation(node: fx.Node) -> str | None:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    arguments = arguments_by_name(node)
    if not arguments.get("train", arguments.get("training", True)):
        return None
    probability = arguments.get("p", arguments.get("dropout_p"))
    if probability is not None and op_name(node.target).endswith(("dropout", "dropout_", "attention")):
        return f"dropout (p = {probability:g})" if probability > 0 else None
    if node.target is aten.batch_norm.default:
        return "the statistics of the batch, of its batch norms"
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return f"the random numbers of {node.target.name()}"  # type: ignore[no-untyped-call]
    return None


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that made a node; "" of what the model itself made."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(stack.values()) if path), "")
