"""Weights that torchao quantised, as plain tensors: what export and a weight table can handle.

torchao keeps such a weight in a tensor class of its own, whose product it knows. On a copy of the module every one of
them becomes its integers, scales and zero points, and reading it computes it by `kraken::dequantize`. Integers of 4
bits are kept two to a byte: half the memory, at the price that lanes' columns begin and end with a byte.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import Rejection, UnsupportedModelError, UsageError
from kraken_compiler.ops.dequantize import dequantize, pack


@dataclass(frozen=True)
class QuantizedWeight:
    """The operands of `kraken::dequantize`, see there.

    Attributes:
        data: The integers.
        scale: Their scales.
        zero_point: Their zero points, None if all are 0.
        bits: Of an integer.
        dtype: Of the weight.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    dtype: torch.dtype

    def value(self) -> Tensor:
        """The weight."""
        return dequantize(self.data, self.scale, self.zero_point, self.bits, self.dtype)


def with_plain_weights(model: nn.Module) -> nn.Module:
    """The module itself if its weights are plain tensors, else a copy in which they are; the copy shares all others.

    Raises:
        UnsupportedModelError: A weight is of a kind that cannot be taken apart, or the module cannot be copied.
    """
    if not any(True for _ in _packed_tensors(model)):
        return model
    weights: dict[int, QuantizedWeight] = {}
    checked_kinds: set[Any] = set()
    for path, attribute, tensor in _packed_tensors(model):
        weight = weights.get(id(tensor)) or _take_apart(tensor, checked_kinds)
        if isinstance(weight, str):
            raise UnsupportedModelError([Rejection(weight.format(attribute), (attribute,), path, _HINT)])
        weights[id(tensor)] = weight
    plain_model = _copy(model)
    for path, attribute, tensor in list(_packed_tensors(plain_model)):
        _set_weight(plain_model.get_submodule(path), attribute, weights[id(tensor)])
    return plain_model


def refuse_conversion(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to convert quantised weights: they keep their type, and would meet activations of another.

    Raises:
        UsageError: A quantised weight is not of this type.
    """
    mismatch = next((entry for entry in _packed_tensors(model) if entry[2].dtype != dtype), None)
    if mismatch is not None:
        path, attribute, tensor = mismatch
        raise UsageError(
            f"the {attribute} of module '{path}' was quantised as {str(tensor.dtype).removeprefix('torch.')}, and "
            f"cannot be converted to {str(dtype).removeprefix('torch.')}: convert the model before it is quantised"
        )


_HINT = (
    "Weight-only integers can be compiled: torchao's Int8WeightOnlyConfig, IntxWeightOnlyConfig and, made on a GPU, "
    "Int4WeightOnlyConfig in its plain format. Else compile the model with plain weights (before quantize_, or after "
    "dequantize()); ONNX devices quantize their own: --onnx-weights int8 or int4."
)


def _packed_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Module path, name and value of every tensor that is made of others, by every name it has."""
    for path, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and compat.is_packed(tensor):
                yield path, attribute, tensor


def _copy(model: nn.Module) -> nn.Module:
    shared = {id(tensor): tensor for module in model.modules() for tensor in _tensors(module)}
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception as error:
        # What a module holds besides tensors may refuse to be copied in any way it likes.
        reason = f"its quantised weights are taken apart on a copy, and it cannot be copied: {error}"
        raise UnsupportedModelError([Rejection(reason, path=type(model).__name__)]) from error


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (
        tensor for slots in (module._parameters, module._buffers) for tensor in slots.values() if tensor is not None
    )


def _set_weight(module: nn.Module, attribute: str, weight: QuantizedWeight) -> None:
    """Make a module hold a weight's parts, and compute the weight when it reads it."""
    module._parameters.pop(attribute, None)
    module._buffers.pop(attribute, None)
    data, scale, zero_point = (f"{attribute}_{part}" for part in ("data", "scale", "zero_point"))
    module.register_parameter(data, nn.Parameter(weight.data, requires_grad=False))
    module.register_buffer(scale, weight.scale)
    if weight.zero_point is not None:
        module.register_buffer(zero_point, weight.zero_point)

    def compute(self: nn.Module) -> Tensor:
        zero = getattr(self, zero_point) if weight.zero_point is not None else None
        value = torch.ops.kraken.dequantize(getattr(self, data), getattr(self, scale), zero, weight.bits, weight.dtype)
        assert isinstance(value, Tensor)
        return value

    # Attributes can be computed by classes only; this one stands for the module's own wherever one asks.
    base = type(module)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    module.__class__ = type(base.__name__, (base,), {attribute: property(compute), **names})


def _take_apart(tensor: Any, checked_kinds: set[Any]) -> QuantizedWeight | str:
    """The parts of a weight, or why it has none that can be divided; `{}` stands for its name.

    Args:
        tensor: The weight.
        checked_kinds: The kinds of weights whose parts were seen to give their product; added to.
    """
    kind = type(tensor)
    if kind.__module__.partition(".")[0] != "torchao" or kind.__name__ not in _READERS:
        return f"its {{}} is a {kind.__name__}, and only plain tensors can be divided among lanes"
    activation_fields = [name for name in _ON_ACTIVATIONS if getattr(tensor, name, None) is not None]
    if activation_fields or getattr(tensor, "activation_dtype", None) in _FLOAT8:
        # Rounded with others than the whole's, a lane's columns of an activation would be others.
        return "its {} also asks for rounded or scaled activations, and a lane's columns would be rounded otherwise"
    if tensor.dim() != 2:
        return f"its {{}} is a {kind.__name__} of {tensor.dim()} dims, and only matrices are taken apart"
    read, runs_anywhere = _READERS[kind.__name__]
    parts = read(tensor)
    if not bool(torch.isfinite(parts.scale).all()):
        return "its {} has a scale that is no finite number"
    if parts.zero_point is not None and not bool(torch.isfinite(parts.zero_point.float()).all()):
        return "its {} has a zero point that is no finite number"
    variant = (kind, tuple(tensor.shape), parts.scale.shape, parts.bits, parts.dtype)
    if runs_anywhere and variant not in checked_kinds:
        checked_kinds.add(variant)
        if not _same_product(tensor, parts):
            return f"its {{}} is a {kind.__name__} whose product is not the one of its integers, scales and zero points"
    return parts


_ON_ACTIVATIONS = (
    "act_quant_kwargs",
    "act_quant_scale",
    "act_quant_zero_point",
    "act_pre_scale",
    "activation_quantization",
)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@torch.no_grad()
def _same_product(tensor: Any, parts: QuantizedWeight) -> bool:
    """True if torchao multiplies with what we take a weight for: its formats may change."""
    x = torch.randn(2, tensor.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(device=tensor.device, dtype=parts.dtype)
    actual, expected = F.linear(x, parts.value()).float(), F.linear(x, tensor).float()
    return bool((actual - expected).norm() <= 8 * torch.finfo(parts.dtype).eps * expected.norm())


def _from_bytes(tensor: Any) -> QuantizedWeight:
    """An integer a byte, also where the integers are shorter, and scales for blocks of rows and columns."""
    columns = tensor.shape[1]
    scale, zero_point = (_by_row(part, tensor) for part in (tensor.scale, tensor.zero_point))
    assert scale is not None
    weight = QuantizedWeight(tensor.qdata.contiguous(), scale, zero_point, 8, tensor.dtype)
    bits = int(str(getattr(tensor, "target_dtype", torch.int8)).removeprefix("torch.int"))
    even = columns // scale.shape[1] % 2 == 0
    return replace(weight, data=pack(tensor.qdata), bits=4) if bits <= 4 and even else weight


def _by_row(part: Tensor | None, tensor: Any) -> Tensor | None:
    """Scales or zero points as [rows, groups]; None if they are zero points that are all 0."""
    if part is None or (part is tensor.zero_point and not bool(part.any())):
        return None
    rows, columns = tensor.shape
    block = tensor.block_size
    return part.reshape(rows // block[0], columns // block[1]).repeat_interleave(block[0], 0).contiguous()


def _from_packed(tensor: Any) -> QuantizedWeight:
    """Two integers a byte, and for each group weight = integer * scale + zero, both [groups, rows]."""
    scale, zero = (part.t().contiguous() for part in (tensor.scale, tensor.zero_point))
    zero_point = -zero.float() / scale.float() if bool(zero.any()) else None
    return QuantizedWeight(tensor.qdata.contiguous(), scale, zero_point, 4, tensor.dtype)


_READERS: dict[str, tuple[Callable[[Any], QuantizedWeight], bool]] = {
    "Int8Tensor": (_from_bytes, True),
    "IntxUnpackedToInt8Tensor": (_from_bytes, True),
    "Int4Tensor": (_from_packed, False),
}
"""torchao's classes: the reader of each, and whether its product runs on any device, so that it can be checked."""
