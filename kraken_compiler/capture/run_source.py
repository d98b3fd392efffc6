"""The source model itself, run on a program's flat inputs: what a rewritten program is compared with."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from kraken_compiler import _torch_compat as compat
from kraken_compiler.capture.example_inputs import CallExample
from kraken_compiler.capture.filled_model import fill
from kraken_compiler.capture.quiet import quiet_torch, quiet_transformers
from kraken_compiler.capture.training_mode import in_evaluation
from kraken_compiler.capture.untouched import untouched
from kraken_compiler.capture.unwrap import without_caches
from kraken_compiler.ir.calls import InputSpec
from kraken_compiler.ops.devices import device_of
from kraken_compiler.weights.store import WeightStore

RunModel = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""The program's flat inputs -> the model's outputs in the order of the program's."""

OpenModel = Callable[[], AbstractContextManager[RunModel]]
"""Function that makes the model ready to run; what that takes is let go at the end."""

_IN_MEMORY_BYTES = 256 << 20
"""Weights of up to this many bytes are held while a directory's model runs; more stay on the disk."""


@contextmanager
def module_reference(model: nn.Module, example: CallExample, inputs: Sequence[InputSpec]) -> Iterator[RunModel]:
    """A module, called as it was captured: in evaluation mode, without gradients, and as before afterwards."""
    compiled_parts_run_eagerly = torch.compiler.set_stance("force_eager")
    with untouched(model), without_caches(model), compiled_parts_run_eagerly, in_evaluation(model):
        yield partial(_run, model, example, inputs)


def _run(
    model: nn.Module, example: CallExample, inputs: Sequence[InputSpec], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    device = device_of(model)
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for spec, tensor in zip(inputs, tensors, strict=True):
        groups[spec.parameter].append(tensor if device is None else tensor.to(device))
    keyword_example = CallExample(
        kwargs={name: _with_tensors(value, groups.pop(name, [])) for name, value in example.kwargs.items()}
    )
    positional_arguments = _with_tensors(example.args, [tensor for group in groups.values() for tensor in group])
    with torch.no_grad(), quiet_torch():
        output = model(*positional_arguments, **keyword_example.kwargs)
    return tuple(leaf.detach() for leaf in compat.tree_leaves(output) if isinstance(leaf, Tensor))


def _with_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    """An argument with other tensors in the places of its own."""
    remaining = iter(tensors)
    return compat.tree_map(lambda leaf: next(remaining) if isinstance(leaf, Tensor) else leaf, value)


@contextmanager
def directory_reference(
    path: Path, architecture: Any, dtype: torch.dtype, example: CallExample, inputs: Sequence[InputSpec]
) -> Iterator[RunModel]:
    """A Hugging Face directory's model as transformers itself loads and runs it.

    Weights of more than a few hundred megabytes are left where they are: each module reads its own when it runs.
    """
    with tempfile.TemporaryDirectory(prefix="kraken-reference-") as offload_folder:
        is_large = sum(file.stat().st_size for file in path.glob("*.safetensors")) > _IN_MEMORY_BYTES
        places = {"device_map": {"": "disk"}, "offload_folder": offload_folder} if is_large else {}
        with quiet_transformers():
            model = architecture.from_pretrained(
                str(path), dtype=dtype, local_files_only=True, trust_remote_code=False, **places
            )
        with module_reference(model, example, inputs) as run:
            yield run


@contextmanager
def filled_reference(
    model: nn.Module, store: WeightStore, example: CallExample, inputs: Sequence[InputSpec]
) -> Iterator[RunModel]:
    """A model that was built without values, given those that its store reads: all of it in memory."""
    filled_model = copy.deepcopy(model)
    fill(filled_model, store)
    with module_reference(filled_model, example, inputs) as run:
        yield run


def exported_reference(exported: ExportedProgram) -> OpenModel:
    """An exported program, node by node as it was saved; nothing of it is compiled or executed as Python.

    Call it before anything changes the program.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, {}))
    signature, constants = exported.graph_signature, exported.constants
    module = fx.GraphModule(exported.graph_module, graph)
    values = [
        (exported.state_dict if spec.target in exported.state_dict else constants)[spec.target]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target
        else None
        if spec.kind is InputKind.USER_INPUT
        else constants.get(spec.target or "")
        for spec in signature.input_specs
    ]
    kinds = [spec.kind for spec in signature.input_specs]
    constant_inputs = [getattr(spec.arg, "value", None) for spec in signature.input_specs]

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        tensors = iter(inputs)
        operands = [
            value if kind is not InputKind.USER_INPUT else constant if _is_constant(spec) else next(tensors)
            for value, kind, constant, spec in zip(values, kinds, constant_inputs, signature.input_specs)
        ]
        with torch.no_grad():
            outputs = fx.Interpreter(module).run(*operands, enable_io_processing=False)
        return tuple(leaf for leaf in compat.tree_leaves(outputs) if isinstance(leaf, Tensor))

    @contextmanager
    def open_model() -> Iterator[RunModel]:
        yield run

    return open_model


def _is_constant(spec: Any) -> bool:
    return hasattr(spec.arg, "value")
