"""The calls of a communicator as torch ops, for graphs that are compiled.

`kraken_rank::start(x, communicator) -> part` begins a sum and `kraken_rank::wait(part, communicator) -> sum` gives it.
A communicator is given by name, because compiled code holds no objects. `part` is a copy of x that is being sent: a
compiler writes to the memory of x as soon as it is not read any more, and knows nothing of the sending; the copy lives
until its wait has run. `after` is what must have been computed before; it is not looked at.

Defined with `torch.library.Library`, because these run some hundred times per token and its calls are the cheapest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kraken_compiler.ranks.communicators.communicator import communicator_named

_library: Any = torch.library.Library("kraken_rank", "DEF")  # type: ignore[no-untyped-call]
_library.define("start(Tensor x, str communicator) -> Tensor")
_library.define("wait(Tensor part, str communicator, Tensor? after=None) -> Tensor")
_library.define("all_gather(Tensor x, int dim, int degree, str communicator) -> Tensor")


def _start(x: Tensor, communicator: str) -> Tensor:
    part, named = x.clone(memory_format=torch.contiguous_format), communicator_named(communicator)
    named.in_flight[part.data_ptr()] = named.start(part)
    return part


def _wait(part: Tensor, communicator: str, after: Tensor | None = None) -> Tensor:
    if not part.numel():
        return part.clone()
    named = communicator_named(communicator)
    total = named.wait(named.in_flight.pop(part.data_ptr()))
    return part.clone() if total is part else total  # an op may not return its operand


def _all_gather(x: Tensor, dim: int, degree: int, communicator: str) -> Tensor:
    return communicator_named(communicator).all_gather(x, dim)


def _same_shape(x: Tensor, communicator: str, after: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


def _gathered_shape(x: Tensor, dim: int, degree: int, communicator: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * degree
    return x.new_empty(shape)


for _name, _run, _fake in (
    ("start", _start, _same_shape),
    ("wait", _wait, _same_shape),
    ("all_gather", _all_gather, _gathered_shape),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"kraken_rank::{_name}", _fake, lib=_library)
