"""The tied tensors of a Hugging Face model: those its config ties, unless the checkpoint holds different values.

transformers ties by the config where a tensor is missing, in either direction, and unties where both are there and
differ. The model is changed accordingly before it is traced, so that the graph has one weight or two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kraken_compiler.capture.huggingface_model import named_state
from kraken_compiler.errors import InputFileError

SameValues = Callable[[str, str], bool]
"""Test whether two tensors of the model, which the checkpoint holds both, have the same values there."""


@dataclass(frozen=True)
class Ties:
    """The ties between a model's tensors, as its checkpoint has them.

    Attributes:
        stored_names: Name of a tensor of the model -> name under which the checkpoint holds its values.
        untied: Pairs of tensors that the config ties and the checkpoint does not.
    """

    stored_names: Mapping[str, str]
    untied: tuple[tuple[str, str], ...]

    def notes(self) -> tuple[str, ...]:
        """Notes about the untied pairs, one sentence each."""
        return tuple(
            f"the config ties '{target}' to '{source}', but the files hold different values for the two: they are not "
            "tied, as in transformers"
            for target, source in self.untied
        )


def settle_ties(model: nn.Module, present: set[str], same: SameValues, location: object) -> Ties:
    """Untie what the checkpoint holds apart, in `model` itself, and say what holds every tensor's values.

    Args:
        model: A `transformers.PreTrainedModel`, tied as its config says.
        present: Names of the tensors that the checkpoint holds.
        same: Compares two of them.
        location: Where the checkpoint is, for messages.

    Raises:
        InputFileError: Tensors that are one by the model's code have different values.
    """
    pretrained: Any = model
    ties = _loading_ties(dict(pretrained.all_tied_weights_keys), present, same)
    for target, _ in ties.untied:
        _untie(model, target)
    stored_names = dict(ties.stored_names)
    for names in _shared(model):
        holders = list(dict.fromkeys(stored_names[name] for name in names if name in stored_names))
        for other in holders[1:]:
            if not same(holders[0], other):
                raise InputFileError(
                    f"{location}: '{holders[0]}' and '{other}' are one tensor of the model, and have different values"
                )
        stored_names.update((name, holders[0]) for name in names if holders)
    return Ties(stored_names, ties.untied)


def _loading_ties(tied: Mapping[str, str], present: set[str], same: SameValues) -> Ties:
    """The ties that loading makes. One after the other, as in transformers: each may give the next its values."""
    stored_names = {name: name for name in present}
    untied = []
    for target, source in tied.items():
        if target in stored_names and source in stored_names:
            if not same(stored_names[source], stored_names[target]):
                untied.append((target, source))
                continue
            stored_names[target] = stored_names[source]
        elif source in stored_names:
            stored_names[target] = stored_names[source]
        elif target in stored_names:
            stored_names[source] = stored_names[target]
        else:
            siblings = (other for other, tied_source in tied.items() if tied_source == source and other in stored_names)
            sibling = next(siblings, None)
            if sibling is not None:
                stored_names[target] = stored_names[sibling]
    return Ties(stored_names, tuple(untied))


def _untie(model: nn.Module, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, attribute)
    assert isinstance(tensor, Tensor)
    separate = torch.empty_like(tensor.detach())
    setattr(
        module, attribute, nn.Parameter(separate, tensor.requires_grad) if attribute in module._parameters else separate
    )


def _shared(model: nn.Module) -> list[list[str]]:
    """Groups of names that one tensor has."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_state(model).items():
        groups[id(tensor)].append(name)
    return [names for names in groups.values() if len(names) > 1]
