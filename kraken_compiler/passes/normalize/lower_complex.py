"""Write complex arithmetic with real and imaginary parts.

    %z = view_as_complex(%x)                         ->     %a = select(%x, -1, 0);  %b = select(%x, -1, 1)
    %y = mul(%z, polar(ones, %angle))                       %r = a cos(angle) - b sin(angle);  %i = ...
    %o = view_as_real(%y)                                   %o = stack([%r, %i], -1)

Rotary embeddings are written like this. Lanes, caches and devices know real tensors only.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import ancestors, args_of, module_path
from kraken_compiler.passes.normalize.complex_rules import REAL_OF, RULES, Arithmetic, Pair, is_complex
from kraken_compiler.passes.shapes import fake_mode_of, value_of


@dataclass(frozen=True)
class LowerComplex(Pass[Program]):
    name: ClassVar[str] = "lower-complex"

    def run(self, program: Program) -> PassResult:
        graph = program.graph
        needed_nodes = ancestors(graph.output_node())
        nodes = [node for node in graph.nodes if node in needed_nodes]
        if not any(is_complex(node.meta.get("val")) for node in nodes):
            return PassResult()
        arithmetic = Arithmetic(graph, fake_mode_of(graph), graph.output_node())
        matches = 0
        for node in nodes:
            is_affected = is_complex(node.meta.get("val")) or any(
                one in arithmetic.pairs for one in node.all_input_nodes
            )
            if not is_affected:
                continue
            fault = _weight(program, node, arithmetic) if node.op == "placeholder" else _lower(node, arithmetic)
            if fault is not None:
                return PassResult(matches, (fault,))
            matches += 1
        for node in reversed(list(graph.nodes)):
            if node in arithmetic.pairs and not node.users:
                graph.erase_node(node)
        program.weights = {name: spec for name, spec in program.weights.items() if not _is_complex(spec)}
        return PassResult(matches)


_HINT = (
    "Supported are rotary embeddings and the like: products, sums, and what moves elements; "
    "write the rest in real numbers."
)


def _lower(node: fx.Node, arithmetic: Arithmetic) -> Rejection | None:
    if node.op == "output":
        return _reject(
            "it returns a complex tensor", next(one for one in node.all_input_nodes if one in arithmetic.pairs)
        )
    arithmetic.node = node
    if node.target is operator.getitem:
        pair, place = arithmetic.pairs[args_of(node)[0]], args_of(node)[1]
        parts = (pair.real, pair.imag)
        result: Pair | fx.Node | None = Pair(
            *(arithmetic.call(operator.getitem, part, place) if isinstance(part, fx.Node) else part for part in parts)
        )
    else:
        rule = RULES.get(node.target)
        result = rule(arithmetic, node) if rule is not None else None
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        arithmetic.graph.erase_node(node)
        return None
    if result is not None and isinstance(node.meta["val"], torch.Tensor):
        result = arithmetic.parts_like(result, node)
    if result is None:
        return _reject(f"it computes with complex numbers, and '{node.target}' has no form in real ones here", node)
    arithmetic.pairs[node] = result
    return None


def _weight(program: Program, node: fx.Node, arithmetic: Arithmetic) -> Rejection | None:
    """Put two real constants in the place of a complex one."""
    spec = program.weights.get(node.name)
    if spec is None:
        return _reject("it takes a complex input", node)
    if spec.source not in program.constants:
        hint = "Keep it as a buffer, or as a real tensor with a last dim of 2 that `torch.view_as_complex` reads."
        return _reject(f"its {spec.kind} '{spec.source}' is complex, and only real weights can be divided", node, hint)
    value = program.constants[spec.source].resolve_conj()
    parts = {"real": value.real.contiguous(), "imag": value.imag.resolve_neg().contiguous()}
    placeholders = [_part(program, node, spec, name, part) for name, part in parts.items()]
    arithmetic.pairs[node] = Pair(*placeholders)
    return None


def _part(program: Program, node: fx.Node, spec: WeightSpec, name: str, value: torch.Tensor) -> fx.Node:
    dtype = REAL_OF[value_of(node).dtype]
    source = f"{spec.source}.{name}"
    while source in {other.source for other in program.weights.values()}:
        source += "_part"
    with program.graph.inserting_before(node):
        placeholder = program.graph.placeholder(f"{node.name}_{name}")
    placeholder.target = placeholder.name
    with fake_mode_of(program.graph):
        placeholder.meta["val"] = torch.empty(spec.shape, dtype=dtype)
    program.constants[source] = value
    part_spec = replace(
        spec, name=placeholder.name, source=source, dtype=str(dtype).removeprefix("torch."), kind="constant"
    )
    _insert_before(program.weights, node.name, part_spec)
    return placeholder


def _insert_before(table: dict[str, WeightSpec], name: str, spec: WeightSpec) -> None:
    rows = list(table.items())
    table.clear()
    for key, row in rows:
        if key == name:
            table[spec.name] = spec
        table[key] = row


def _is_complex(spec: WeightSpec) -> bool:
    return spec.torch_dtype.is_complex


def _reject(reason: str, node: fx.Node, hint: str = _HINT) -> Rejection:
    return Rejection(reason, (node.name,), module_path(node), hint)
