"""Look through the repetition of KV heads: what a cache must keep is what was repeated.

%r = reshape(expand(unsqueeze(%k, 2), [.., 4, ..]), [.., 8, ..])     ->     %k, 2 heads instead of 8
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kraken_compiler.passes.graph_tools import args_of, aten
from kraken_compiler.passes.shapes import Concretizer, is_tensor, same_size, shape_of

_REPEATING = frozenset(
    {
        aten.reshape.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.repeat_interleave.self_int,
        aten.clone.default,
        aten.contiguous.default,
    }
)


def unrepeated(node: fx.Node) -> fx.Node:
    """The tensor [B, K, S, D] of which `node` [B, H, S, D] repeats every head H/K times in a row; `node` if none.

    That it does just that is tried out on random numbers.
    """
    best, current, chain = node, node, [node]
    while current.target in _REPEATING:
        current = args_of(current)[0]
        if not isinstance(current, fx.Node) or not is_tensor(current):
            break
        chain.append(current)
        if _smaller(current, best) and _repeats(chain, current):
            best = current
    return best


def _smaller(part: fx.Node, whole: fx.Node) -> bool:
    part_shape, whole_shape = shape_of(part), shape_of(whole)
    if len(part_shape) != 4 or not all(same_size(part_shape[dim], whole_shape[dim]) for dim in (0, 2, 3)):
        return False
    return (
        isinstance(part_shape[1], int)
        and isinstance(whole_shape[1], int)
        and part_shape[1] < whole_shape[1]
        and whole_shape[1] % part_shape[1] == 0
    )


def _repeats(chain: list[fx.Node], source: fx.Node) -> bool:
    sizes = Concretizer()
    value = torch.randn(sizes.shape(source), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = {source: value}
    for node in reversed(chain[: chain.index(source)]):

        def concrete(operand: fx.Node) -> Any:
            return values[operand] if operand in values else sizes.size(operand.meta["val"])

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), concrete)
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)
    whole = values[chain[0]]
    return torch.equal(whole, value.repeat_interleave(whole.shape[1] // value.shape[1], dim=1))
