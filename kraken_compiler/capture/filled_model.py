"""A model that was built without values, given those of a store: all of it in memory."""

from __future__ import annotations

from torch import Tensor, nn

from kraken_compiler.weights.store import WeightStore


def fill(model: nn.Module, store: WeightStore) -> None:
    """Put a store's values into a model that has none; tied parameters stay tied.

    Args:
        model: A module whose parameters are on the meta device; it is changed.
        store: The values of its parameters and persistent buffers.
    """
    held: dict[int, Tensor] = {}
    originals: list[Tensor] = []  # so that no other tensor takes over the id of one
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            own = f"{path}.{name}" if path else name
            if isinstance(tensor, nn.Parameter) or own in model.state_dict():
                originals.append(tensor)
                if id(tensor) not in held:
                    values = store.read(own)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    held[id(tensor)] = nn.Parameter(values, requires_grad=False) if is_parameter else values
                setattr(module, name, held[id(tensor)])
