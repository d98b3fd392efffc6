"""Modules without the memory of their weights: parameters on the meta device, then fake ones for tracing.

Buffers stay real: their values come from the model's code, not from the checkpoint, and become program constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kraken_compiler import _torch_compat as compat
from kraken_compiler._torch_compat import FakeTensorMode


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device as soon as a module registers it.

    Modules allocate a parameter before they fill it, and untouched memory costs nothing; so nothing is ever filled.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def fake_parameters(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Replace meta parameters by fake CPU tensors while the model is traced.

    A graph traced on meta tensors would name the meta device in every op that creates a tensor. Tied parameters stay
    tied.
    """
    mode = compat.new_fake_mode()
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    slots = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    try:
        for module, name, parameter in slots:
            if parameter not in fakes:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    fakes[parameter] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = fakes[parameter]
        yield mode
    finally:
        for module, name, parameter in slots:
            module._parameters[name] = parameter
