"""`kraken::lane_embedding`: the rows of an embedding that one lane holds, and zeros where another lane holds them.

    y[t] = weight[ids[t] - first_row]      if this lane has that row, else 0

Exactly one lane has a row, so the sum over the lanes is the row, to the last bit. It is written in plain operators, so
vmap, compilers and exporters see those.

Legend: R rows of a lane, D their width; `*` any dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_library: Any = torch.library.Library("kraken", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("lane_embedding(Tensor weight, Tensor ids, Tensor first_row, int rows, int padding_idx=-1) -> Tensor")


def lane_embedding(weight: Tensor, ids: Tensor, first_row: Tensor, rows: int, padding_idx: int = -1) -> Tensor:
    """Look up a lane's own rows.

    Args:
        weight: This lane's rows, [R, D].
        ids: Numbers of rows of the whole embedding, [*].
        first_row: The number of this lane's first row, [1].
        rows: Of the whole embedding. Nothing is computed with it: a graph says by it how many tokens there are, which
            lanes do not, whose last rows may be padding.
        padding_idx: The row that gets no gradient from lookups, numbered as `ids` are; -1 if every row gets one.

    Returns:
        [*, D].
    """
    places = ids - first_row
    own_rows = places.clamp(0, weight.shape[0] - 1)
    found = F.embedding(own_rows, weight)
    if padding_idx >= 0 and torch.is_grad_enabled():
        found = torch.where((ids == padding_idx).unsqueeze(-1), found.detach(), found)
    # Filled, not multiplied: the row that stands in for another lane's may hold infinities.
    return found.masked_fill((own_rows != places).unsqueeze(-1), 0.0)


_library.impl("lane_embedding", lane_embedding, "CompositeImplicitAutograd")
