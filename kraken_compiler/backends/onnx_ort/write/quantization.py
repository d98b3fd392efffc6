"""Weights in 8 or 4 bits, by ONNX Runtime's own quantizer: rounded to the nearest, without data.

A column of a weight is cut into blocks along the rows, each with a scale and a zero point:
weight = scale * (integer - zero point).

Legend: K rows (what a product sums over), N columns, C blocks of a column, S rows of a block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]
"""Integers, scales and zero points, shaped as `Quantization.part_shapes` says; two integers of 4 bits share a byte."""


@dataclass(frozen=True)
class Quantization:
    """The format of quantized weights.

    Attributes:
        bits: Of an element.
        block: Rows of a block, S.
    """

    bits: int
    block: int

    def part_names(self, weight: str) -> tuple[str, str, str]:
        """Names of a weight's integers, scales and zero points in the file; ONNX Runtime's quantizer has the same."""
        return f"{weight}_Q{self.bits}", f"{weight}_scales", f"{weight}_zero_points"

    def part_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Their shapes: [N, C, bytes of a block], [N, C], [N, bytes of C zero points]."""
        blocks = -(-rows // self.block)
        return (
            (columns, blocks, self.block * self.bits // 8),
            (columns, blocks),
            (columns, -(-blocks * self.bits // 8)),
        )


QUANTIZATIONS = {"int8": Quantization(8, 128), "int4": Quantization(4, 32)}
"""By the names of `format.WEIGHT_KINDS`. Blocks must be short for 4 bits to stay near the weights."""


def quantize(weight_KN: Tensor, quantization: Quantization) -> Parts:
    """Quantize a weight.

    Args:
        weight_KN: float32 or float16.
        quantization: The format.
    """
    quantizer = _quantizer(quantization)
    integers, scales, zero_points = quantizer.qbits_block_quant(np.ascontiguousarray(weight_KN.numpy()))
    return torch.from_numpy(integers), torch.from_numpy(scales), torch.from_numpy(zero_points)


def dequantize(parts: Parts, rows: int, quantization: Quantization) -> Tensor:
    """The weight that a quantized product multiplies with, [K, N], in the type of the scales."""
    integers, scales_NC, zero_points = parts
    columns, blocks = scales_NC.shape
    values_NCS = _unpack(integers, quantization.bits).view(columns, blocks, quantization.block)
    zeros_NC = _unpack(zero_points, quantization.bits)[:, :blocks]
    weight_NCS = (values_NCS.float() - zeros_NC[..., None].float()) * scales_NC[..., None].float()
    return weight_NCS.view(columns, -1)[:, :rows].t().to(scales_NC.dtype)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Integers [..., count] out of bytes, the low half of a byte first."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@cache
def _quantizer(quantization: Quantization) -> Any:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    # Importing it turns logging to the terminal on, for everybody in the process.
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    root.handlers[:], root.level = handlers, level
    config = DefaultWeightOnlyQuantConfig(block_size=quantization.block, bits=quantization.bits)
    return DefaultWeightOnlyQuantizer(config)
