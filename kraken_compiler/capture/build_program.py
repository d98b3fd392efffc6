"""`ExportedProgram` to `Program`: used weights first, then tensor inputs; a flat tuple of tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.export.graph_signature import InputSpec as ExportInput
from torch.export.graph_signature import OutputSpec as ExportOutput

from kraken_compiler import _torch_compat as compat
from kraken_compiler.capture.size_guards import size_rules
from kraken_compiler.errors import Rejection, UnsupportedModelError
from kraken_compiler.ir.program import CallSpec, InputSpec, Program
from kraken_compiler.ir.size_rules import all_in_words
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.ops.devices import move_program

_WEIGHT_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
Scalar = bool | int | float | str | None


def build_program(
    exported: ExportedProgram,
    *,
    parameters: Sequence[str] = (),
    defaults: Mapping[str, Scalar] | None = None,
    implied: Sequence[str] = (),
    model_class: str = "",
) -> tuple[Program, tuple[str, ...]]:
    """Turn an exported program into ours, on the CPU; the graph is taken over, not copied.

    Args:
        exported: The traced model, free of in-place ops.
        parameters: Names of `forward`'s parameters in positional order; those of the captured call if unknown.
        defaults: What `forward` takes for arguments that a call leaves out, as far as that is known.
        implied: Names of arguments that the captured call had though the user did not give them.
        model_class: The source model's class.

    Returns:
        The program, and notes about dimensions that are fixed or bounded.

    Raises:
        UnsupportedModelError: The model has inputs or outputs that are no tensors, or writes to its buffers.
    """
    signature = exported.graph_signature
    unread_writes = _unread_writes(exported)
    specs = [spec for spec in signature.output_specs if spec not in unread_writes]
    outputs, none_outputs = _check_outputs(specs, exported)
    names = compat.tree_leaf_names(compat.out_spec(exported))
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}

    weights: dict[str, WeightSpec] = {}
    constants: dict[str, Tensor] = {}
    user_specs: list[ExportInput] = []
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            user_specs.append(spec)
        elif spec.kind not in _WEIGHT_KINDS:
            raise _unsupported(f"it holds an object that is no tensor ({spec.kind.name.lower()})", spec.arg.name)
        elif not node.users and node.name not in outputs:
            exported.graph.erase_node(node)
        else:
            _require_plain(exported, spec)
            weight = _weight(spec, node)
            weights[weight.name] = weight
            if spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False or _is_table(exported, spec):
                constants[weight.source] = _constant_value(exported, weight.source)

    call_inputs = _call_inputs(exported)
    inputs = _tensor_inputs(exported, placeholders, user_specs, call_inputs)
    symbols = _name_symbols([placeholders[name] for name, _ in inputs])
    _drop_outputs(exported.graph, [spec in unread_writes for spec in signature.output_specs])
    _flatten_output(exported.graph, none_outputs)
    # Stores read to the CPU, whatever device the model is on.
    move_program(exported.graph_module, "cpu")
    exported.graph_module.recompile()

    arguments = {name: (tree, tuple(arg.name for arg in args)) for name, (tree, args) in call_inputs.items()}
    shapes = {name: _shape(placeholders[name], symbols) for name, _ in inputs}
    rules = size_rules(exported, shapes, placeholders, arguments)
    call = CallSpec(
        parameters=tuple(parameters) or tuple(call_inputs),
        constants=_constant_arguments(user_specs, call_inputs),
        trees={name: compat.tree_dumps(tree) for name, (tree, args) in call_inputs.items() if _has_tensor(args)},
        out_tree=compat.tree_dumps(compat.out_spec(exported)),
        out_names=tuple(names),
        model_class=model_class,
        defaults=dict(defaults or {}),
        implied=tuple(implied),
        none_inputs={
            name: nones
            for name, (_, args) in call_inputs.items()
            if _has_tensor(args) and (nones := _none_leaves(args))
        },
        none_outputs=none_outputs,
        sizes=rules,
    )
    for name, _ in inputs:
        if fx.Graph().placeholder(name).name != name:
            # torch renames arguments called like a Python builtin (`input`) in every copy of a graph; do it now, once.
            placeholders[name].name = f"arg_{name}"
    input_specs = tuple(_input_spec(placeholders[name], parameter, symbols) for name, parameter in inputs)
    program = Program(exported.graph_module, weights, input_specs, call, constants)
    return program, _notes(input_specs, rules)


def _unread_writes(exported: ExportedProgram) -> list[ExportOutput]:
    """Outputs written to buffers that no call reads before it writes them: nobody can see what they hold.

    Rotary frequencies of the kind `longrope` lie in such a buffer.
    """
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    unread_buffers = {
        spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.BUFFER and not placeholders[spec.arg.name].users
    }
    return [
        spec
        for spec in exported.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION and spec.target in unread_buffers
    ]


def _drop_outputs(graph: fx.Graph, mask: Sequence[bool]) -> None:
    output = graph.output_node()
    (results,) = output.args
    assert isinstance(results, (tuple, list))
    output.args = (tuple(result for result, drop in zip(results, mask, strict=True) if not drop),)


def _check_outputs(specs: Sequence[ExportOutput], exported: ExportedProgram) -> tuple[list[str], tuple[int, ...]]:
    """Names of the output tensors, and which leaves of the output are None."""
    tensors: list[str] = []
    nones: list[int] = []
    for index, spec in enumerate(specs):
        if spec.kind is not OutputKind.USER_OUTPUT:
            target = str(spec.target or spec.arg.name)
            raise _unsupported(f"its forward writes to '{target}' ({spec.kind.name.lower()})", target)
        if isinstance(spec.arg, TensorArgument):
            tensors.append(spec.arg.name)
        elif isinstance(spec.arg, ConstantArgument) and spec.arg.value is None:
            nones.append(index)
        else:
            name = compat.tree_leaf_names(compat.out_spec(exported))[index]
            value = getattr(spec.arg, "value", "a number")
            raise _unsupported(
                f"its output '{name}' is {value!r}, and only tensors and None can be returned", spec.arg.name
            )
    return tensors, tuple(nones)


def _weight(spec: ExportInput, node: fx.Node) -> WeightSpec:
    assert spec.target is not None
    value = node.meta["val"]
    return WeightSpec(
        name=node.name,
        source=spec.target,
        source_shape=tuple(int(size) for size in value.shape),
        dtype=_dtype_name(value.dtype),
        kind=_WEIGHT_KINDS[spec.kind],
    )


def _require_plain(exported: ExportedProgram, spec: ExportInput) -> None:
    """Refuse an archive whose graph looks into quantised tensors: their parts have no names in it."""
    value = exported.state_dict.get(spec.target or "")
    if value is not None and compat.is_packed(value):
        path, _, attribute = str(spec.target).rpartition(".")
        reason = (
            f"its {attribute} was exported as a {type(value).__name__}, "
            "and only plain tensors can be divided among lanes"
        )
        raise UnsupportedModelError([Rejection(reason, (spec.arg.name,), path, _PACKED_HINT)])


_PACKED_HINT = "Compile the module itself: its quantised weights are taken apart before it is exported."


def _constant_value(exported: ExportedProgram, name: str) -> Tensor:
    value = exported.constants.get(name, exported.state_dict.get(name))
    assert isinstance(value, Tensor), f"constant '{name}' has no value"
    if compat.is_fake(value):
        raise _unsupported(f"the tensor '{name}' that its forward creates depends on the weights", name)
    return value.detach().cpu()


def _is_table(exported: ExportedProgram, spec: ExportInput) -> bool:
    """True for a complex buffer whose value is at hand: lanes hold its parts, which no checkpoint has."""
    value = exported.state_dict.get(spec.target or "")
    return spec.kind is InputKind.BUFFER and value is not None and value.is_complex() and not compat.is_fake(value)


def _call_inputs(exported: ExportedProgram) -> dict[str, tuple[compat.TreeSpec, list[Any]]]:
    """Every captured argument: its structure and the signature's entries for its leaves."""
    positional, keyword = compat.tree_children(compat.in_spec(exported))
    trees = compat.tree_children(positional) + compat.tree_children(keyword)
    parameter_names = compat.forward_arg_names(exported)
    keywords = list(keyword.context or ())
    positional_count = len(trees) - len(keywords)
    names = [parameter_names[i] if i < len(parameter_names) else f"arg_{i}" for i in range(positional_count)] + keywords
    leaves = iter([s.arg for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT])
    return {name: (tree, [next(leaves) for _ in range(tree.num_leaves)]) for name, tree in zip(names, trees)}


def _tensor_inputs(
    exported: ExportedProgram,
    placeholders: dict[str, fx.Node],
    user_specs: Sequence[ExportInput],
    call_inputs: dict[str, tuple[compat.TreeSpec, list[Any]]],
) -> list[tuple[str, str]]:
    """Placeholder and parameter name of every tensor input; the placeholders of the others are removed."""
    owner = {arg.name: parameter for parameter, (_, args) in call_inputs.items() for arg in args}
    inputs: list[tuple[str, str]] = []
    for spec in user_specs:
        node = placeholders[spec.arg.name]
        if isinstance(spec.arg, TensorArgument):
            inputs.append((node.name, owner[node.name]))
            continue
        if not isinstance(spec.arg, ConstantArgument):
            raise _unsupported(f"its argument '{owner[node.name]}' is a number that varies", node.name)
        _inline_constant(node, spec.arg.value)
        exported.graph.erase_node(node)
    return inputs


def _inline_constant(node: fx.Node, value: Any) -> None:
    def replace(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args = fx.map_arg(user.args, replace)
        user.kwargs = fx.map_arg(user.kwargs, replace)


def _constant_arguments(
    user_specs: Sequence[ExportInput], call_inputs: dict[str, tuple[compat.TreeSpec, list[Any]]]
) -> dict[str, Scalar]:
    """Arguments that are one constant; a structure may mix tensors with None, but not with other constants."""
    constants: dict[str, Scalar] = {}
    for name, (tree, args) in call_inputs.items():
        values = [arg.value for arg in args if isinstance(arg, ConstantArgument)]
        if not values:
            continue
        if tree.is_leaf() and isinstance(values[0], bool | int | float | str | None):
            constants[name] = values[0]
        elif any(value is not None for value in values):
            raise _unsupported(f"its argument '{name}' mixes tensors with other values", args[0].name)
    return constants


def _has_tensor(args: Sequence[Any]) -> bool:
    return any(isinstance(arg, TensorArgument) for arg in args)


def _none_leaves(args: Sequence[Any]) -> tuple[int, ...]:
    return tuple(index for index, arg in enumerate(args) if isinstance(arg, ConstantArgument))


def _flatten_output(graph: fx.Graph, none_outputs: Sequence[int]) -> None:
    output = graph.output_node()
    results = output.args[0]
    assert isinstance(results, tuple | list)
    output.args = (tuple(result for index, result in enumerate(results) if index not in none_outputs),)


def _name_symbols(nodes: Sequence[fx.Node]) -> dict[str, str]:
    """Readable names for symbolic sizes: dim 0 of the first input is the batch, dim 1 the sequence."""
    names: dict[str, str] = {}
    for node in nodes:
        for dim, size in enumerate(node.meta["val"].shape):
            symbol = compat.shape_symbol(size)
            if symbol is None or symbol in names:
                continue
            name = {0: "batch", 1: "sequence"}.get(dim, f"{node.name}_{dim}")
            names[symbol] = f"{name}_{node.name}" if name in names.values() else name
    return names


def _shape(node: fx.Node, symbols: dict[str, str]) -> tuple[int | str, ...]:
    sizes = node.meta["val"].shape
    return tuple(symbols[symbol] if (symbol := compat.shape_symbol(size)) else int(size) for size in sizes)


def _input_spec(node: fx.Node, parameter: str, symbols: dict[str, str]) -> InputSpec:
    return InputSpec(node.name, parameter, _dtype_name(node.meta["val"].dtype), _shape(node, symbols))


def _notes(inputs: Sequence[InputSpec], rules: Sequence[str]) -> tuple[str, ...]:
    notes = []
    for spec in inputs:
        dims = {0: "batch", 1: "sequence"} if len(spec.shape) <= 3 else {0: "batch"}
        notes += [
            f"the {dims[dim]} size of input '{spec.name}' is fixed at {size}: the model was captured that way or its "
            "code needs that number, so the compiled program takes no other"
            for dim, size in enumerate(spec.shape)
            if dim in dims and isinstance(size, int)
        ]
    return (*notes, *all_in_words(rules))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unsupported(reason: str, node: str) -> UnsupportedModelError:
    return UnsupportedModelError([Rejection(reason, nodes=(node,) if node else ())])
