"""Operators by what they are to the compiler: products with weights, attention, norms."""

from __future__ import annotations

import torch

from kraken_compiler.ops import (
    capped_attention,  # noqa: F401  (registers our own)
    dequantize,  # noqa: F401  (registers our own)
    expert_linear,  # noqa: F401  (registers our own)
    lane_embedding,  # noqa: F401  (registers our own)
)

aten = torch.ops.aten

LINEAR = aten.linear.default
EXPERT_LINEAR = torch.ops.kraken.expert_linear.default
DEQUANTIZE = torch.ops.kraken.dequantize.default
EMBEDDING = aten.embedding.default
LANE_EMBEDDING = torch.ops.kraken.lane_embedding.default
PROJECTIONS = frozenset({LINEAR, EXPERT_LINEAR})
"""Products with weights; their operands are x, the weight [..., out, in] and the bias, in this order."""

ATTENTION = aten.scaled_dot_product_attention.default
CAPPED_ATTENTION = torch.ops.kraken.capped_attention.default
ATTENTIONS = frozenset({ATTENTION, CAPPED_ATTENTION})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default, aten.group_norm.default})
MASKED_FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
SHAPE_ONLY = frozenset(
    {
        aten.sym_size.int,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
    }
)
"""Operators that read their operand's shape and not its values."""
