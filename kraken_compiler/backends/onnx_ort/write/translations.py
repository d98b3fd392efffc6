"""The translations of our ops to ONNX; torch's exporter knows all others.

Annotations are read by the exporter: a parameter without a number's type is an operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
import torch
from onnxscript import opset23
from onnxscript.values import Opset

from kraken_compiler.backends.onnx_ort.format import DOMAIN, DOMAIN_VERSION
from kraken_compiler.backends.onnx_ort.write import attention_ops
from kraken_compiler.backends.onnx_ort.write.schemas import register_schemas

_ONE = onnx_ir.tensor([1.0])
op: Any = opset23  # its stubs know no value that is still to be computed


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Torch op -> function that writes ONNX nodes, as `torch.onnx.export` takes them."""
    register_schemas()
    assert attention_ops is not None  # importing it defines its ops
    opset = Opset(DOMAIN, DOMAIN_VERSION)

    def start(x: Any) -> Any:
        return opset.AllReduceStart(x)

    def wait(handle: Any) -> Any:
        return opset.AllReduceWait(handle)

    def square(x: Any) -> Any:
        return op.Mul(x, x)

    def gather(x: Any, dim: int, degree: int) -> Any:
        return opset.AllGather(x, axis=dim, degree=degree)

    def dequantize(data: Any, scale: Any, zero_point: Any = None, bits: int = 8, dtype: int = 1) -> Any:
        return opset.Dequantize(data, scale, zero_point, bits=bits, dtype=dtype)

    return {
        torch.ops.kraken.all_reduce_start.default: start,
        torch.ops.kraken.wait.default: wait,
        torch.ops.kraken.all_gather.default: gather,
        torch.ops.aten.square.default: square,
        torch.ops.aten.rms_norm.default: _rms_norm,
        torch.ops.kraken.dequantize.default: dequantize,
        torch.ops.kraken.expert_linear.default: _expert_linear,
        torch.ops.kraken.lane_embedding.default: _lane_embedding,
        torch.ops.kraken_onnx.attention.default: _attention,
        torch.ops.kraken_onnx.capped_attention.default: _capped_attention,
        torch.ops.kraken_onnx.attention_mask.default: _mask,
    }


def _rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """In the type of x, whatever the weight's: in ONNX Runtime both must be one."""
    if weight is None:
        weight = op.CastLike(op.ConstantOfShape(op.Shape(x, start=-len(normalized_shape)), value=_ONE), x)
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    if weight.dtype == x.dtype:
        return op.RMSNormalization(x, weight, axis=-len(normalized_shape), epsilon=epsilon)
    normed = op.RMSNormalization(op.CastLike(x, weight), weight, axis=-len(normalized_shape), epsilon=epsilon)
    return op.CastLike(normed, x)


def _expert_linear(x: Any, weight: Any, bias: Any, experts: Any) -> Any:
    """Products of rows with copies of their experts' weights: ONNX has no product that picks one."""
    out = op.Squeeze(
        op.MatMul(op.Gather(weight, experts), op.Unsqueeze(x, op.Constant(value_ints=[-1]))),
        op.Constant(value_ints=[-1]),
    )
    return out if bias is None else op.Add(out, op.Gather(bias, experts))


def _lane_embedding(weight: Any, ids: Any, first_row: Any, rows: int = 0, padding_idx: int = -1) -> Any:
    """See `kraken::lane_embedding`; nothing here has gradients."""
    # Ids may be of 32 bits.
    places = op.Sub(op.CastLike(ids, first_row), first_row)
    own_rows = op.Clip(places, op.Constant(value_int=0), op.Constant(value_int=weight.shape[0] - 1))
    found = op.Gather(weight, own_rows)
    is_here = op.Unsqueeze(op.Equal(own_rows, places), op.Constant(value_ints=[-1]))
    return op.Where(is_here, found, op.CastLike(op.Constant(value_float=0.0), found))


def _attention(
    query: Any, key: Any, value: Any, mask: Any, past_key: Any, past_value: Any, scale: float | None = None
) -> Any:
    out, present_key, present_value, _ = op.Attention(query, key, value, mask, past_key, past_value, scale=scale)
    return out, present_key, present_value


def _capped_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    past_key: Any,
    past_value: Any,
    scale: float = 1.0,
    softcap: float = 0.0,
    kv_heads: int = 1,
    group: int = 1,
    key_dim: int = 1,
    dim: int = 1,
    by_head: bool = False,
    sinks: Any = None,
) -> Any:
    """In plain operators over [B, K, H / K, T, S]: ONNX's Attention caps scores after the mask, and has no sinks."""
    keys, values = op.Concat(past_key, key, axis=2), op.Concat(past_value, value, axis=2)
    group_axis = op.Constant(value_ints=[2])
    queries = op.Reshape(query, op.Constant(value_ints=[0, kv_heads, group, -1, key_dim]))
    scores = op.MatMul(queries, op.Transpose(op.Unsqueeze(keys, group_axis), perm=[0, 1, 2, 4, 3]))
    scores = op.Mul(scores, op.CastLike(op.Constant(value_float=scale), scores))
    if softcap:
        cap = op.CastLike(op.Constant(value_float=softcap), scores)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if by_head:
        grouped_shape = op.Concat(op.Constant(value_ints=[0, kv_heads, group]), op.Shape(mask, start=2), axis=0)
        scores = op.Add(scores, op.Reshape(mask, grouped_shape))
    else:
        scores = op.Add(scores, op.Unsqueeze(mask, group_axis))
    if sinks is None:
        shares = op.Softmax(scores, axis=-1)
    else:
        last = op.Constant(value_ints=[-1])
        sink = op.Reshape(sinks, op.Constant(value_ints=[1, kv_heads, group, 1, 1]))
        largest = op.Max(op.ReduceMax(scores, last, keepdims=1), sink)
        weights = op.Exp(op.Sub(scores, largest))
        total = op.Add(op.ReduceSum(weights, last, keepdims=1), op.Exp(op.Sub(sink, largest)))
        shares = op.Div(weights, total)
    product = op.MatMul(shares, op.Unsqueeze(values, group_axis))
    return op.Reshape(product, op.Constant(value_ints=[0, kv_heads * group, -1, dim])), keys, values


def _mask(attention_mask: Any, input_ids: Any, slopes: Any = None, window: int = 0, dtype: int = 1) -> Any:
    """See `attention_ops`."""
    total, tokens = op.Shape(attention_mask, start=1, end=2), op.Shape(input_ids, start=1, end=2)
    slots = op.Range(op.Constant(value_int=0), op.Squeeze(total), op.Constant(value_int=1))
    places = op.Unsqueeze(op.Slice(slots, op.Sub(total, tokens), total), op.Constant(value_ints=[1]))
    visible = op.LessOrEqual(slots, places)
    if window:
        visible = op.And(visible, op.Greater(slots, op.Sub(places, op.Constant(value_int=window))))
    present = op.Unsqueeze(op.Cast(attention_mask, to=onnx_ir.DataType.BOOL.value), op.Constant(value_ints=[1, 2]))
    visible = op.Or(op.And(present, visible), op.Equal(slots, places))
    bias = op.Cast(op.Constant(value_float=0.0), to=dtype)
    if slopes is not None:
        distance = op.Cast(op.Sub(slots, places), to=onnx_ir.DataType.FLOAT.value)
        bias = op.Cast(op.Mul(distance, op.Unsqueeze(slopes, op.Constant(value_ints=[1, 2]))), to=dtype)
    minus_infinity = op.Cast(op.Constant(value_float=float("-inf")), to=dtype)
    return op.Where(visible, bias, minus_infinity)
