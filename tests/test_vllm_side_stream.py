"""A sum on a side stream reads its part until it is awaited: no compiler may use the part's memory again before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.backends.lane_graph.run_graph import KEEP_THE_ORDER
from kraken_compiler.backends.vllm.run import side_stream

pytestmark = pytest.mark.slow

WIDTH = 64


def layer(x: Tensor, weights: list[Tensor]) -> Tensor:
    """A part as two branches give it, and a window in which memory is asked for."""
    first, second, *others = weights
    part = F.linear(x, first) + F.linear(torch.relu(x), second)
    out = side_stream.START(part)
    for weight in others:
        x = torch.relu(F.linear(x, weight)) + x
    side_stream.WAIT(out, part, x)
    return out + x


def operands(device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    """What `layer` takes."""
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(7))
    return x.unsqueeze(0).to(device), [weight.to(device) for weight in weights]


def test_the_part_is_kept_until_its_wait() -> None:
    """The sum is made at the wait, of what the part's memory holds then: the latest that a side stream could be."""
    in_flight: dict[int, int] = {}

    def start(part: Tensor) -> Tensor:
        out = torch.full_like(part, torch.nan)
        in_flight[out.data_ptr()] = part.data_ptr()
        return out

    def wait(out: Tensor, part: Tensor, after: Tensor | None = None) -> None:
        assert part.data_ptr() == in_flight.pop(out.data_ptr())
        out.copy_(part * 2)

    compiled = torch.compile(layer, fullgraph=True, options={**KEEP_THE_ORDER, "fx_graph_cache": False})
    with torch.library._scoped_library("kraken_engine", "IMPL") as library:
        library.impl("start", start, "CPU")
        library.impl("wait", wait, "CPU")
        want = layer(*operands())
        torch.testing.assert_close(compiled(*operands()), want)
        assert not in_flight
