"""The check that a quantised weight can be cut where a plan cuts it: its scales are for groups of columns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.index_set import IndexSet, size
from kraken_compiler.ops.op_sets import DEQUANTIZE
from kraken_compiler.passes.graph_tools import ancestors, args_of, grain_of, module_path
from kraken_compiler.passes.shapes import shape_of

HINT = "Try another degree, or quantise the model with a smaller group size, or with one scale a row."
_EVEN_HINT = (
    "Try a degree that divides the heads and the FFN columns, or quantise the model in groups or symmetrically."
)


def cut_of_scales(output: fx.Node, owned: Sequence[IndexSet]) -> Rejection | None:
    """The rejection of an output projection's weight that cannot be cut; None if it can, or is not quantised.

    Args:
        output: The projection.
        owned: The columns of its weight that each lane owns.
    """
    weight = args_of(output)[1]
    assert isinstance(weight, fx.Node)
    for node in ancestors(weight):
        if node.target is not DEQUANTIZE:
            continue
        unit = grain_of(node)
        for lane, columns in enumerate(owned):
            if any(start % unit or stop % unit for start, stop in columns):
                reason = (
                    f"its weight is quantised in groups of {unit} columns, and lane {lane} of {len(owned)} would have "
                    f"{size(columns)} columns that begin or end within a group"
                )
                return Rejection(reason, (output.name,), module_path(output), HINT)
        _, scales, zero_points = args_of(node)[:3]
        if zero_points is not None and int(shape_of(scales)[1]) == 1 and len(set(map(size, owned))) > 1:
            # The scale is the row's own, so it cannot be 0 for the columns that are padding.
            reason = (
                "its weight has zero points for whole rows, and lanes of unequal width, which are padded with zeros, "
                f"cannot have them ({' and '.join(str(width) for width in sorted(set(map(size, owned))))} columns)"
            )
            return Rejection(reason, (output.name,), module_path(output), _EVEN_HINT)
    return None
