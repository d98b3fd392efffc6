"""The example inputs a model is captured with: given, parsed from `NAME=DTYPE[SIZES]`, or inferred."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import UsageError, first_line
from kraken_compiler.ir.calls import DECODER_IDS, INPUT_IDS
from kraken_compiler.ir.program import Program
from kraken_compiler.ops.devices import device_of

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


@dataclass(frozen=True)
class CallExample:
    """One call of the model: what `torch.export` traces.

    Attributes:
        args: Positional arguments; empty unless the signature forces them.
        kwargs: Named arguments.
        implied: Names of those that the user did not give.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    implied: tuple[str, ...] = ()

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> CallExample:
        """The same call with every tensor replaced."""

        def leaf(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return CallExample(compat.tree_map(leaf, self.args), compat.tree_map(leaf, self.kwargs), self.implied)

    @contextmanager
    def spelled_out(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Give the module's signature, inside, one parameter for every argument of this call.

        `torch.export` finds arguments by the names in the signature, and what `*args` and `**kwargs` take has none.

        Yields:
            Which dims may vary, by argument.
        """
        names = _positional_names(model, len(self.args))
        dims = {name: compat.tree_map(_dynamic_dims, value) for name, value in zip(names, self.args)}
        dims |= {name: compat.tree_map(_dynamic_dims, value) for name, value in self.kwargs.items()}
        if not self.args and set(self.kwargs) <= set(_keyword_names(model)):
            yield dims
            return
        forward, has_own_forward = model.forward, "forward" in vars(model)

        def call(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        kinds = inspect.Parameter
        parameters = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in names]
        parameters += [kinds(name, kinds.KEYWORD_ONLY) for name in self.kwargs]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        model.forward = call
        try:
            yield dims
        finally:
            del model.forward
            if has_own_forward:
                model.forward = forward


ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any] | CallExample


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
        return match[1], _example_tensor(dtype, sizes)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = first_line(error)
        raise UsageError(f"--input {text}: {match[1]} cannot be made as {match[2]}: {reason}") from error


def parse_input_specs(texts: Sequence[str]) -> dict[str, Tensor]:
    """Parse several of them.

    Raises:
        UsageError: One is not of this form, or two are of the same name.
    """
    tensors: dict[str, Tensor] = {}
    for text in texts:
        name, value = parse_input_spec(text)
        if name in tensors:
            raise UsageError(f"--input {text}: there are two inputs called {name}")
        tensors[name] = value
    return tensors


def resolve(model: nn.Module, example_inputs: ExampleInputs | None, input_specs: Sequence[str]) -> CallExample:
    """The call to capture, on the model's device: what the user gave, else what a Hugging Face model's config implies.

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
    if (device := device_of(model)) is not None:
        example = example.map_tensors(lambda tensor: tensor.to(device))
    return _without_cache(model, _with_distinct_tensors(example))


def refuse_unread(program: Program, model: nn.Module, example: CallExample) -> None:
    """Refuse an argument that only `**kwargs` takes and nothing reads: a misspelled name would look the same.

    Raises:
        UsageError: There is one.
    """
    keyword_names = _keyword_names(model)
    open_names = [name for name in example.kwargs if name not in keyword_names]
    users = {node.name: len(node.users) for node in program.graph.find_nodes(op="placeholder")}
    read_parameters = {spec.parameter for spec in program.inputs if users[spec.name]}
    for name in open_names:
        if any(spec.parameter == name for spec in program.inputs) and name not in read_parameters:
            others = f" beside {', '.join(keyword_names)}" if keyword_names else ""
            raise UsageError(f"'{name}' is no argument of the model: {type(model).__name__} reads none of it{others}")


def is_huggingface(model: nn.Module) -> bool:
    """True if the model is a `transformers.PreTrainedModel`; does not import transformers."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(model).__mro__
    )


def _example_tensor(dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.ones(*sizes, dtype=dtype) if dtype == torch.bool else torch.zeros(*sizes, dtype=dtype)


def _normalize(example_inputs: ExampleInputs) -> CallExample:
    if isinstance(example_inputs, CallExample):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return CallExample(args=(example_inputs,))
    if isinstance(example_inputs, Mapping):
        return CallExample(kwargs=dict(example_inputs))
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return CallExample(args=tuple(example_inputs))
    raise UsageError(
        f"example_inputs must be a tuple of arguments or a dict of them, got a {type(example_inputs).__name__}"
    )


def _infer(model: nn.Module) -> dict[str, Any]:
    name = type(model).__name__
    inner = _huggingface_inside(model)
    if inner is None:
        raise UsageError(f"{name} needs example inputs to be captured: {HOW_TO}")
    main_input: str = getattr(inner, "main_input_name", "")
    main = _main_input(inner, main_input)
    if main is None:
        raise UsageError(f"the inputs of {name} cannot be inferred (its main input is '{main_input}'): {HOW_TO}")
    if not _has_decoder_of_its_own(inner):
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
        return _example_tensor(dtype, (BATCH, channels, size, size))
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if name == "input_features" and isinstance(bins, int) and isinstance(frames, int):
        return _example_tensor(dtype, (BATCH, bins, FRAMES_PER_POSITION * frames))
    return None


def _has_decoder_of_its_own(model: nn.Module) -> bool:
    """True for encoder-decoders, whose decoder reads tokens of its own (and not all: T5's encoder alone has none)."""
    config: Any = model.config
    takes_ids = DECODER_IDS in inspect.signature(model.forward).parameters
    return bool(getattr(config, "is_encoder_decoder", False)) and takes_ids


def _huggingface_inside(model: nn.Module) -> nn.Module | None:
    """The Hugging Face model that a module is, or is put around and whose main input it takes; None without."""
    if is_huggingface(model):
        return model
    outermost = [module for module in model.modules() if is_huggingface(module)][:1]
    keyword_names = _keyword_names(model)
    return next((inner for inner in outermost if getattr(inner, "main_input_name", None) in keyword_names), None)


def _by_name(model: nn.Module, example: CallExample) -> CallExample:
    """Name positional arguments where they have names, so that only one spelling is left; check the names."""
    kinds = inspect.Parameter
    parameters = inspect.signature(model.forward).parameters
    parameter_kinds = {p.kind for p in parameters.values()}
    keyword_names = _keyword_names(model)
    signature = f"{type(model).__name__} takes {', '.join(keyword_names) or 'no named arguments'}"
    unknown = [name for name in example.kwargs if name not in keyword_names]
    if unknown and kinds.VAR_KEYWORD not in parameter_kinds:
        if keyword_names or kinds.VAR_POSITIONAL not in parameter_kinds:
            raise UsageError(f"'{unknown[0]}' is no argument of the model: {signature}")
        # It takes nothing by name: the names are the user's own, the order counts.
        example = CallExample(args=(*example.args, *example.kwargs.values()))
    if (
        not example.args
        or parameter_kinds & {kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL}
        or _called_by_position(model)
    ):
        return example
    positional = [name for name, p in parameters.items() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    if not keyword_names:
        raise UsageError(f"{type(model).__name__} takes arguments by name only: give example_inputs as a dict")
    if len(example.args) > len(positional):
        raise UsageError(f"{len(example.args)} example inputs were given, but {signature}")
    return CallExample(kwargs=dict(zip(positional, example.args)) | example.kwargs)


def _keyword_names(model: nn.Module) -> list[str]:
    """Names by which the module takes arguments."""
    kinds = inspect.Parameter
    parameters = inspect.signature(model.forward).parameters
    return [name for name, p in parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]


def _called_by_position(model: nn.Module) -> bool:
    """True if naming an argument changes the call: hooks see named ones apart, exported graphs take what they took."""
    return bool(model._forward_pre_hooks or model._forward_hooks) or isinstance(model, fx.GraphModule)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """A name for each of the first positional arguments."""
    kinds = inspect.Parameter
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    variadic = next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), "args")
    return [*names, *(f"{variadic}_{place}" for place in range(count - len(names)))][:count]


def _with_distinct_tensors(example: CallExample) -> CallExample:
    """The call with a tensor of its own for every argument: tracing takes arguments that are one tensor for one."""
    seen: set[int] = set()

    def distinct(tensor: Tensor) -> Tensor:
        if id(tensor) in seen:
            return tensor.clone()
        seen.add(id(tensor))
        return tensor

    return example.map_tensors(distinct)


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
    return CallExample(kwargs=example.kwargs | {"use_cache": False}, implied=("use_cache",))


def _required_dynamic(tensor: Tensor) -> range:
    """Batch, and sequence where dim 1 can be nothing else (images and masks have channels or heads there)."""
    return range(min(tensor.dim(), 2 if tensor.dim() <= 3 else 1))


def _dynamic_dims(leaf: Any) -> dict[int, Any] | None:
    if not isinstance(leaf, Tensor):
        return None
    dims = set(_required_dynamic(leaf))
    if leaf.dim() > 3:
        # The sizes of an attention mask follow the sequence; torch.export finds out which of them do.
        dims |= {dim for dim in range(1, leaf.dim()) if leaf.shape[dim] >= 2}
    return dict.fromkeys(sorted(dims), Dim.AUTO)
