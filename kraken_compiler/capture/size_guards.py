"""A trace's assumptions about sizes, as rules of the program: torch.export's guards, ranges and equalities.

An `if` on a size keeps one branch; for which sizes it is the right one, torch writes down as a guard in Python text.
Here the text is read, never executed, and spoken of in the program's own names of sizes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import Rejection, UnsupportedModelError
from kraken_compiler.ir.size_rules import holds, names_in, parse_rule

Arguments = Mapping[str, tuple[compat.TreeSpec, Sequence[str]]]
"""For every captured argument, its structure and the names of its leaves' placeholders."""

Shapes = Mapping[str, Sequence[int | str]]
"""Sizes, or their names, of the inputs."""


def size_rules(
    exported: ExportedProgram, shapes: Shapes, placeholders: Mapping[str, fx.Node], arguments: Arguments
) -> tuple[str, ...]:
    """The rules that the sizes of a program's inputs must keep to.

    Args:
        exported: The program, with its guards noted (`_torch_compat.note_guards`).
        shapes: The shapes of its tensor inputs, by placeholder.
        placeholders: The placeholders by name.
        arguments: How the inputs belong to the model's arguments.

    Raises:
        UnsupportedModelError: A guard asks for something that cannot be said as a rule.
    """
    places = _places(arguments)
    rules = [_translate(guard, places, shapes) for guard in compat.noted_guards(exported)]
    expressions = _named_expressions(shapes, placeholders)
    rules += _ranges(exported, expressions) + _relations(expressions)
    for rule in rules:
        if not names_in(rule) and not holds(rule, {}):
            raise _unsupported(f"its code asks for sizes that its own example does not have ({rule})")
    return tuple(dict.fromkeys(rule for rule in rules if names_in(rule) and not _is_trivial(rule)))


def _is_trivial(rule: str) -> bool:
    """True of `sequence == sequence`, which is left of two dims of one size: a name says that already."""
    parsed = parse_rule(rule)
    if not isinstance(parsed, ast.Compare) or not isinstance(parsed.ops[0], ast.Eq):
        return False
    return ast.unparse(parsed.left) == ast.unparse(parsed.comparators[0]) and len(parsed.ops) == 1


def _places(arguments: Arguments) -> dict[str, str]:
    """The placeholder of every leaf, by the ways in which guards name it."""
    places: dict[str, str] = {}
    leaves: list[str] = []
    for number, (name, (tree, placeholders)) in enumerate(arguments.items()):
        for path, placeholder in zip(compat.tree_leaf_paths(tree), placeholders, strict=True):
            for root in (f"['args'][{number}]", f"['{name}']"):
                places[_canonical(f"L{root}{path}")] = placeholder
            leaves.append(placeholder)
    flat_places = {_canonical(f"L['flat_args'][{index}]"): leaf for index, leaf in enumerate(leaves)}
    return flat_places | places


def _canonical(source: str) -> str:
    try:
        return ast.unparse(ast.parse(source, mode="eval"))
    except SyntaxError:
        return source


def _translate(guard: str, places: Mapping[str, str], sizes: Shapes) -> str:
    """A guard in the program's names of sizes."""
    try:
        tree = _Sizes(places, sizes).visit(ast.parse(guard.strip(), mode="eval"))
        rule = ast.unparse(tree)
        parse_rule(rule)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unsupported(f"its code asks for '{guard[:200]}', which cannot be said as a rule about sizes") from error
    return rule


class _Sizes(ast.NodeTransformer):
    """Puts names, or fixed sizes, in place of `L['x'].size()[1]`."""

    def __init__(self, places: Mapping[str, str], sizes: Shapes) -> None:
        self._places, self._sizes = places, sizes

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        call = node.value
        is_size_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "size"
        if not is_size_call or not isinstance(node.slice, ast.Constant):
            raise ValueError(f"{ast.unparse(node)} is no size")
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Attribute)
        placeholder = self._places.get(ast.unparse(call.func.value), "")
        shape, dim = self._sizes.get(placeholder, ()), node.slice.value
        if not isinstance(dim, int) or not 0 <= dim < len(shape):
            raise ValueError(f"{ast.unparse(node)} is of no input")
        size = shape[dim]
        return ast.Name(size, ast.Load()) if isinstance(size, str) else ast.Constant(size)


def _named_expressions(shapes: Shapes, placeholders: Mapping[str, fx.Node]) -> dict[str, Any]:
    """The symbolic expression of every named size."""
    expressions: dict[str, Any] = {}
    for placeholder, shape in shapes.items():
        for name, size in zip(shape, placeholders[placeholder].meta["val"].shape):
            if isinstance(name, str):
                expressions.setdefault(name, size.node.expr)
    return expressions


def _ranges(exported: ExportedProgram, expressions: Mapping[str, Any]) -> list[str]:
    """Bounds; torch takes sizes for at least 2 whether the model's code cares or not, so that one says nothing."""
    names = {str(expression): name for name, expression in expressions.items()}
    rules = []
    for expression, bounds in exported.range_constraints.items():
        name = names.get(str(expression))
        if name is None:
            continue
        low, high = _bound(bounds.lower), _bound(bounds.upper)
        rules += [f"{name} >= {low}"] if low is not None and low > 2 and expression.is_symbol else []
        rules += [f"{name} <= {high}"] if high is not None else []
    return rules


def _bound(limit: Any) -> int | None:
    """A finite bound as an integer; torch writes infinity as a symbol or as the largest integers."""
    if not getattr(limit, "is_Integer", isinstance(limit, int)):
        return None
    value = int(limit)
    return value if abs(value) < sys.maxsize - 1 else None


def _relations(expressions: Mapping[str, Any]) -> list[str]:
    """Rules by which sizes follow from each other, or from one that no input shows: `mask_1 == sequence + 1`."""
    symbol_names = {expression: name for name, expression in expressions.items() if expression.is_symbol}
    rules: list[str] = []
    hidden_sizes: dict[Any, tuple[str, int, int]] = {}
    for name, expression in expressions.items():
        if expression.is_symbol:
            continue
        if expression.free_symbols <= symbol_names.keys():
            rules.append(_rule_of(f"{name} == ({_text(expression, symbol_names)})", str(expression)))
            continue
        symbol, *others = sorted(expression.free_symbols, key=str)
        slope = expression.diff(symbol)
        if others or not slope.is_Integer or int(slope) < 1:
            raise _unsupported(f"the size '{name}' is computed from others in a way that cannot be said ({expression})")
        step, offset = int(slope), int(expression.subs(symbol, 0))
        if step > 1:
            rules.append(f"({name} - {offset}) % {step} == 0")
        if symbol in hidden_sizes:
            other, other_step, other_offset = hidden_sizes[symbol]
            rules.append(f"({name} - {offset}) * {other_step} == ({other} - {other_offset}) * {step}")
        hidden_sizes.setdefault(symbol, (name, step, offset))
    return [_plain_signs(rule) for rule in rules]


def _text(expression: Any, names: Mapping[Any, str]) -> str:
    import sympy  # type: ignore[import-untyped]

    renamed = expression.xreplace({symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()})
    return str(renamed)


def _rule_of(text: str, expression: str) -> str:
    try:
        parse_rule(text)
    except ValueError as error:
        raise _unsupported(
            f"one of its sizes is computed in a way that is no rule about sizes ({expression})"
        ) from error
    return text


def _plain_signs(rule: str) -> str:
    return rule.replace("- 0)", ")").replace("- -", "+ ")


def _unsupported(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        [Rejection(reason, hint="Export the model with other example sizes, or without that question.")]
    )
