"""Every private torch API we use, in one place. Holds for torch 2.11 to 2.14; `tests/test_capture_torch_compat.py`."""

from __future__ import annotations

import copy
import functools
import logging
import operator
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

TreeSpec = pytree.TreeSpec
OpOverload = torch._ops.OpOverload
HigherOrderOperator = torch._ops.HigherOrderOperator


def op_name(target: OpOverload) -> str:
    """The name of an operator without its overload, e.g. "aten::linear"."""
    return str(target._schema.name)


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call in the operator's order, with defaults for those left out."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    by_name = {**dict(zip((argument.name for argument in schema), node.args)), **node.kwargs}
    return {argument.name: by_name.get(argument.name, argument.default_value) for argument in schema}


def new_fake_mode() -> FakeTensorMode:
    """A fake-tensor mode that `torch.export` accepts for a model's parameters while its buffers stay real."""
    # Imported here because it loads sympy, a second of start-up that no running rank needs.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


@contextmanager
def on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Let ops on a mode's fake tensors give fakes in the block, symbolic sizes included.

    Before 2.12 an op that is made of others asks for sizes as plain numbers unless torch's Python dispatcher is on. The
    mode's memory of earlier calls is off: to note a call with symbolic sizes takes longer than to compute it.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import disable_fake_tensor_cache

    with mode, enable_python_dispatcher(), disable_fake_tensor_cache(mode):
        yield


@contextmanager
def silent_log(name: str = "torch") -> Iterator[None]:
    """Silence a logger of torch's in the block: an error is also raised, and reported by whoever catches it."""
    logger = logging.getLogger(name)
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def no_partial_graphs() -> Iterator[None]:
    """Keep `torch.export` from printing the graph it has so far when it fails in the block."""
    from unittest.mock import patch

    import torch.export._trace as trace

    with patch.object(trace, "print", lambda *args, **options: None, create=True):
        yield


@contextmanager
def lean_traces() -> Iterator[None]:
    """Keep `torch.export` in the block from what nobody here reads, which takes a quarter of its time.

    That is Python code for graphs that are never run, and where in the model's code every node comes from. Its strict
    mode reads that code, and cannot be traced so.
    """
    from unittest.mock import patch

    from torch.fx import config
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    # torch 2.11 does not know the setting.
    with _use_lazy_graph_module(True), patch.object(config, "do_not_emit_stack_traces", True, create=True):
        yield


def branch_on_numbers(error: BaseException) -> str | None:
    """The line of the model's code that depends on the numbers in a tensor, if that is why it cannot be traced."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if not isinstance(error, GuardOnDataDependentSymNode):
        return None
    _, _, call = str(error).partition("The following call raised this error:")
    place, _, line = call.strip().partition("\n")
    match = re.match(r'File "(?:.*/)?([^/"]+)", line (\d+)', place)
    code = line.strip().partition("\n")[0].partition("  #")[0].strip()
    return f"`{code}` ({match[1]}, line {match[2]})" if match and code else "a condition on a tensor"


@contextmanager
def without_dispatch_modes() -> Iterator[None]:
    """Hide the ops of the block from the modes that a caller has entered: fake tensors, tracers, counters."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def is_fake(tensor: Tensor) -> bool:
    """True if the tensor has a shape but no values."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def is_traced(tensor: Tensor) -> bool:
    """True if the tensor was made while a module was traced, and is none outside of that."""
    return isinstance(tensor, FakeTensor | FunctionalTensor) or torch._is_functional_tensor(tensor)


def is_packed(tensor: Tensor) -> bool:
    """True if the tensor is made of others, as quantised and distributed ones are."""
    return bool(is_traceable_wrapper_subclass(tensor))


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to every leaf of a pytree; the containers are kept."""
    return pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of a pytree; None is a leaf."""
    return pytree.tree_leaves(tree)


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of a pytree and its structure."""
    return pytree.tree_flatten(tree)


def tree_unflatten(leaves: Iterable[Any], spec: TreeSpec) -> Any:
    """The pytree of structure `spec` with these leaves."""
    return pytree.tree_unflatten(leaves, spec)


def tree_dumps(spec: TreeSpec) -> str:
    """Serialize a structure as JSON.

    Raises:
        NotImplementedError: A container class has no serialized name.
    """
    # Since 2.1. torch takes every namedtuple apart, but wants to be told what it is called.
    for kind in {one.context for one in _within(spec) if one.type is namedtuple}:
        if kind not in pytree.SUPPORTED_SERIALIZED_TYPES:
            pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return pytree.treespec_dumps(spec)


def _within(spec: TreeSpec) -> Iterator[TreeSpec]:
    yield spec
    for child in tree_children(spec):
        yield from _within(child)


def tree_loads(text: str) -> TreeSpec:
    """The structure that `tree_dumps` wrote.

    Raises:
        NotImplementedError: A container class is not registered in this process.
    """
    return pytree.treespec_loads(text)


def tree_children(spec: TreeSpec) -> list[TreeSpec]:
    """The structures one level below."""
    # A method since 2.13; the attribute it replaces warns.
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def tree_leaf_names(spec: TreeSpec) -> list[str]:
    """A readable name for every leaf, e.g. `logits` or `hidden_states.0`; `output` for a bare leaf."""
    numbered_tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(numbered_tree)
    by_leaf = {leaf: ".".join(_key_name(key) for key in path) or "output" for path, leaf in paths}
    return [by_leaf[leaf] for leaf in range(spec.num_leaves)]


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def load_archive(file: IO[bytes]) -> dict[str, ExportedProgram]:
    """Every exported program of a `torch.export.save` archive, by name.

    `torch.export.load` is this plus a fallback that replaces the error a user needs to see by another one. It
    unpickles; check the file first (`capture/archive_safety.py`).
    """
    from torch.export.pt2_archive._package import load_pt2

    programs = load_pt2(file).exported_programs
    for program in programs.values():
        # Python source out of the file, which torch would execute if the program were run as a module.
        note_guards(program, program._guards_code)
        program._guards_code = []
    return programs


def guards_of(exported: ExportedProgram) -> frozenset[str]:
    """The guards that torch itself keeps with a program."""
    return frozenset(exported._guards_code)


def traced_guards(exported: ExportedProgram) -> list[str]:
    """The guards on sizes that a trace relies on, as Python text: `L['x'].size()[1] <= 32`.

    Without the questions whether a tensor of exactly some size lies in memory without gaps, which no number depends on.
    """
    environment = _shape_environment(exported)
    if environment is None:
        return list(exported._guards_code)
    layouts = [guard for guard in environment.guards if _asks_for_layout(guard)]
    size_guards = [guard for guard in environment.guards if guard not in layouts]
    if not layouts:
        return list(exported._guards_code)
    try:
        environment.guards = size_guards
        return list(_guards_as_text(exported))
    finally:
        environment.guards = [*size_guards, *layouts]


def _guards_as_text(exported: ExportedProgram) -> list[str]:
    from torch.export.exported_program import _convert_guards_to_code

    return list(_convert_guards_to_code(exported.graph_module))  # type: ignore[no-untyped-call]


def _shape_environment(exported: ExportedProgram) -> Any:
    values = (node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder")
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    return next((mode.shape_env for mode in modes if mode.shape_env is not None), None)


def _asks_for_layout(guard: Any) -> bool:
    place = getattr(guard.sloc, "framework_loc", None)
    name = getattr(place, "name", "")
    file = getattr(place, "filename", "")
    return file.endswith("torch/_prims_common/__init__.py") and any(
        word in name for word in ("contiguous", "dense", "strides")
    )


def note_guards(exported: ExportedProgram, guards: Iterable[str]) -> None:
    """Keep guards with a program under a name that torch does not know: it would execute them."""
    exported._noted_guards = tuple(dict.fromkeys(guards))  # type: ignore[attr-defined]


def noted_guards(exported: ExportedProgram) -> tuple[str, ...]:
    """The guards that `note_guards` keeps."""
    guards: tuple[str, ...] = getattr(exported, "_noted_guards", ())
    return guards


def tree_leaf_paths(spec: TreeSpec) -> list[str]:
    """The path of every leaf, as guards spell it: `['k'][0]`, "" for a bare leaf."""
    numbered_tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(numbered_tree)
    by_leaf = {leaf: pytree.keystr(path) for path, leaf in paths}
    return [by_leaf[leaf] for leaf in range(spec.num_leaves)]


def read_archive_entries(file: IO[bytes]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and reader of every entry of an archive, seen by the very reader that `load_archive` uses.

    Another zip reader may disagree with it about a crafted file.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    with PT2ArchiveReader(file) as reader:
        for name in reader.get_file_names():
            yield name, functools.partial(reader.read_bytes, name)


def in_spec(exported: ExportedProgram) -> TreeSpec:
    """Structure of `(args, kwargs)` as the model was called."""
    spec: TreeSpec | None = exported.call_spec.in_spec
    assert spec is not None
    return spec


def out_spec(exported: ExportedProgram) -> TreeSpec:
    """Structure of the output."""
    spec: TreeSpec | None = exported.call_spec.out_spec
    assert spec is not None
    return spec


def forward_arg_names(exported: ExportedProgram) -> tuple[str, ...]:
    """Names of the arguments the model was called with, in order."""
    signature = exported.module_call_graph[0].signature
    return tuple((signature.forward_arg_names or ()) if signature is not None else ())


def shape_symbol(size: Any) -> str | None:
    """Text of a symbolic size, None for an integer (which tracing may have found out late)."""
    if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
        return None
    return str(size.node.expr)


def size_hint(size: Any) -> int | None:
    """The size that a symbolic one had in the example that was traced; None if nobody knows."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None) if isinstance(size, torch.SymInt) else None
    return hint if isinstance(hint, int) else None


def is_mutating(node: fx.Node) -> bool:
    """True if the node calls an op that writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that a call writes to."""
    return _aliased_operands(node, only_written=True)


def viewed(node: fx.Node) -> fx.Node:
    """The node that a node is a view of, of a view of ...; the node itself if it has memory of its own."""
    while operands := _aliased_operands(node, only_written=False):
        value, source = node.meta.get("val"), operands[0].meta.get("val")
        if isinstance(value, Tensor) and isinstance(source, Tensor) and value.dtype != source.dtype:
            return node  # a cast, which may share memory where it changes nothing
        node = operands[0]
    return node


def _aliased_operands(node: fx.Node, *, only_written: bool) -> list[fx.Node]:
    """The operands whose memory a call writes to, or returns."""
    if node.target is operator.getitem and not only_written:
        return node.all_input_nodes[:1]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema.arguments
    by_name = dict(zip((argument.name for argument in schema), node.args)) | node.kwargs
    operands = []
    for argument in schema:
        operand, alias = by_name.get(argument.name), argument.alias_info
        if isinstance(operand, fx.Node) and alias is not None and (alias.is_write or not only_written):
            operands.append(operand)
    return operands


def flat_program(graph: fx.Graph) -> ExportedProgram:
    """A graph whose placeholders are all plain inputs and whose output is a flat tuple, as `torch.export` has programs.

    Node order is kept; every node needs `meta["val"]`. Consumes `graph`.
    """
    from torch._export.verifier import TrainingIRVerifier
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
    from torch.export.graph_signature import (
        ExportGraphSignature,
        InputKind,
        InputSpec,
        OutputKind,
        OutputSpec,
        TensorArgument,
    )

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in placeholders],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
    call = ModuleCallSignature(
        [spec.arg for spec in signature.input_specs],
        [spec.arg for spec in signature.output_specs],
        pytree.tree_flatten((tuple(range(len(placeholders))), {}))[1],
        pytree.tree_flatten(tuple(range(len(outputs))))[1],
    )
    mode = next((mode for node in placeholders if (mode := getattr(node.meta["val"], "fake_mode", None))), None)
    symbols = mode.shape_env.var_to_range if mode is not None and mode.shape_env is not None else {}
    return ExportedProgram(
        torch.nn.Module(),
        graph,
        signature,
        {},
        dict(symbols),
        [ModuleCallEntry("", call)],
        example_inputs=None,
        # The dialect in which an op may write to its operands, as attention with a cache does.
        verifiers=[TrainingIRVerifier],
    )


def onnx_model(graph: fx.Graph, translations: Mapping[Callable[..., Any], Callable[..., Any]], opset: int) -> Any:
    """A graph as an ONNX model (`onnx_ir.Model`), constants folded, with the nodes in the same order. Consumes `graph`.

    torch's exporter first traces what it is given again, to decompose ops that it has no translation for; with symbolic
    sizes that takes half a second per layer. Where every op has one, and no op mixes element types, that is left out.

    Args:
        graph: As `flat_program` takes it.
        translations: Torch op -> function that writes ONNX nodes, for ops that the exporter does not know.
        opset: Version of the default domain.
    """
    from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
    from torch.onnx._internal.exporter import _core

    registry = copy.copy(_onnx_registry(opset))
    registry.functions = {target: list(functions) for target, functions in registry.functions.items()}
    for target, translation in translations.items():
        registry.register_op(target, translation, is_complex=False)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    is_direct = all(registry.is_registered(node.target) and not _mixes_types(node) for node in calls)
    if not is_direct:
        _lay_out(graph)
    program = flat_program(graph)
    if is_direct:
        onnx_program = _core._exported_program_to_onnx_program(program, registry=registry, lower="at_conversion")
        onnx_program.model = onnxscript_apis.convert_version(onnx_program.model, opset)
        onnx_program.optimize()
        return onnx_program.model
    exported = torch.onnx.export(
        program, (), dynamo=True, opset_version=opset, custom_translation_table=dict(translations), verbose=False
    )
    assert exported is not None
    return exported.model


@functools.cache
def _onnx_registry(opset: int) -> Any:
    """The translations of torch's exporter; gathering them takes half a second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return ONNXRegistry.from_torchlib(opset_version=opset)


def _lay_out(graph: fx.Graph) -> None:
    """Copy permuted tensors before they are reshaped.

    Tracing again, torch takes a reshape for a view where an attention's result is laid out for one, decomposes the
    attention, whose result then is laid out differently, and trips over the view.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        if operand.target is aten.permute.default:
            with graph.inserting_before(node):
                copy = graph.call_function(aten.clone.default, (operand,), {"memory_format": torch.contiguous_format})
            value = operand.meta["val"]
            with value.fake_mode:
                copy.meta = {**operand.meta, "val": value.clone(memory_format=torch.contiguous_format)}
            node.replace_input_with(operand, copy)


def _mixes_types(node: fx.Node) -> bool:
    """True if torch would promote an operand of the op, or compute whole numbers as fractions."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return False
    operands = {operand.meta["val"].dtype for operand in node.all_input_nodes if _is_tensor(operand)}
    result = node.meta["val"].dtype
    if torch.bool in operands:
        chooses = node.target.overloadpacket in (torch.ops.aten.where, torch.ops.aten.masked_fill)
        if not chooses and result != torch.bool:
            return True
        operands.discard(torch.bool)
    return len(operands) > 1 or (result != torch.bool and bool(operands) and result not in operands)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def largest_size(size: int | torch.SymInt) -> int | None:
    """The largest number that a symbolic size can be, as far as the export proved it; None if nothing bounds it."""
    if not isinstance(size, torch.SymInt):
        return size
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer and int(upper) < sys.maxsize - 1 else None


def functional_collectives() -> Any:
    """The namespace of the functional collectives: all_reduce, all_gather_into_tensor, wait_tensor."""
    import torch.distributed._functional_collectives

    return torch.ops._c10d_functional


def size_functions() -> dict[str, Callable[..., Any]]:
    """The functions of torch that graphs call on sizes, by name."""
    names = ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "_sym_sqrt")
    return {f"torch.{name}": getattr(torch, name) for name in names if hasattr(torch, name)}


def multiplies_bfloat16() -> bool:
    """True if oneDNN multiplies bfloat16 on this machine."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_bfloat16_units() -> bool:
    """True if this CPU multiplies bfloat16 faster than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def reorder_linear_weight(weight: Tensor) -> Tensor:
    """A copy of a weight (columns x inputs) in oneDNN's own order, which only `reordered_linear` understands."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return copy


def reordered_linear() -> Any:
    """The operator that multiplies with such a copy: x, weight, bias, name of an activation, its numbers, its kind."""
    return torch.ops.mkldnn._linear_pointwise.default


def launch_config(shutdown_seconds: int, **options: Any) -> Any:
    """A `LaunchConfig` of torch's elastic launcher, whose ranks get so long to end once one has failed.

    Torch 2.11 cannot be told: there it is half a minute.
    """
    from dataclasses import fields

    from torch.distributed.launcher.api import LaunchConfig

    if any(field.name == "shutdown_timeout" for field in fields(LaunchConfig)):
        options["shutdown_timeout"] = shutdown_seconds
    return LaunchConfig(**options)


def rendezvous_host(group: Any) -> str | None:
    """Name or address of the host at which the ranks of a process group met; None if they met otherwise."""
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._world.pg_map.get(group, (None, None))[1]
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = getattr(store, "host", None)
    return str(host) if host else None


def group_timeout(group: Any) -> float:
    """Seconds that a collective of a process group may take."""
    device = torch.device("cuda" if "nccl" in torch.distributed.get_backend(group) else "cpu")
    return float(group._get_backend(device).options._timeout.total_seconds())


def new_dynamic_size(mode: FakeTensorMode, name: str) -> torch.SymInt:
    """A new symbolic size in the shape environment of a fake mode."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    fake = mode.from_tensor(torch.empty(7), symbolic_context=context, source=ConstantSource(name))
    size = fake.shape[0]
    assert isinstance(size, torch.SymInt)
    return size


@contextmanager
def generated_code() -> Iterator[list[str]]:
    """Collect the source of every program that Inductor writes, or finds in its cache, meanwhile."""
    from unittest.mock import patch

    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    with patch.object(GraphLowering, "save_output_code", codes.append):
        yield codes


def mark_sizes(
    tensors: Sequence[Tensor], dynamic: Iterable[tuple[int, int]], opaque: Iterable[tuple[int, int]] = ()
) -> None:
    """Tell torch.compile which sizes of its example inputs may change.

    Args:
        tensors: The inputs.
        dynamic: Number of an input and of its dim; of sizes 2 and more.
        opaque: Likewise; of any size, but nothing may depend on it while compiling.
    """
    import torch._dynamo.decorators as dynamo

    varying, unknown = set(dynamic), set(opaque)
    for place, tensor in enumerate(tensors):
        for dim in range(tensor.dim()):
            if (place, dim) in unknown:
                dynamo.mark_unbacked(tensor, dim)
            elif (place, dim) in varying:
                dynamo.mark_dynamic(tensor, dim)
            else:
                dynamo.mark_static(tensor, dim)
