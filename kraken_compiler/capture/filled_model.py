"""Filling a model that was built without values with those of a store, all of it in memory."""

from __future__ import annotations

from torch import Tensor, nn

from kraken_compiler.capture.huggingface_model import named_state
from kraken_compiler.weights.store import WeightStore


def fill(model: nn.Module, store: WeightStore) -> None:
    """Put a store's values into a model that has none; what it ties stays tied, what the store lacks as it is.

    Args:
        model: A module whose parameters are on the meta device; it is changed.
        store: The values of its parameters and persistent buffers.
    """
    state, names = named_state(model), set(store.names())
    sources = {id(tensor): name for name, tensor in state.items() if name in names}
    values: dict[int, Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None or id(tensor) not in sources:
                    continue
                key = id(tensor)
                if key not in values:
                    value = store.read(sources[key])
                    values[key] = (
                        nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                    )
                setattr(module, name, values[key])
