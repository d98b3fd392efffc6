"""Rules for the sizes that a program is right for: comparisons of sizes by name, as text that is never executed.

`sequence % 2 == 0`, `sequence <= 32`, `batch * sequence <= 40`: what the source model's code asked of its sizes while
it was captured. A rule comes out of an artifact, which may be tampered with, so it is parsed into a few kinds of
operators and computed here; Python's own `eval` never sees it. Imports no torch.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

_LONGEST = 2000
_DEEPEST = 60
_MOST_BITS = 512
_HIGHEST_POWER = 8
_STEPS, _PAIRS = 200, 25
"""Sizes below these are tried, of one name and of two."""

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "abs": abs,
    "round": round,
    "float": float,
    "torch.sym_float": float,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.trunc": math.trunc,
    "math.sqrt": math.sqrt,
    "math.log2": math.log2,
}


@lru_cache(maxsize=4096)
def parse_rule(text: str) -> ast.expr:
    """Read a rule.

    Raises:
        ValueError: It is no expression of sizes, whole numbers and the operators of this module.
    """
    if len(text) > _LONGEST:
        raise ValueError("a rule for sizes is too long")
    try:
        expression = ast.parse(text.strip(), mode="eval").body
        _check(expression, _DEEPEST)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text[:80]!r} is no rule for sizes") from error
    return expression


def names_in(rule: str) -> frozenset[str]:
    """Names of the sizes in a rule."""
    functions = {"math", "torch", *_FUNCTIONS}
    names = {node.id for node in ast.walk(parse_rule(rule)) if isinstance(node, ast.Name)}
    return frozenset(names - functions)


def holds(rule: str, sizes: Mapping[str, int]) -> bool:
    """True if sizes keep to a rule; one whose numbers cannot be computed, as in a division by 0, does not hold."""
    try:
        return bool(_value(parse_rule(rule), sizes))
    except (ArithmeticError, ValueError, TypeError):
        return False


def broken_rule(rules: Iterable[str], sizes: Mapping[str, int]) -> str | None:
    """The first rule that sizes break; None if they keep to all that speak of no other size."""
    return next((rule for rule in rules if names_in(rule) <= sizes.keys() and not holds(rule, sizes)), None)


def in_words(rule: str) -> str:
    """A rule as a clause, e.g. "the sequence size must be even"."""
    expression = parse_rule(rule)
    if isinstance(expression, ast.Compare) and len(expression.ops) == 1:
        left, right = expression.left, expression.comparators[0]
        clause = _of_one_size(left, expression.ops[0], right) or _of_one_size(right, _mirror(expression.ops[0]), left)
        if clause:
            return clause
    names = sorted(names_in(rule))
    clause = _steps_in_words(names[0], [rule]) if len(names) == 1 else ""
    if clause:
        return clause
    subject = f"the {names[0]} size" if len(names) == 1 else f"the sizes {', '.join(names)}"
    return f"{subject} must satisfy {ast.unparse(expression)}"


def all_in_words(rules: Sequence[str]) -> tuple[str, ...]:
    """The clauses that rules come to together, without what follows from the rest."""
    clear_rules = clearest(rules)
    clauses: list[str] = []
    for name in sorted({name for rule in clear_rules for name in names_in(rule)}):
        own_rules = [rule for rule in clear_rules if names_in(rule) == {name}]
        clause = _steps_in_words(name, own_rules)
        clauses += [clause] if clause else map(in_words, own_rules)
    return (*clauses, *(in_words(rule) for rule in clear_rules if len(names_in(rule)) > 1))


def _steps_in_words(name: str, rules: Sequence[str]) -> str:
    """Rules that come to "a multiple of a number from somewhere on"; "" if they do not."""
    allowed_sizes = [size for size in range(1, _STEPS) if all(holds(rule, {name: size}) for rule in rules)]
    if len(allowed_sizes) < 3:
        return ""
    first, step = allowed_sizes[0], allowed_sizes[1] - allowed_sizes[0]
    if first == 1 and len(allowed_sizes) == allowed_sizes[-1] < _STEPS - 1:
        return f"the {name} size must be at most {allowed_sizes[-1]}"
    if allowed_sizes != list(range(first, _STEPS, step)) or first % step or (first, step) == (1, 1):
        return ""
    even = "even" if step == 2 else f"divisible by {step}"
    least = f" and at least {first}" if first > step else ""
    return f"the {name} size must be {even if step > 1 else f'at least {first}'}{least if step > 1 else ''}"


def clearest(rules: Sequence[str]) -> tuple[str, ...]:
    """The rules without those that say nothing new for the sizes that are tried; the shortest come first."""
    sorted_rules = sorted(dict.fromkeys(rules), key=lambda rule: (sum(1 for _ in ast.walk(parse_rule(rule))), rule))
    clear_rules: list[str] = []
    for rule in sorted_rules:
        names = names_in(rule)
        earlier_rules = [earlier for earlier in clear_rules if names_in(earlier) <= names]
        if len(names) > 2 or any(_matters(rule, earlier_rules, sizes) for sizes in _grid(sorted(names))):
            clear_rules.append(rule)
    return tuple(clear_rules)


def _matters(rule: str, earlier_rules: Sequence[str], sizes: Mapping[str, int]) -> bool:
    return not holds(rule, sizes) and all(holds(earlier, sizes) for earlier in earlier_rules)


def _grid(names: Sequence[str]) -> Iterator[dict[str, int]]:
    if len(names) == 1:
        # A bound may lie far out: what says something new does so beyond the first sizes or near a power of two.
        far = [2**power + step for power in range(6, 21) for step in (-1, 0, 1)]
        yield from ({names[0]: size} for size in [*range(1, _STEPS), *far])
        return
    for values in product(range(1, _PAIRS), repeat=len(names)):
        yield dict(zip(names, values))


def _check(node: ast.expr, depth: int) -> None:
    """Make sure that `_value` can compute an expression."""
    if depth == 0:
        raise ValueError("a rule for sizes is nested too deeply")
    if isinstance(node, ast.Name):
        return
    if isinstance(node, ast.Constant):
        if type(node.value) not in (bool, int, float):
            raise ValueError(f"{node.value!r} is no size")
        return
    for operand in _operands(node):
        _check(operand, depth - 1)


def _operands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        if isinstance(node.op, ast.Pow) and not _is_power(node.right):
            raise ValueError(f"{ast.unparse(node)}: a power in a rule for sizes is a small whole number or a root")
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        return [node.operand]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.Compare) and all(type(one) in _COMPARISONS for one in node.ops):
        return [node.left, *node.comparators]
    if isinstance(node, ast.IfExp):
        return [node.test, node.body, node.orelse]
    if isinstance(node, ast.Call) and node.args and not node.keywords and ast.unparse(node.func) in _FUNCTIONS:
        return node.args
    raise ValueError(f"{ast.unparse(node)[:80]!r} is no part of a rule for sizes")


def _is_power(node: ast.expr) -> bool:
    if not isinstance(node, ast.Constant):
        return False
    return node.value == 0.5 or (type(node.value) is int and 0 <= node.value <= _HIGHEST_POWER)


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise ValueError(f"no size is called {node.id}")
        return sizes[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp):
        number = _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
        if isinstance(number, int) and number.bit_length() > _MOST_BITS:
            raise OverflowError("a number in a rule for sizes is too large")
        return number
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, sizes)
        return -operand if isinstance(node.op, ast.USub) else not operand
    if isinstance(node, ast.BoolOp):
        combine = all if isinstance(node.op, ast.And) else any
        return combine(_value(value, sizes) for value in node.values)
    if isinstance(node, ast.IfExp):
        return _value(node.body if _value(node.test, sizes) else node.orelse, sizes)
    if isinstance(node, ast.Call):
        return _FUNCTIONS[ast.unparse(node.func)](*(_value(argument, sizes) for argument in node.args))
    assert isinstance(node, ast.Compare)
    values = [_value(part, sizes) for part in (node.left, *node.comparators)]
    return all(_COMPARISONS[type(one)](*pair) for one, pair in zip(node.ops, pairwise(values)))


_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}


def _mirror(comparison: ast.cmpop) -> ast.cmpop:
    return _MIRRORED.get(type(comparison), type(comparison))()


def _of_one_size(left: ast.expr, comparison: ast.cmpop, right: ast.expr) -> str:
    """A comparison of a size, or of its remainder, with a number in words; "" if it is none."""
    limit = _whole_number(right)
    if limit is None:
        return ""
    if isinstance(left, ast.UnaryOp) and isinstance(left.op, ast.USub):
        return _of_one_size(left.operand, _mirror(comparison), ast.Constant(-limit))
    factor = _whole_number(left.left) if isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mult) else None
    if factor == -1 and isinstance(left, ast.BinOp):  # torch writes -x as (-1)*x
        return _of_one_size(left.right, _mirror(comparison), ast.Constant(-limit))
    if isinstance(left, ast.Name):
        bounds = {ast.Lt: limit - 1, ast.LtE: limit, ast.Gt: limit + 1, ast.GtE: limit, ast.Eq: limit, ast.NotEq: limit}
        relation = {ast.Lt: "at most", ast.LtE: "at most", ast.Gt: "at least", ast.GtE: "at least"}.get(
            type(comparison), ""
        )
        must = "must not be" if isinstance(comparison, ast.NotEq) else "must be"
        return f"the {left.id} size {must} {relation}{' ' * bool(relation)}{bounds[type(comparison)]}"
    if not (isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mod) and isinstance(left.left, ast.Name)):
        return ""
    step = _whole_number(left.right)
    if step is None or not isinstance(comparison, ast.Eq | ast.NotEq):
        return ""
    must = f"the {left.left.id} size must {'not ' * isinstance(comparison, ast.NotEq)}"
    if step == 2 and limit in (0, 1):
        return f"{must}be {'odd' if limit else 'even'}"
    return f"{must}be divisible by {step}" if limit == 0 else f"{must}leave {limit} when divided by {step}"


def _whole_number(node: ast.expr) -> int | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _whole_number(node.operand)
        return None if number is None else -number
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None
