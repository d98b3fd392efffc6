"""The map from a Hugging Face model's tensors to its checkpoint's: renamed, prefixed, tied, or converted.

transformers knows how the names (and for some models the layout) in old checkpoints differ from its classes; we ask it
rather than keep a table of our own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kraken_compiler.errors import InputFileError, first_line
from kraken_compiler.weights.checkpoint import Checkpoint, Rows, same_values
from kraken_compiler.weights.checkpoint_store import TensorSource


@dataclass(frozen=True)
class CheckpointMap:
    """The tensors of a checkpoint that each tensor of a model is made from.

    Attributes:
        sources: Name in the model -> what it is made from; ties are not followed.
        unused: Tensors of the checkpoint that make none.
    """

    sources: Mapping[str, TensorSource]
    unused: tuple[str, ...]


def map_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> CheckpointMap:
    """Say what every tensor of `model` is made from.

    Args:
        model: A `transformers.PreTrainedModel`; values are not needed.
        checkpoint: Its weight files.

    Raises:
        InputFileError: Several tensors of the checkpoint are the same one of the model, and differ.
    """
    model_tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    renamer = _Renamer(model, model_tensors)
    whole_keys: dict[str, list[str]] = defaultdict(list)
    pieces: dict[str, list[tuple[str, str]]] = defaultdict(list)
    unused = []
    for key in renamer.in_order(checkpoint.names()):
        name, pattern = renamer.rename(key)
        if name not in model_tensors:
            unused.append(key)
        elif pattern is None:
            whole_keys[name].append(key)
        else:
            pieces[name].append((pattern, key))
    sources: dict[str, TensorSource] = {}
    for name, parts in pieces.items():
        sources.update(_conversion_sources(model, renamer.converters[parts[0][0]], name, parts, model_tensors))
    for name, keys in whole_keys.items():
        if name in sources:
            raise _duplicate_error(name, [keys[0], sources[name].keys[0]], checkpoint)
        first = Rows.of(checkpoint, keys[0])
        differing = [key for key in keys[1:] if not same_values(first, Rows.of(checkpoint, key))]
        if differing:
            raise _duplicate_error(name, [keys[0], differing[0]], checkpoint)
        sources[name] = TensorSource((keys[0],))
    return CheckpointMap(sources, tuple(unused))


class _Renamer:
    """The names that transformers gives a checkpoint's tensors while it loads them."""

    def __init__(self, model: Any, model_tensors: dict[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix, self._model_tensors = model.base_model_prefix, model_tensors
        self.converters = {pattern: one for one in self._converters for pattern in one.source_patterns}

    def in_order(self, keys: Sequence[str]) -> list[str]:
        """The keys in the order in which transformers looks at them."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(keys, key=dot_natural_key)

    def rename(self, key: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of the conversion that the tensor is a piece of."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._model_tensors)
        if name not in self._model_tensors and key in self._model_tensors:
            name, pattern = rename_source_key(key, [], [], self._prefix, self._model_tensors)
        return name, pattern


def _conversion_sources(
    model: Any, converter: Any, first: str, pieces: list[tuple[str, str]], model_tensors: dict[str, Tensor]
) -> dict[str, TensorSource]:
    """Sources of the tensors that one conversion makes (merged experts, split fused projections)."""
    keys = tuple(key for _, key in pieces)

    def convert_for(name: str) -> Callable[[Callable[[str], Tensor]], Tensor]:
        def convert(read: Callable[[str], Tensor]) -> Tensor:
            job = copy.deepcopy(converter)
            for pattern, key in pieces:
                job.add_tensor(first, key, pattern, lambda key=key: read(key))
            try:
                output = job.convert(first, model=model, config=model.config)[name]
            except InputFileError:
                raise
            except Exception as error:
                # Conversions are many, and each meets pieces that are missing or do not fit with an error of its own.
                reason = first_line(error)
                raise InputFileError(
                    f"tensor '{name}' cannot be put together from its {len(keys)} pieces ({keys[0]}): {reason}"
                ) from error
            tensor = output[0] if isinstance(output, list) else output
            assert isinstance(tensor, Tensor)
            return tensor

        return convert

    targets = [first.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
    return {name: TensorSource(keys, convert_for(name)) for name in targets if name in model_tensors}


def _duplicate_error(name: str, keys: list[str], checkpoint: Checkpoint) -> InputFileError:
    places = ", ".join(f"'{key}' in {checkpoint.file_of(key).name}" for key in keys)
    return InputFileError(
        f"{checkpoint.file_of(keys[0]).parent}: tensor '{name}' of the model is in the files more than once, with "
        f"different values: {places}"
    )
