"""The example inputs a model is captured with: given, parsed from `NAME=DTYPE[SIZES]`, or inferred."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.calls import DECODER_IDS, INPUT_IDS

HOW_TO = (
    "give one with --input input_ids=int64[2,16] "
    "(from Python: example_inputs={'input_ids': torch.zeros(2, 16, dtype=torch.int64)})"
)
BATCH, SEQUENCE = 2, 16
"""Sizes of inferred inputs: above 1, which torch.export would take for a constant, and not equal."""

DECODER_SEQUENCE = 12
"""Length of the decoder's inferred ids: another one than the encoder's, or both would be captured as one size."""

FRAMES_PER_POSITION = 2
"""Frames of sound to a position of a speech encoder: the second of its two convolutions takes every other one."""

_SPEC = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*([a-z]+\d*\w*)\s*\[([\d\s,]*)\]\s*")
_MOST_DIGITS = 12
_MOST_NUMBERS = 1 << 28
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class CallExample:
    """One call of the model: what `torch.export` traces.

    Attributes:
        args: Positional arguments; empty unless the signature forces them.
        kwargs: Named arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> CallExample:
        """The same call with every tensor replaced."""

        def leaf(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return CallExample(compat.tree_map(leaf, self.args), compat.tree_map(leaf, self.kwargs))

    def dynamic_shapes(self) -> Any:
        """Which dims may vary, in the structure `torch.export` wants."""
        if self.args:
            return compat.tree_map(_dynamic_dims, self.args)
        return {name: compat.tree_map(_dynamic_dims, value) for name, value in self.kwargs.items()}


def parse_input_spec(text: str) -> tuple[str, Tensor]:
    """Parse `input_ids=int64[2,16]` into a name and a tensor.

    Integers are zeros (a valid token id in every vocabulary), floating-point values random, booleans true.

    Raises:
        UsageError: The text is not of this form.
    """
    match = _SPEC.fullmatch(text)
    dtype = getattr(torch, match[2], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {text!r} is no input: write NAME=DTYPE[SIZES], e.g. input_ids=int64[2,16]")
    texts = match[3].replace(",", " ").split()
    # Digits are counted first, as Python converts only so many.
    longest = max(map(len, texts), default=0)
    sizes = [int(size) for size in texts] if longest <= _MOST_DIGITS else []
    if longest > _MOST_DIGITS or math.prod(sizes) > _MOST_NUMBERS:
        raise UsageError(
            f"--input {text}: {match[1]} would have more than {_MOST_NUMBERS:,} numbers; an example can be small, "
            "e.g. [2,16], whatever sizes the program is for"
        )
    if 0 in sizes:
        raise UsageError(f"--input {text}: {match[1]} would be empty; give sizes of at least 1")
    try:
        return match[1], _filled(dtype, sizes)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--input {text}: {match[1]} cannot be made as {match[2]}: {reason}") from error


def parse_input_specs(texts: Sequence[str]) -> dict[str, Tensor]:
    """Parse several of them.

    Raises:
        UsageError: One is not of this form, or two are of the same name.
    """
    found: dict[str, Tensor] = {}
    for text in texts:
        name, value = parse_input_spec(text)
        if name in found:
            raise UsageError(f"--input {text}: there are two inputs called {name}")
        found[name] = value
    return found


def resolve(model: nn.Module, example_inputs: ExampleInputs | None, input_specs: Sequence[str]) -> CallExample:
    """The call to capture: what the user gave, else what a Hugging Face model's config implies.

    Raises:
        UsageError: Nothing was given and nothing can be inferred, an argument is unknown, or a size is below 2.
    """
    if example_inputs is not None and input_specs:
        raise UsageError("give example inputs or input specs, not both")
    if input_specs:
        example = CallExample(kwargs=parse_input_specs(input_specs))
    elif example_inputs is not None:
        example = _normalize(example_inputs)
    else:
        example = CallExample(kwargs=_infer(model))
    example = _by_name(model, example)
    _check_sizes(example)
    return _without_cache(model, example)


def is_huggingface(model: nn.Module) -> bool:
    """True if the model is a `transformers.PreTrainedModel`; does not import transformers."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(model).__mro__
    )


def _filled(dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.ones(*sizes, dtype=dtype) if dtype == torch.bool else torch.zeros(*sizes, dtype=dtype)


def _normalize(given: ExampleInputs) -> CallExample:
    if isinstance(given, Tensor):
        return CallExample(args=(given,))
    if isinstance(given, Mapping):
        return CallExample(kwargs=dict(given))
    if isinstance(given, Sequence) and not isinstance(given, str):
        return CallExample(args=tuple(given))
    raise UsageError(f"example_inputs must be a tuple of arguments or a dict of them, got a {type(given).__name__}")


def _infer(model: nn.Module) -> dict[str, Any]:
    name = type(model).__name__
    if not is_huggingface(model):
        raise UsageError(f"{name} needs example inputs to be captured: {HOW_TO}")
    main_input: str = getattr(model, "main_input_name", "")
    main = _main_input(model, main_input)
    if main is None:
        raise UsageError(f"the inputs of {name} cannot be inferred (its main input is '{main_input}'): {HOW_TO}")
    if not _has_decoder_of_its_own(model):
        return {main_input: main}
    return {main_input: main, DECODER_IDS: torch.zeros(BATCH, DECODER_SEQUENCE, dtype=torch.int64)}


def _main_input(model: nn.Module, name: str) -> Tensor | None:
    """An example of a Hugging Face model's main input; None if its config does not say what that looks like."""
    config: Any = model.config
    if name == INPUT_IDS:
        return torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return _filled(dtype, (BATCH, channels, size, size))
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if name == "input_features" and isinstance(bins, int) and isinstance(frames, int):
        return _filled(dtype, (BATCH, bins, FRAMES_PER_POSITION * frames))
    return None


def _has_decoder_of_its_own(model: nn.Module) -> bool:
    """True for encoder-decoders, whose decoder reads tokens of its own (and not all: T5's encoder alone has none)."""
    config: Any = model.config
    takes = DECODER_IDS in inspect.signature(model.forward).parameters
    return bool(getattr(config, "is_encoder_decoder", False)) and takes


def _by_name(model: nn.Module, example: CallExample) -> CallExample:
    """Name positional arguments, so that only one spelling is left; check the names."""
    kinds = inspect.Parameter
    parameters = inspect.signature(model.forward).parameters
    named = [name for name, p in parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    takes = f"{type(model).__name__} takes {', '.join(named) or 'no named arguments'}"
    for name in example.kwargs:
        if name not in named:
            raise UsageError(f"'{name}' is no argument of the model: {takes}")
    positional = [name for name, p in parameters.items() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    if not example.args or any(p.kind in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL) for p in parameters.values()):
        return example
    if len(example.args) > len(positional):
        raise UsageError(f"{len(example.args)} example inputs were given, but {takes}")
    return CallExample(kwargs=dict(zip(positional, example.args)) | example.kwargs)


def _check_sizes(example: CallExample) -> None:
    arguments = {str(index): value for index, value in enumerate(example.args)} | example.kwargs
    tensors = 0
    for name, value in arguments.items():
        for leaf in compat.tree_leaves(value):
            if not isinstance(leaf, Tensor):
                continue
            tensors += 1
            if any(leaf.shape[dim] < 2 for dim in _required_dynamic(leaf)):
                raise UsageError(
                    f"example input '{name}' has shape {list(leaf.shape)}: the batch and sequence sizes must be at "
                    "least 2, because a size of 1 would be taken for a constant"
                )
    if not tensors:
        raise UsageError(f"the example inputs hold no tensor: {HOW_TO}")


def _without_cache(model: nn.Module, example: CallExample) -> CallExample:
    if not is_huggingface(model) or "use_cache" in example.kwargs or example.args:
        return example
    if "use_cache" not in inspect.signature(model.forward).parameters:
        return example
    return CallExample(kwargs=example.kwargs | {"use_cache": False})


def _required_dynamic(tensor: Tensor) -> range:
    """Batch, and sequence where dim 1 can be nothing else (images and masks have channels or heads there)."""
    return range(min(tensor.dim(), 2 if tensor.dim() <= 3 else 1))


def _dynamic_dims(leaf: Any) -> dict[int, Any] | None:
    if not isinstance(leaf, Tensor):
        return None
    wanted = set(_required_dynamic(leaf))
    if leaf.dim() > 3:
        # The sizes of an attention mask follow the sequence; torch.export finds out which of them do.
        wanted |= {dim for dim in range(1, leaf.dim()) if leaf.shape[dim] >= 2}
    return dict.fromkeys(sorted(wanted), Dim.AUTO)
