"""From a captured model to a scheduled lane program: options checked, passes run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kraken_compiler.errors import Rejection, UnsupportedModelError, UsageError
from kraken_compiler.ir.forms import FORMS, STANDARD, Form
from kraken_compiler.ir.layers import Branch, LayerTable
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.size_rules import all_in_words, broken_rule, names_in
from kraken_compiler.passes.form.derive_schedule import parse_layers
from kraken_compiler.passes.manager import PassRecord, run_passes
from kraken_compiler.passes.pipelines import RECOGNIZE, rewrite
from kraken_compiler.passes.shard.degrees import DEGREE_HINT, count, even_degrees, smallest_degree, valid_degrees
from kraken_compiler.passes.shard.scale_groups import HINT
from kraken_compiler.size_checks import SEQUENCE, token_rules

_LENGTHS, _RUN = 1 << 12, 4
"""Lengths that are looked at, and how many in a row a text must be able to take."""

FormChoice = str | Form | Sequence[str | Form]
"""A form by name or as a row of the forms table, or one of these for every layer."""


def lower(
    captured: Program,
    degree: int | None = None,
    form: FormChoice = "kraken",
    layers: str | Sequence[int] | None = None,
    *,
    cached: bool = True,
    dump_directory: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Program, tuple[PassRecord, ...]]:
    """Rewrite a captured model into a lane program. The captured program is not changed.

    Args:
        captured: A program of degree 1, as `capture` makes it.
        degree: Number of lanes; None means the number of visible accelerators if there are several, else the smallest
            valid degree above 1.
        form: A row of the forms table, by name or as a `Form`; or one such row for every layer.
        layers: The layers that take the form, the others stay standard: numbers (negative ones count from the end) or
            text such as "15-29"; None means all.
        cached: Also make the program with a KV cache, which takes as long as all the rest.
        dump_directory: Where to write the graph as text after every pass.
        progress: Called with each pass's name before it runs.

    Returns:
        The lane program and the record of every pass.

    Raises:
        UsageError: Unknown form, layer or degree; the message lists what is valid.
        UnsupportedModelError: A part of the model cannot be rewritten.
    """
    if isinstance(form, str | Form) or not isinstance(form, Sequence):
        row: Form | tuple[Form, ...] = find_form(form)
    else:
        row = tuple(map(find_form, form))
    program = captured.copy()
    history = run_passes(program, RECOGNIZE, dump_directory=dump_directory, progress=progress)
    assert program.layers is not None
    forms = _forms_of_layers(row, layers, len(program.layers.layers))
    lanes = find_degree(degree, program.layers)
    stuck = cannot_grow(program) if cached else ""
    pipeline = rewrite(lanes, forms, cached and not stuck)
    try:
        history += run_passes(
            program, pipeline, dump_directory=dump_directory, progress=progress, first_number=len(history)
        )
    except UnsupportedModelError as error:
        raise _with_tried_hints(error, captured, lanes, forms) from None
    program.no_cache = program.no_cache or stuck
    return program, history


def _with_tried_hints(
    error: UnsupportedModelError, captured: Program, degree: int, forms: tuple[Form, ...]
) -> UnsupportedModelError:
    """The error, with another degree in its hints only if that was found to work."""
    if all(rejection.hint != DEGREE_HINT for rejection in error.rejections):
        return error
    program = captured.copy()
    run_passes(program, RECOGNIZE)
    assert program.layers is not None
    degrees = dict.fromkeys((*even_degrees(program.layers), *valid_degrees(program.layers)))
    others = [other for other in degrees if other not in (1, degree)][:_MOST_TRIES]
    works = next((other for other in others if _lowers(program.copy(), other, forms)), None)
    hint = _NO_DEGREE_HINT if works is None else f"Degree {works} works."
    return UnsupportedModelError(
        [replace(one, hint=hint) if one.hint == DEGREE_HINT else one for one in error.rejections]
    )


def _lowers(program: Program, degree: int, forms: tuple[Form, ...]) -> bool:
    try:
        run_passes(program, rewrite(degree, forms, cached=False))
    except UnsupportedModelError:
        return False
    return True


_MOST_TRIES = 3
_NO_DEGREE_HINT = (
    "Other degrees were tried and do not help: between their projections, attention must keep its heads apart and an "
    "FFN its columns."
)


def cannot_grow(program: Program) -> str:
    """Why a program's texts cannot grow token by token, which a KV cache is for; "" if they can."""
    rules = [rule for rule in token_rules(program.call, program.inputs) if names_in(rule) == {SEQUENCE}]
    if not rules:
        return ""
    allowed = [broken_rule(rules, {SEQUENCE: length}) is None for length in range(1, _LENGTHS)]
    runs = (all(allowed[start : start + _RUN]) for start in range(len(allowed) - _RUN))
    return "" if any(runs) else f"a text cannot grow token by token ({'; '.join(all_in_words(rules))})"


def _forms_of_layers(form: Form | tuple[Form, ...], layers: str | Sequence[int] | None, count: int) -> tuple[Form, ...]:
    if isinstance(form, Form):
        chosen = find_layers(layers, count)
        return tuple(form if chosen is None or index in chosen else STANDARD for index in range(count))
    if layers is not None:
        raise UsageError("give one form and the layers that take it, or a form for every layer, not both")
    if len(form) != count:
        raise UsageError(f"{len(form)} forms were given for {count} layers")
    return form


def find_form(form: str | Form) -> Form:
    """A row of the forms table; an unknown name is a `UsageError` that suggests the nearest."""
    if isinstance(form, Form):
        return form
    if not isinstance(form, str):
        raise UsageError(f"a form must be one of {', '.join(FORMS)}, or a Form, got {form!r}")
    if form in FORMS:
        return FORMS[form]
    nearest = difflib.get_close_matches(form, FORMS, n=1, cutoff=0.0)
    raise UsageError(f"there is no form '{form}'; did you mean '{nearest[0]}'? Forms: {', '.join(FORMS)}")


def find_layers(layers: str | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """Layer numbers from a selection; a wrong one is a `UsageError`."""
    if layers is None or (len(layers) == 0 and not isinstance(layers, str)):
        return None if layers is None else ()
    text = layers if isinstance(layers, str) else ",".join(str(layer) for layer in layers)
    try:
        return parse_layers(text, count)
    except ValueError as error:
        raise UsageError(f"--layers: {error}") from error


def find_degree(degree: int | None, layers: LayerTable) -> int:
    """A valid degree, or a `UsageError` that lists the valid ones."""
    valid = valid_degrees(layers)
    if len(valid) == 1 and degree is None:
        raise UnsupportedModelError([Rejection("it has one attention head, so there is nothing to divide among lanes")])
    wanted = degree
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool)):
        raise UsageError(f"the degree must be a whole number, got {wanted!r}")
    if wanted is None:
        visible = torch.accelerator.device_count()
        wanted = visible if visible > 1 else smallest_degree(layers)
    if wanted in valid:
        return wanted
    branches = layers.branches
    coarse = [branch for branch in branches if branch.unit > 1 and count(branch) // branch.unit < wanted]
    if coarse and wanted <= min(map(count, branches)):
        raise UnsupportedModelError([_too_coarse(branch, wanted, valid[-1]) for branch in coarse[:1]])
    attention = next(branch for branch in branches if branch.kind == "attention")
    columns = sorted({branch.columns for branch in branches if branch.kind == "ffn"})
    raise UsageError(
        f"the model cannot be divided among {wanted} lanes ({attention.heads} heads, {attention.kv_heads} KV heads, "
        f"FFN columns {', '.join(map(str, columns))}); valid degrees: 1 to {valid[-1]}, "
        f"without padding: {', '.join(map(str, even_degrees(layers)))}"
    )


def _too_coarse(branch: Branch, degree: int, most: int) -> Rejection:
    """Why a degree that leaves no lane without a head or a column is one too many for the scales."""
    what = "columns" if branch.kind == "ffn" else "heads"
    width = branch.unit * branch.columns // count(branch)
    reason = (
        f"its output projection is quantised in groups that keep {branch.unit} {what} ({width} columns) together, and "
        f"{count(branch)} {what} have too few of them for {degree} lanes of {branch.columns / degree:g} columns"
    )
    return Rejection(reason, (branch.output,), branch.path, f"{HINT} Valid degrees: 1 to {most}.")
