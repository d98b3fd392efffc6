"""Find every tensor of a Hugging Face model in its checkpoint: renamed, prefixed, tied, or converted.

transformers knows how the names (and for some models the layout) in old checkpoints differ from its classes; we ask it
rather than keep a table of our own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kraken_compiler.weights.checkpoint import Checkpoint
from kraken_compiler.weights.checkpoint_store import TensorSource


def map_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> dict[str, TensorSource]:
    """Say for every tensor of `model` what it is made from.

    Args:
        model: A `transformers.PreTrainedModel`; values are not needed.
        checkpoint: Its weight files.

    Returns:
        Tensor name -> source; tensors that the checkpoint does not hold under any name are left out.
    """
    wanted: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    wanted.update(model.named_buffers(remove_duplicate=False))
    sources = _renamed(model, wanted, checkpoint)
    for names in _aliases(wanted):
        held = next((sources[name] for name in names if name in sources), None)
        if held is not None:
            sources.update((name, held) for name in names if name not in sources)
    return sources


def _renamed(model: Any, wanted: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, TensorSource]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, TensorSource] = {}
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in sorted(checkpoint.names(), key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name not in wanted and pattern is None:
            name = _with_other_prefix(key, prefix, wanted)
        if pattern is not None:
            parts[name].append((pattern, key))
        elif name in wanted and (name not in sources or key == name):
            sources[name] = TensorSource((key,))
    for name, pieces in parts.items():
        sources.update(_converted(model, by_pattern[pieces[0][0]], name, pieces, wanted))
    return sources


def _with_other_prefix(key: str, prefix: str, wanted: dict[str, Tensor]) -> str:
    """The key with the base model's prefix stripped or added, if one of them is a tensor of the model."""
    stripped = key.removeprefix(f"{prefix}.")
    return stripped if stripped in wanted else f"{prefix}.{key}" if f"{prefix}.{key}" in wanted else key


def _converted(
    model: Any, converter: Any, first: str, pieces: list[tuple[str, str]], wanted: dict[str, Tensor]
) -> dict[str, TensorSource]:
    """Sources of the tensors that one conversion makes (merged experts, split fused projections)."""
    keys = tuple(key for _, key in pieces)

    def convert_for(name: str) -> Callable[[Callable[[str], Tensor]], Tensor]:
        def convert(read: Callable[[str], Tensor]) -> Tensor:
            job = copy.deepcopy(converter)
            for pattern, key in pieces:
                job.add_tensor(first, key, pattern, lambda key=key: read(key))
            made = job.convert(first, model=model, config=model.config)[name]
            tensor = made[0] if isinstance(made, list) else made
            assert isinstance(tensor, Tensor)
            return tensor

        return convert

    targets = [first.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
    return {name: TensorSource(keys, convert_for(name)) for name in targets if name in wanted}


def _aliases(wanted: dict[str, Tensor]) -> list[list[str]]:
    """Groups of names that one tensor has."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in wanted.items():
        groups[id(tensor)].append(name)
    return [names for names in groups.values() if len(names) > 1]
