"""Sums and gathers of a lane program that gradients flow through.

The loss is the sum of what every rank adds to it. So the backward pass of a collective is its transpose: a sum that all
lanes read gets the sum of all lanes' gradients, and a gathered part the sum of the gradients of its copies.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kraken_compiler.ranks.communicators.communicator import Communicator


class Collectives(Protocol):
    """The collectives of a lane program."""

    def start(self, x: Tensor, differs: bool) -> Any:
        """Begin a sum over the lanes; `differs` tells whether their parts differ. Returns what `wait` takes."""
        ...

    def wait(self, handle: Any) -> Tensor:
        """The finished sum."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The lanes' parts, one behind the other along `dim`."""
        ...


class InOneProcess:
    """Collectives of lanes in one process; a value that differs between lanes has them as its first dim."""

    def __init__(self, degree: int) -> None:
        self._degree = degree

    def start(self, x: Tensor, differs: bool) -> Tensor:
        return x.sum(0) if differs else x * self._degree

    def wait(self, handle: Tensor) -> Tensor:
        return handle

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(x.unbind(0), dim=dim)


class OnRanks:
    """Collectives of ranks that run a lane each.

    A sum of the backward pass starts where the forward pass waits, so what hides one hides the other too.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def start(self, x: Tensor, differs: bool) -> _Sum:
        handle = _Sum(self._communicator)
        handle.part = _Start.apply(x, handle)  # type: ignore[no-untyped-call]
        return handle

    def wait(self, handle: _Sum) -> Tensor:
        total: Tensor = _Wait.apply(handle.part, handle)  # type: ignore[no-untyped-call]
        return total

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        whole: Tensor = _Gather.apply(x, dim, self._communicator)  # type: ignore[no-untyped-call]
        return whole


class _Sum:
    """One sum on its way, and that of its gradients."""

    part: Any

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.forward: Any = None
        self.backward: Any = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: _Sum) -> Tensor:
        ctx.handle = handle
        handle.forward = handle.communicator.start(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        handle: _Sum = ctx.handle
        return handle.communicator.wait(handle.backward), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, handle: _Sum) -> Tensor:
        ctx.handle = handle
        return handle.communicator.wait(handle.forward)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        handle: _Sum = ctx.handle
        (gradient,) = gradients
        handle.backward = handle.communicator.start(gradient.contiguous())
        # The gradient itself comes with the sum; autograd only needs to know that there is one.
        return gradient.new_zeros(()).expand_as(gradient), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, communicator: Communicator) -> Tensor:
        ctx.dim, ctx.size, ctx.communicator = dim, x.shape[dim], communicator
        return communicator.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        total = ctx.communicator.wait(ctx.communicator.start(gradient.contiguous()))
        return total.narrow(ctx.dim, ctx.communicator.rank * ctx.size, ctx.size), None, None
