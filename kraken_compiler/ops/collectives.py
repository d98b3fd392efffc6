"""The collective ops of the lane program, and their meaning when all lanes live in one process.

`kraken::all_reduce_start(x) -> h` and `kraken::wait(h) -> y` sum a tensor over the lanes; `kraken::all_gather(x, dim)`
concatenates the lanes' parts. In a graph they are opaque, and what runs it replaces them: with a sum or a concatenation
over the lanes of one process, or with real collectives. Called for one lane alone they are the identity.

`kraken::attention` is scaled_dot_product_attention with a batching rule that folds the lanes into the batch (torch
2.13 has none for its CPU kernel and falls back to a loop over the lanes).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.ops import (
    capped_attention,  # noqa: F401  (importing defines their ops)
    dequantize,  # noqa: F401  (importing defines their ops)
    expert_linear,  # noqa: F401  (importing defines their ops)
    lane_embedding,  # noqa: F401  (importing defines their ops)
)


@torch.library.custom_op("kraken::all_reduce_start", mutates_args=())
def all_reduce_start(x: Tensor) -> Tensor:
    """Begin the sum of `x` over the lanes; the handle may only be given to `wait`."""
    return x.clone()


@torch.library.custom_op("kraken::wait", mutates_args=())
def wait(handle: Tensor) -> Tensor:
    """The finished sum, same shape as the operand of the start."""
    return handle.clone()


@torch.library.custom_op("kraken::all_gather", mutates_args=())
def all_gather(x: Tensor, dim: int, degree: int) -> Tensor:
    """Concatenate the lanes' parts along `dim`, lane 0 first; the result is `degree` times as long there."""
    return torch.cat([x] * degree, dim=dim)


@all_reduce_start.register_fake
@wait.register_fake
def _same_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@all_gather.register_fake
def _gathered_shape(x: Tensor, dim: int, degree: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * degree
    return x.new_empty(shape)


@torch.library.custom_op("kraken::mean_power", mutates_args=())
def mean_power(x: Tensor, power: int, width: int, share: Tensor | None = None) -> Tensor:
    """The sum of `x` ** `power` over the last dim divided by `width`; [..., 1].

    A placeholder in lane graphs under construction, for a mean over columns that are split between lanes; a pass writes
    it as sums and an all-reduce before a graph is complete.

    Args:
        x: Columns of which a lane holds a part.
        power: 1 for the mean, 2 for the mean of squares.
        width: Number of columns of all lanes.
        share: Factor on every column; None means 1.
    """
    value = x**power if share is None else x**power * share
    return value.sum(-1, keepdim=True) / width


@mean_power.register_fake
def _mean_power_shape(x: Tensor, power: int, width: int, share: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.power, ctx.width, share = inputs
    ctx.save_for_backward(x, share)


def _mean_power_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """With respect to the columns alone: their shares are 0 or 1."""
    x, share = ctx.saved_tensors
    result = gradient * ctx.power * x ** (ctx.power - 1) / ctx.width
    return (result if share is None else result * share), None, None, None


mean_power.register_autograd(_mean_power_backward, setup_context=_remember)


_library: Any = torch.library.Library("kraken", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor"
)
_library.impl("attention", F.scaled_dot_product_attention, "CompositeImplicitAutograd")


def _attention_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, int]:
    lanes = info.batch_size

    def lanes_first(tensor: Tensor, lane_dim: int | None) -> Tensor:
        return tensor.expand(lanes, *tensor.shape) if lane_dim is None else tensor.movedim(lane_dim, 0)

    q, k, v = map(lanes_first, (query, key, value), in_dims[:3])
    mask = attn_mask
    # A mask that is the same for all lanes and all sequences broadcasts as it is; copying it per lane would be a waste.
    if mask is not None and not (in_dims[3] is None and (mask.dim() < q.dim() - 1 or mask.shape[0] == 1)):
        mask = lanes_first(mask, in_dims[3])
        mask = mask.reshape(lanes, *(1,) * (q.dim() - mask.dim()), *mask.shape[1:])
        mask = mask.expand(lanes, q.shape[1], *mask.shape[2:]).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return out.reshape(lanes, -1, *out.shape[1:]), 0


torch.library.register_vmap("kraken::attention", _attention_vmap, lib=_library)
