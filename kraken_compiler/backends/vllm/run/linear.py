"""A linear layer of a lane graph, computed by the kernel that vLLM chooses for its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm, dispatch_unquantized_gemm


class EngineLinear(nn.Module):
    """x W^T + b.

    Attributes:
        weight: [out, in].
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._multiply = dispatch_unquantized_gemm()

    def prepare(self) -> None:
        """Lay the weight out for the kernel, where that wants one of its own; then the layer holds no other."""
        if self.weight.device.type == "cpu":
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result: Tensor = self._multiply(self, x, self.weight, self.bias)
        return result


def takes(weight: Tensor) -> bool:
    """True if such a weight can be an `EngineLinear`'s."""
    return weight.dim() == 2 and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
