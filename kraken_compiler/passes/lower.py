"""The lowering of a captured model to a scheduled lane program: options checked, passes run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kraken_compiler.errors import Rejection, UnsupportedModelError, UsageError
from kraken_compiler.ir.forms import FORMS, STANDARD, Form
from kraken_compiler.ir.layers import Branch, LayerTable
from kraken_compiler.ir.program import LaneProgram, Program, Split
from kraken_compiler.ir.schedule import AUTO, NO_OVERLAP
from kraken_compiler.ir.shards import EMBEDDINGS
from kraken_compiler.passes.form.derive_schedule import parse_layers
from kraken_compiler.passes.manager import PassRecord, PassRunner
from kraken_compiler.passes.shard.degrees import count, even_degrees, smallest_degree, valid_degrees
from kraken_compiler.passes.shard.scale_groups import HINT
from kraken_compiler.passes.stages import Assign, join, recognize, schedule, split, with_cache, with_halves

FormChoice = str | Form | Sequence[str | Form]
"""A form by name or as a row of the forms table, or one of these for every layer."""


def lower(
    captured: Program,
    degree: int | None = None,
    form: FormChoice = "kraken",
    layers: str | Sequence[int] | None = None,
    *,
    embedding: str = AUTO,
    assign: Assign | None = None,
    cached: bool = True,
    dump_directory: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[LaneProgram, tuple[PassRecord, ...]]:
    """Rewrite a captured model into a lane program. The captured program is not changed.

    Args:
        captured: A program of degree 1, as `capture` makes it.
        degree: Number of lanes; None means the number of visible accelerators if there are several, else the smallest
            valid degree above 1.
        form: A row of the forms table, by name or as a `Form`; or one such row for every layer.
        layers: The layers that take the form, the others stay standard: numbers (negative ones count from the end) or
            text such as "15-29"; None means all.
        embedding: What a lane holds of an embedding: its own rows where that saves enough memory (`auto`), its own rows
            wherever that is possible (`split`), or all of them (`whole`).
        assign: Chooses heads and columns for the lanes; None takes them in the order of the files.
        cached: Also make the program with a KV cache, which takes as long as all the rest.
        dump_directory: Where to write the graph as text after every pass.
        progress: Called with each pass's name before it runs.

    Returns:
        The lane program and the record of every pass.

    Raises:
        UsageError: Unknown form, layer, degree or choice; the message lists what is valid.
        UnsupportedModelError: A part of the model cannot be rewritten.
    """
    row = _rows(form)
    require_embedding(embedding)
    runner = PassRunner(dump_directory, progress)
    recognized = recognize(captured, runner)
    forms = forms_of_layers(row, layers, len(recognized.layers.layers))
    lanes = find_degree(degree, recognized.layers)
    split_program = split(recognized, lanes, runner, embedding=embedding, assign=assign)
    lane = schedule(split_program, forms, runner)
    return with_cache(lane, runner) if cached else lane, tuple(runner.history)


def split_source(
    captured: Program,
    degree: int | None = None,
    runner: PassRunner | None = None,
    *,
    embedding: str = AUTO,
    assign: Assign | None = None,
) -> Split:
    """Recognise a captured model and split it, for all forms that are wanted of it. See `lower`."""
    require_embedding(embedding)
    recognized = recognize(captured, runner)
    return split(recognized, find_degree(degree, recognized.layers), runner, embedding=embedding, assign=assign)


def lower_native(
    captured: Program,
    lanes: int,
    degree: int | None = None,
    *,
    cached: bool = True,
    overlap: str = NO_OVERLAP,
    whole_head: bool = False,
    runner: PassRunner | None = None,
) -> LaneProgram:
    """The lane program of a model that has lanes of its own (`native/`), one of which was captured.

    Args:
        captured: The first lane.
        lanes: How many the model has.
        degree: How many were asked for; None takes the model's own.
        cached, runner: See `lower`.
        overlap: See `lower_split`.
        whole_head: Every lane computes all logits, with the embedding as it is: for training.

    Raises:
        UsageError: Another degree was asked for.
        UnsupportedModelError: The lanes are not joined as those of a Kraken model.
    """
    if degree not in (None, lanes):
        raise UsageError(
            f"degree {degree}: this Kraken model was trained with {lanes} lanes and runs on as many devices, no others"
        )
    lane = join(recognize(captured, runner), lanes, runner, whole_head=whole_head)
    lane = with_cache(lane, runner) if cached else lane
    return with_halves(lane, overlap, runner)


def lower_split(
    split: Split,
    form: FormChoice = "kraken",
    layers: str | Sequence[int] | None = None,
    *,
    cached: bool = True,
    overlap: str = NO_OVERLAP,
    runner: PassRunner | None = None,
) -> LaneProgram:
    """The lane program of one choice of forms. See `lower`.

    Args:
        split, form, layers, cached, runner: See `lower`.
        overlap: What runs as two halves besides, see `with_halves`.
    """
    lane = schedule(split, rows_of_layers(form, layers, len(split.layers.layers)), runner)
    lane = with_cache(lane, runner) if cached else lane
    return with_halves(lane, overlap, runner)


def rows_of_layers(form: FormChoice, layers: str | Sequence[int] | None, count: int) -> tuple[Form, ...]:
    """The rows of the forms table of a model's layers, from what a user chose. See `lower`."""
    return forms_of_layers(_rows(form), layers, count)


def _rows(form: FormChoice) -> Form | tuple[Form, ...]:
    if isinstance(form, str | Form) or not isinstance(form, Sequence):
        return find_form(form)
    return tuple(map(find_form, form))


def forms_of_layers(form: Form | tuple[Form, ...], layers: str | Sequence[int] | None, count: int) -> tuple[Form, ...]:
    """The form of every layer; a selection that does not fit the layers is a `UsageError`."""
    if isinstance(form, Form):
        selection = find_layers(layers, count)
        return tuple(form if selection is None or index in selection else STANDARD for index in range(count))
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


def require_embedding(embedding: str) -> None:
    """Refuse what is no choice for embeddings with a `UsageError`."""
    if embedding not in EMBEDDINGS:
        raise UsageError(f"--embedding {embedding}: choose from {', '.join(EMBEDDINGS)}")


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
    lanes = degree
    if lanes is not None and (not isinstance(lanes, int) or isinstance(lanes, bool)):
        raise UsageError(f"the degree must be a whole number, got {lanes!r}")
    if lanes is None:
        visible = torch.accelerator.device_count()
        lanes = visible if visible > 1 else smallest_degree(layers)
    if lanes in valid:
        return lanes
    branches = layers.branches
    coarse_branches = [branch for branch in branches if branch.unit > 1 and count(branch) // branch.unit < lanes]
    if coarse_branches and lanes <= min(map(count, branches)):
        raise UnsupportedModelError([_too_coarse(branch, lanes, valid[-1]) for branch in coarse_branches[:1]])
    attention = next(branch for branch in branches if branch.kind == "attention")
    columns = sorted({branch.columns for branch in branches if branch.kind == "ffn"})
    raise UsageError(
        f"the model cannot be divided among {lanes} lanes ({attention.heads} heads, {attention.kv_heads} KV heads, "
        f"FFN columns {', '.join(map(str, columns))}); valid degrees: 1 to {valid[-1]}, "
        f"without padding: {', '.join(map(str, even_degrees(layers)))}"
    )


def _too_coarse(branch: Branch, degree: int, most: int) -> Rejection:
    """The rejection of a degree that leaves no lane without a head or a column, but is too high for the scales."""
    parts = "columns" if branch.kind == "ffn" else "heads"
    width = branch.unit * branch.columns // count(branch)
    reason = (
        f"its output projection is quantised in groups that keep {branch.unit} {parts} ({width} columns) together, and "
        f"{count(branch)} {parts} have too few of them for {degree} lanes of {branch.columns / degree:g} columns"
    )
    return Rejection(reason, (branch.output,), branch.path, f"{HINT} Valid degrees: 1 to {most}.")
