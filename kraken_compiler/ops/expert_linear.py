"""`kraken::expert_linear`: a linear for which every row picks one of several weights, as mixtures of experts need.

It computes only the experts that are picked and copies no weight per row. Under `torch.vmap` over the lanes the lanes'
experts become more experts of one call.

Legend: E experts, I columns in, O columns out; `*` any leading dims.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("kraken::expert_linear", mutates_args=())
def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """`x W_e^T + b_e`, with e read per row from `experts`.

    Args:
        x: [*, I].
        weight: [E, O, I].
        bias: [E, O] or None.
        experts: Whole numbers below E, [*].

    Returns:
        [*, O].
    """
    rows, indices = x.reshape(-1, x.shape[-1]), experts.reshape(-1)
    if rows.is_cuda and len(rows) <= len(weight):
        # A copy of each row's weight, because counting the rows of an expert would wait for the device.
        out = torch.bmm(weight[indices], rows.unsqueeze(-1)).squeeze(-1)
    else:
        out = rows.new_empty(len(rows), weight.shape[1])
        for expert, row_numbers in _rows_of_experts(indices, len(weight)):
            out[row_numbers] = F.linear(rows[row_numbers], weight[expert])
    if bias is not None:
        out = out + bias[indices]
    return out.reshape(*experts.shape, weight.shape[1])


def autocast_expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """`kraken::expert_linear` in the element type of products under autocast, which does not know ops of ours."""
    product: Tensor
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        product = torch.ops.kraken.expert_linear(x, weight, bias, experts)
        return product
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        own_bias = bias.to(dtype) if bias is not None else None
        product = torch.ops.kraken.expert_linear(x.to(dtype), weight.to(dtype), own_bias, experts)
    return product


def _rows_of_experts(indices: Tensor, count: int) -> list[tuple[int, Tensor]]:
    """The experts that are picked, each with the numbers of its rows."""
    order, stops = indices.argsort(stable=True), torch.bincount(indices, minlength=count).cumsum(0).tolist()
    bounds = enumerate(itertools.pairwise([0, *stops]))
    return [(expert, order[start:stop]) for expert, (start, stop) in bounds if stop > start]


@expert_linear.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    return x.new_empty(*experts.shape, weight.shape[1])


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor
) -> tuple[Tensor, int]:
    lanes = info.batch_size

    def lanes_first(tensor: Tensor, lane_dim: int | None) -> Tensor:
        return tensor.expand(lanes, *tensor.shape) if lane_dim is None else tensor.movedim(lane_dim, 0)

    x, experts = lanes_first(x, in_dims[0]), lanes_first(experts, in_dims[3])
    if in_dims[1] is not None or in_dims[2] is not None:
        weight = lanes_first(weight, in_dims[1])
        first = torch.arange(lanes, device=experts.device) * weight.shape[1]
        experts = experts + first.reshape(lanes, *(1,) * (experts.dim() - 1))
        weight = weight.flatten(0, 1)
        bias = lanes_first(bias, in_dims[2]).flatten(0, 1) if bias is not None else None
    return torch.ops.kraken.expert_linear(x, weight, bias, experts), 0


expert_linear.register_vmap(_vmap)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x, weight, bias, experts = inputs
    ctx.save_for_backward(x, weight, experts)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight, experts = ctx.saved_tensors
    rows, grads, indices = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), experts.reshape(-1)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.kraken.expert_linear(grad, weight.transpose(1, 2), None, experts)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.zeros_like(weight)
        for expert, row_numbers in _rows_of_experts(indices, len(weight)):
            grad_weight[expert] = grads[row_numbers].t() @ rows[row_numbers]
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grads.new_zeros(len(weight), grads.shape[-1]).index_add_(0, indices, grads)
    return grad_x, grad_weight, grad_bias, None


expert_linear.register_autograd(_backward, setup_context=_save)
