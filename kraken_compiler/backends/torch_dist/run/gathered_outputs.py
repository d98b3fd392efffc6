"""Which outputs of a lane graph are the same on all ranks to the last bit, whatever machines the ranks are on."""

from __future__ import annotations

import torch
from torch import fx

from kraken_compiler.ops import collectives as ops
from kraken_compiler.passes.graph_tools import args_of, argument, aten

_MOVES = frozenset(
    {
        *(aten.slice.Tensor, aten.select.int, aten.view.default, aten.reshape.default, aten.transpose.int),
        *(aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default),
        *(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default),
    }
)
"""Operators whose result holds numbers of their operand and no others."""

_WIDE = frozenset({torch.float32, torch.float64})
"""What floats can be cast to without a change of their value; float64 is rounded to float32 everywhere alike."""


def is_gathered(graph: fx.Graph, output: int = 0) -> bool:
    """True if an output is what the ranks have gathered, as a whole or in part.

    An all-gather hands every rank's part to all ranks as it is, so its result is the same bytes everywhere, however
    differently the ranks, their kernels or their processors have computed their parts. That ends with the first
    operation on the numbers: a softcap or a scale behind the gather may be rounded otherwise on another machine.

    Args:
        graph: A lane graph, with `kraken::` collectives.
        output: The number of the output.
    """
    assert ops is not None  # importing it defines the op
    node = args_of(graph.output_node())[0][output]
    while isinstance(node, fx.Node) and (_moves(node) or _widens(node)):
        node = args_of(node)[0]
    return isinstance(node, fx.Node) and node.target is torch.ops.kraken.all_gather.default


def _moves(node: fx.Node) -> bool:
    # Where a size is no plain number it must at least be one that follows from shapes, not from what was computed.
    return node.target in _MOVES and all(size.target is aten.sym_size.int for size in node.all_input_nodes[1:])


def _widens(node: fx.Node) -> bool:
    return node.target in (aten.to.dtype, aten._to_copy.default) and argument(node, 1, "dtype") in _WIDE
