"""`kraken_engine::start` and `kraken_engine::wait`: a sum on a CUDA stream of its own, by vLLM's communicator.

    out = kraken_engine::start(part)                the side stream waits for what has been computed, then reduces
    kraken_engine::wait(out, part, after)           the stream that computes waits for the side stream

`out` and `part` lie in memory of the stream that computes and live until the wait, so neither is used for anything else
while the other stream reads or writes it. Compilers are told that `start` writes to the part, which it does not: they
may not give `wait` another tensor of the same values then, computed once more, and use the first one's memory again.
`after` is the last matrix product of the window: it keeps compilers from moving a wait up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("kraken_engine", "DEF")  # type: ignore[no-untyped-call]
_library.define("start(Tensor(a!) part) -> Tensor")
_library.define("wait(Tensor(a!) out, Tensor part, Tensor? after=None) -> ()")

START, WAIT = torch.ops.kraken_engine.start.default, torch.ops.kraken_engine.wait.default


def reduce(part: Tensor) -> Tensor:
    """The sum of a part over the tensor-parallel group, on the current stream."""
    from vllm.distributed import get_tp_group

    total: Tensor = get_tp_group()._all_reduce_out_place(part)
    return total


class _SideStream:
    """The stream on which sums run."""

    def __init__(self) -> None:
        self.stream: Any = None

    def get(self) -> Any:
        if self.stream is None:
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self.stream


_SIDE = _SideStream()
"""One for a process, for compiled code can hold no objects."""


def _start(part: Tensor) -> Tensor:
    out, side = torch.empty_like(part), _SIDE.get()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out.copy_(reduce(part))
    return out


def _wait(out: Tensor, part: Tensor, after: Tensor | None = None) -> None:
    torch.cuda.current_stream().wait_stream(_SIDE.get())


_library.impl("start", _start, "CUDA")
_library.impl("wait", _wait, "CUDA")
torch.library.register_fake("kraken_engine::start", torch.empty_like, lib=_library)
torch.library.register_fake("kraken_engine::wait", lambda out, part, after=None: None, lib=_library)
