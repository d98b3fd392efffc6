"""Checkpoints of float8 weights with scales, read as their products.

A weight is held in 8 bits, and beside it stands a scale, for the whole tensor, for each of its rows, or for each of its
blocks; the weight is the product of the two. The last block of a dim may be cut short by the tensor's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.checkpoint import Checkpoint
from kraken_compiler.weights.checkpoint_files import first_names

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""Element types of weights that a scale belongs to."""

_SCALES = ("{}_scale_inv", "{}_scale")
_RELEASE_SCALES = ("{}.scale", "{}.qscale_weight")
"""Names of scales in some releases of DeepSeek and Mistral; too plain unless the config says float8."""
_ACTIVATION_SCALES = ("{}.input_scale", "{}.activation_scale", "{}.output_scale", "{}.k_scale", "{}.v_scale")
"""Scales of a layer's inputs and outputs; they are for kernels and caches that compute in float8."""
_PRODUCT_ELEMENTS = 16 << 20
"""Number of a weight's elements that are multiplied at a time."""


@dataclass(frozen=True)
class Float8Config:
    """The float8 settings of a `config.json`.

    Attributes:
        method: Name of the quantisation method.
        block: Rows and columns that share a scale; None if it does not say.
        bytes_are_exponents: Scales of 8 bits are powers of two.
    """

    method: str
    block: tuple[int, int] | None = None
    bytes_are_exponents: bool = False


@dataclass(frozen=True)
class Scale:
    """The scale of one weight.

    Attributes:
        key: Its tensor.
        shape: Its sizes, as many as the weight's.
        blocks: How many positions of each dim of the weight share one of its numbers.
    """

    key: str
    shape: tuple[int, ...]
    blocks: tuple[int, ...]


class ScaledCheckpoint:
    """A checkpoint in which a float8 weight and its scale are one float32 tensor."""

    def __init__(
        self, checkpoint: Checkpoint, scales: Mapping[str, Scale], scale_names: frozenset[str], exponents: bool
    ) -> None:
        self.files = checkpoint.files
        self._checkpoint = checkpoint
        self._scales = dict(scales)
        self._scale_names = scale_names
        self._exponents = exponents
        self._last_factors: tuple[str, Tensor] = ("", torch.empty(0))

    @classmethod
    def over(cls, checkpoint: Checkpoint, config: Float8Config | None) -> tuple[Checkpoint, tuple[str, ...]]:
        """The checkpoint with its float8 weights multiplied by their scales, and notes; itself if it has none.

        Args:
            checkpoint: The files.
            config: What the config says; None if it is silent about float8.

        Raises:
            InputFileError: A weight has no scale, or one whose blocks cannot be told.
        """
        names = set(checkpoint.names())
        weights = [key for key in checkpoint.names() if checkpoint.describe(key)[0] in FLOAT8]
        scales = {key: scale for key in weights if (scale := _scale_of(key, names, checkpoint, config)) is not None}
        unscaled = [key for key in weights if key not in scales and key not in {scale.key for scale in scales.values()}]
        if unscaled and (scales or config is not None):
            raise InputFileError(
                f"{checkpoint.file_of(unscaled[0])}: {_count(unscaled)} float8 without a scale "
                f"({first_names(unscaled)})"
            )
        if not scales:
            return checkpoint, ()
        if config is None or config.block is None:
            _require_one_size(scales, checkpoint)
        modules = {key.rpartition(".")[0] for key in scales}
        activation_scales = {pattern.format(module) for module in modules for pattern in _ACTIVATION_SCALES} & names
        exponents = config is not None and config.bytes_are_exponents
        scale_names = frozenset(activation_scales | {scale.key for scale in scales.values()})
        return cls(checkpoint, scales, scale_names, exponents), (
            f"{len(scales)} weights are float8 with scales: they are read as their products; activations are not "
            "rounded to float8 (GPU kernels may)",
        )

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._checkpoint.names() if name not in self._scale_names)

    def describe(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        dtype, shape = self._checkpoint.describe(key)
        return (torch.float32 if key in self._scales else dtype), shape

    def file_of(self, key: str) -> Path:
        return self._checkpoint.file_of(key)

    def read(self, key: str) -> Tensor:
        if key not in self._scales:
            return self._checkpoint.read(key)
        values = self._checkpoint.read(key)
        product = torch.empty(values.shape)
        step = max(1, _PRODUCT_ELEMENTS // max(1, math.prod(values.shape[1:])))
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            product[rows] = self._rows_product(key, values[rows], start)
        return product

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        rows = self._checkpoint.read_rows(key, start, stop)
        return self._rows_product(key, rows, start) if key in self._scales else rows

    def release(self) -> None:
        self._checkpoint.release()

    def _rows_product(self, key: str, rows: Tensor, start: int) -> Tensor:
        """Rows of a weight, of which the first is number `start`, times their scales."""
        scale = self._scales[key]
        factors = self._factors(scale)
        for dim, (size, block) in enumerate(zip(rows.shape, scale.blocks)):
            first = start if dim == 0 else 0
            factors = factors.index_select(dim, torch.arange(first, first + size) // block)
        return factors.mul_(rows.float())

    def _factors(self, scale: Scale) -> Tensor:
        key, factors = self._last_factors
        if key != scale.key:
            values = self._checkpoint.read(scale.key)
            # An exponent of 8 bits counts from 127, as a float32's does.
            exponents = self._exponents and values.dtype == torch.uint8
            factors = (values.float() - 127).exp2() if exponents else values.float()
            factors = factors.reshape(scale.shape)
            self._last_factors = (scale.key, factors)
        return factors


def _scale_of(key: str, names: set[str], checkpoint: Checkpoint, config: Float8Config | None) -> Scale | None:
    weight = checkpoint.describe(key)[1]
    if not weight:
        return None
    module = key.rpartition(".")[0]
    candidates = [pattern.format(key) for pattern in _SCALES]
    if config is not None and key.endswith(".weight"):
        candidates += [pattern.format(module) for pattern in _RELEASE_SCALES]
    matches = [name for name in candidates if name in names]
    if not matches:
        return None
    if len(matches) > 1:
        raise InputFileError(f"{checkpoint.file_of(key)}: '{key}' has {len(matches)} scales ({first_names(matches)})")
    dtype, shape = checkpoint.describe(matches[0])
    exponents = config is not None and config.bytes_are_exponents and dtype == torch.uint8
    if dtype is None or not (dtype.is_floating_point or exponents):
        raise InputFileError(
            f"{checkpoint.file_of(matches[0])}: the scale '{matches[0]}' is of a type that is not supported"
        )
    sizes = _as_many_dims(shape, weight)
    blocks = _blocks(weight, sizes, config.block if config is not None else None) if sizes is not None else None
    if sizes is None or blocks is None:
        raise InputFileError(
            f"{checkpoint.file_of(key)}: the scale '{matches[0]}' of shape {list(shape)} does not say which parts of "
            f"the weight of shape {list(weight)} it is for"
        )
    return Scale(matches[0], sizes, blocks)


def _as_many_dims(scale: Sequence[int], weight: Sequence[int]) -> tuple[int, ...] | None:
    """The scale's sizes with one for every dim of the weight: one number is for all, a row of numbers for the rows."""
    if math.prod(scale) == 1:
        return (1,) * len(weight)
    if len(scale) == 1 and len(weight) > 1 and scale[0] == weight[0]:
        return (scale[0], *(1 for _ in weight[1:]))
    return tuple(scale) if len(scale) == len(weight) else None


def _blocks(weight: Sequence[int], scale: Sequence[int], block: tuple[int, int] | None) -> tuple[int, ...] | None:
    config_sizes = (None,) * (len(weight) - 2) + (block or (None, None)) if len(weight) > 1 else (None,)
    sizes = [_block(*dim) for dim in zip(weight, scale, config_sizes)]
    return tuple(size for size in sizes if size is not None) if None not in sizes else None


def _block(size: int, count: int, config_size: int | None) -> int | None:
    """The number of positions, of `size`, that share each of `count` numbers; None if it cannot be told.

    Where the config does not say, it is the power of two that makes so many blocks, for the last of them may be short;
    there is at most one. Else the number that divides the size.
    """
    if count in (1, size):
        return size if count == 1 else 1
    if config_size is not None and -(-size // config_size) == count:
        return config_size
    if config_size is not None or not 1 < count < size:
        return None
    power: int = 1 << (-(-size // count) - 1).bit_length()
    if -(-size // power) == count:
        return power
    return size // count if size % count == 0 else None


def _require_one_size(scales: Mapping[str, Scale], checkpoint: Checkpoint) -> None:
    """Check that where the sizes of blocks were told from how many there are, all weights have the same.

    Raises:
        InputFileError: They do not.
    """
    firsts: dict[int, tuple[str, int]] = {}
    for key, scale in scales.items():
        for dim, (count, block) in enumerate(zip(reversed(scale.shape), reversed(scale.blocks))):
            first, size = firsts.setdefault(dim, (key, block)) if count > 1 and block > 1 else (key, block)
            if size != block:
                raise InputFileError(
                    f"{checkpoint.file_of(key)}: by their scales, '{first}' has blocks of {size} and '{key}' of "
                    f"{block}: the config must say how large they are (weight_block_size)"
                )


def _count(names: list[str]) -> str:
    return f"'{names[0]}' is" if len(names) == 1 else f"{len(names)} weights are"
