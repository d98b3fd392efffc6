"""A GGUF file's header, and the checks that a model was made from all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.checkpoint_files import first_names

_BLOCK = re.compile(r"blk\.(\d+)\.")
_FACTORS = {
    "attention.scale": ("attention_multiplier", "query_pre_attn_scalar", "head_dim"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
}
"""Fields of numbers that a model multiplies with or keeps below, with their names in configs."""

_SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header.

    Attributes:
        path: The file.
        reader: The `gguf.GGUFReader` over it.
    """

    path: Path
    reader: Any

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header.

        Raises:
            ValueError, IndexError, KeyError: It is damaged.
        """
        from gguf import GGUFReader

        return cls(path, GGUFReader(path))

    @property
    def architecture(self) -> str:
        return str(self._value("general.architecture") or "")

    @property
    def has_tokenizer(self) -> bool:
        return self.reader.get_field("tokenizer.ggml.tokens") is not None

    def require_whole(self) -> None:
        """Check that the file is not one piece of several; transformers would give random numbers to what it lacks.

        Raises:
            InputFileError: It is.
        """
        count, number = self._value("split.count"), self._value("split.no")
        if isinstance(count, int) and count > 1:
            piece = f"piece {number + 1} of {count}" if isinstance(number, int) else f"one of {count} pieces"
            raise InputFileError(
                f"{self.path} is {piece} of a split GGUF file, and transformers reads one file: join the pieces first "
                "(llama-gguf-split --merge FIRST_PIECE OUTPUT)"
            )

    def require_complete(self, missing: Collection[str]) -> None:
        """Check that the model lacks nothing.

        Raises:
            InputFileError: It lacks tensors.
        """
        if not missing:
            return
        split = _SPLIT_NAME.search(self.path.name)
        hint = f"; by its name it is one of {int(split[1])} pieces, join them first" if split else ""
        raise InputFileError(
            f"{self.path} is incomplete: {len(missing)} tensors of the model are not in it "
            f"({first_names(sorted(missing))}){hint}"
        )

    def require_sizes(self, mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]]) -> None:
        """Check that the tensors have the sizes that transformers reads from the file's fields.

        Raises:
            InputFileError: One has others.
        """
        if not mismatched:
            return
        name, shape, expected_shape = min(mismatched)
        more = f" (and {len(mismatched) - 1} other tensors)" if len(mismatched) > 1 else ""
        raise InputFileError(
            f"{self.path}: '{name}'{more} has shape {list(shape)}, and by the fields that transformers reads of it "
            f"should have {list(expected_shape)}"
        )

    def settle_unread(self, model: nn.Module, unexpected: Collection[str]) -> tuple[str, ...]:
        """Notes about tensors of the file that nothing of the model is made from.

        Args:
            model: What transformers made of the file.
            unexpected: The names, in the file or the model, that it reported.

        Raises:
            InputFileError: One of them changes what the model computes, or a field that does is not read.
        """
        self._require_rope_scaling(model)
        self._require_rotated_dims(model)
        self._require_factors(model)
        unread = self._unread(model, unexpected)
        names = {tensor.name for tensor in self.reader.tensors}
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
        for name in unread:
            block = _BLOCK.match(name)
            stem = name.rpartition(".")[0]
            of_layer = block is not None and int(block[1]) < layers
            of_weight = any(other != name and other.rpartition(".")[0] == stem for other in names)
            if of_layer or of_weight or (name.startswith("rope_") and not self._is_ones(name)):
                more = f" (and {len(unread) - 1} other tensors)" if len(unread) > 1 else ""
                raise InputFileError(
                    f"{self.path}: transformers does not read the tensor '{name}'{more}, without which the model is "
                    "another: use the model's safetensors"
                )
        if not unread:
            return ()
        subject = "1 tensor of the file is not" if len(unread) == 1 else f"{len(unread)} tensors of the file are not"
        return (f"{subject} part of the model and not read: {first_names(unread)}",)

    def _unread(self, model: nn.Module, unexpected: Collection[str]) -> list[str]:
        if getattr(getattr(model, "hf_quantizer", None), "supported", False):
            return sorted(unexpected)
        # The older of the loaders drops what it has no name for before anything is counted.
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        processors: Any = TENSOR_PROCESSORS
        weights_map = get_gguf_hf_weights_map(model, processors.get(self.architecture, TensorProcessor)(config={}))
        names = [str(tensor.name) for tensor in self.reader.tensors]
        return sorted(
            name for name in names if name not in weights_map and name.removesuffix(".weight") not in weights_map
        )

    def _require_rope_scaling(self, model: Any) -> None:
        kind = self._value(f"{self.architecture}.rope.scaling.type")
        factor = self._value(f"{self.architecture}.rope.scaling.factor")
        if kind is None and factor is None:
            kind, factor = "linear", self._value(f"{self.architecture}.rope.scale_linear")
        if kind == "none" or factor in (None, 0.0, 1.0):
            return
        rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
        if rope.get("rope_type", "default") == "default":
            raise InputFileError(
                f"{self.path}: its rotary embedding is scaled ({kind}, by {factor:g}), which transformers does not "
                "read from GGUF: use the model's safetensors"
            )

    def _require_rotated_dims(self, model: nn.Module) -> None:
        count = self._value(f"{self.architecture}.rope.dimension_count")
        rotated_dims = {2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        if count and rotated_dims and count not in rotated_dims:
            raise InputFileError(
                f"{self.path}: it rotates {count} dims of each head, and transformers, which does not read that from "
                f"GGUF, {max(rotated_dims)}: use the model's safetensors"
            )

    def _require_factors(self, model: Any) -> None:
        config = model.config.get_text_config()
        for field, names in _FACTORS.items():
            value = self._value(f"{self.architecture}.{field}")
            if not isinstance(value, int | float) or value in (0, 1):
                continue
            # Configs have some of them as divisors, and that of the scores as the number of dims it stands for.
            spellings = (value, 1 / value, value**-2)
            config_values = [getattr(config, name, None) or 0.0 for name in names]
            if not any(math.isclose(one, number, rel_tol=1e-4) for one in spellings for number in config_values):
                raise InputFileError(
                    f"{self.path}: its {field} ({value:g}) is not read by transformers: use the model's safetensors"
                )

    def _is_ones(self, name: str) -> bool:
        data = next(tensor.data for tensor in self.reader.tensors if tensor.name == name)
        return data.dtype == np.float32 and bool((data == 1).all())

    def _value(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return field.contents() if field is not None else None
