"""The operators of a plain decoder in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    product: Array = x @ weight.T
    return product if bias is None else product + bias


def layer_norm(
    x: Array, shape: Sequence[int], weight: Array, bias: Array, eps: float = 1e-5, enabled: bool = True
) -> Array:
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdims=True)
    scaled: Array = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + eps)
    return scaled * weight + bias


def gelu(x: Array) -> Array:
    return (0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))).astype(x.dtype)


def attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, dropout: float = 0.0, causal: bool = False
) -> Array:
    assert mask is None, "masks are not needed by any model of the tests"
    assert dropout == 0.0, "a model that infers drops nothing"
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], np.bool_)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended: Array = (weights / weights.sum(-1, keepdims=True)) @ v
    return attended


def flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    last = end % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[last + 1 :])


def lane_embedding(weight: Array, ids: Array, first_row: Array, rows: int, padding_idx: int = -1) -> Array:
    places = ids - first_row
    own_rows = places.clip(0, len(weight) - 1)
    return np.where((places == own_rows)[..., None], weight[own_rows], weight.dtype.type(0))


def sliced(x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    return x[(slice(None),) * dim + (slice(start, end, step),)]


OPERATORS: dict[str, Callable[..., Any]] = {
    "aten::add": lambda x, y: x + y,
    "aten::alias": lambda x: x,
    "aten::arange": lambda end: np.arange(end),
    "aten::embedding": lambda weight, ids: weight[ids],
    "aten::flatten": flatten,
    "aten::gelu": gelu,
    "aten::layer_norm": layer_norm,
    "aten::linear": linear,
    "aten::mul": lambda x, y: x * y,
    "aten::permute": lambda x, dims: np.transpose(x, dims),
    "aten::reshape": lambda x, shape: x.reshape(shape),
    "aten::scaled_dot_product_attention": attention,
    "aten::slice": sliced,
    "aten::sym_size": lambda x, dim: x.shape[dim],
    "aten::transpose": lambda x, one, other: np.swapaxes(x, one, other),
    "aten::unbind": lambda x, dim=0: list(np.moveaxis(x, dim, 0)),
    "aten::unsqueeze": lambda x, dim: np.expand_dims(x, dim),
    "aten::view": lambda x, shape: x.reshape(shape),
    "kraken::lane_embedding": lane_embedding,
    "getitem": lambda values, index: values[index],
}
"""By name."""

COLLECTIVES = ("kraken::all_gather", "kraken::all_reduce_start", "kraken::wait")
"""What the ranks do together."""
