"""What a compile is asked for, and what cannot be asked for together: looked at before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kraken_compiler.artifact.replaceable import resolved
from kraken_compiler.backends.base import Backend
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.schedule import AUTO, OVERLAPS
from kraken_compiler.ir.shards import AFFINITY, ORDER
from kraken_compiler.latency.machine import Machine, load_machine
from kraken_compiler.latency.predict import Load
from kraken_compiler.options.compile import CompileOptions
from kraken_compiler.passes.lower import require_embedding
from kraken_compiler.quality.assignment.on_model import require_lanes_choice
from kraken_compiler.quality.budget import Budget


@dataclass(frozen=True)
class Asked:
    """What a rewrite is asked for.

    Attributes:
        options: As they were given.
        directory: Where the artifact goes; None of a plan, which writes nothing and reads no weight.
        degrees: The degrees; None is the compiler's own choice.
        lanes: How lanes get their heads and columns.
        texts: What is calibrated on.
        budget: What may be lost, if forms are chosen by that.
        machine: The machine whose times are predicted, if any.
        load: What it is asked for.
        dumps: Where the graphs of all passes go, if anywhere.
    """

    options: CompileOptions
    directory: Path | None
    degrees: tuple[int | None, ...]
    lanes: str
    texts: tuple[Path, ...]
    budget: Budget | None
    machine: Machine | None
    load: Load
    dumps: Path | None

    @classmethod
    def of(cls, options: CompileOptions, directory: Path | None) -> Self:
        """Read the options.

        Args:
            options: As they were given.
            directory: Where the artifact goes; None of a plan.

        Raises:
            UsageError: One of them is none of its choices, or does not go with another.
            InputFileError: The machine's file cannot be read.
        """
        is_plan = directory is None
        if options.overlap not in OVERLAPS:
            raise UsageError(f"--overlap {options.overlap}: choose from {', '.join(OVERLAPS)}")
        require_embedding(options.embedding)
        _require_text_is_read(options, is_plan=is_plan)
        # Without text the model is run for nothing else, and is of little use in a form that changes it.
        lanes = options.lanes or (AFFINITY if options.calibrate else ORDER)
        require_lanes_choice(lanes)
        return cls(
            options,
            directory,
            _asked_degrees(options),
            lanes,
            tuple(Path(one) for one in options.calibrate),
            _asked_budget(options, is_plan=is_plan),
            _asked_machine(options, is_plan=is_plan),
            Load(options.prompt, 1, options.new_tokens),
            Path(options.dump_directory) if options.dump_directory is not None else None,
        )


def _asked_degrees(options: CompileOptions) -> tuple[int | None, ...]:
    """The degrees that were asked for; None is the compiler's own choice.

    Raises:
        UsageError: There is none.
    """
    degrees = tuple(options.degree) if isinstance(options.degree, Sequence) else (options.degree,)
    if not degrees:
        raise UsageError("--degree: name one, or leave it out")
    return degrees


def _asked_budget(options: CompileOptions, *, is_plan: bool) -> Budget | None:
    """What may be lost, if a budget was named.

    Raises:
        UsageError: Something else that was asked for does not go with it.
    """
    if options.max_kl is None and options.max_perplexity_increase is None:
        return None
    if is_plan:
        option = "--max-kl" if options.max_kl is not None else "--max-ppl-increase"
        raise UsageError(
            f"{option} chooses forms by calibrating, which --plan does not: it reads no weight; leave one out"
        )
    if options.form != "kraken" or options.layers is not None:
        raise UsageError("a budget chooses the forms itself; leave --form and --layers out")
    if not options.calibrate:
        raise UsageError("a budget needs --calibrate TEXT: layers are chosen by what they cost when calibrated")
    return Budget(options.max_kl, options.max_perplexity_increase)


def _require_text_is_read(options: CompileOptions, *, is_plan: bool) -> None:
    """Refuse a text to measure on where nothing is measured: its file would not even be opened.

    Raises:
        UsageError: It is so.
    """
    given = {"--text": options.text is not None, "--text-tokens": options.text_tokens is not None}
    if is_plan:
        _refuse(given, "--plan runs no model, so no quality is measured; leave one of the two out")
    elif not options.verify and not options.calibrate:
        _refuse(given, "--no-verify measures no quality, which is what the text is for; leave one of the two out")


def _asked_machine(options: CompileOptions, *, is_plan: bool) -> Machine | None:
    """The machine whose times are predicted, if one was named.

    Raises:
        UsageError: Nothing that was asked for needs it, or something needs one.
        InputFileError: Its file cannot be read.
    """
    has_budget = options.max_kl is not None or options.max_perplexity_increase is not None
    if options.auto:
        _require_auto(options, has_budget)
    elif options.machine is not None and not is_plan and not has_budget:
        raise UsageError("--machine predicts times for --plan, for --auto, or for a budget: --max-kl")
    elif len(_asked_degrees(options)) > 1 and (options.machine is None or not is_plan):
        raise UsageError(
            "one --degree is compiled at a time; several can be compared: --plan --machine, or chosen from: --auto"
        )
    return load_machine(options.machine) if options.machine is not None else None


def _require_auto(options: CompileOptions, has_budget: bool) -> None:
    """Refuse what says otherwise than `--auto`."""
    if options.machine is None:
        raise UsageError("--auto needs a --machine, whose predicted times it goes by: a .toml file, or a name")
    _refuse(
        {
            "--form": options.form != "kraken",
            "--layers": options.layers is not None,
            "--overlap": options.overlap != AUTO,
        },
        "--auto chooses forms and overlap itself; leave one of the two out",
    )
    if options.calibrate and not has_budget:
        raise UsageError("--calibrate: without a budget (--max-kl) --auto changes no form; leave it out")


def require_no_form(options: CompileOptions) -> None:
    """A Kraken model has the form that it was trained in.

    Raises:
        UsageError: Another was asked for.
    """
    _refuse(
        {
            "--form": options.form != "kraken",
            "--layers": options.layers is not None,
            "--lanes": options.lanes is not None,
            "--calibrate": bool(options.calibrate),
            "--embedding": options.embedding != AUTO,
            "--auto": options.auto,
        },
        "a Kraken model runs in the form that it was trained in; leave it out",
    )


def require_checkable(options: CompileOptions, backends: Sequence[Backend[Any]]) -> None:
    """Make sure that what is written can be checked, if it is to be.

    Raises:
        UsageError: It cannot.
    """
    uncheckable = [backend.name for backend in backends if not backend.gives_reference]
    if options.verify and uncheckable:
        raise UsageError(
            f"nothing here can check what the backend '{uncheckable[0]}' writes; pass --no-verify to write it unchecked"
        )


def require_apart(directory: Path, dumps: Path) -> None:
    """Refuse graphs in the artifact's own directory: files that are none of its own would keep it from its place.

    Raises:
        UsageError: They would lie there.
    """
    place = resolved(dumps)
    if resolved(directory) in (place, *place.parents):
        raise UsageError(f"--dump-graphs {dumps}: is or lies in the artifact's directory; choose another one")


def _refuse(given: dict[str, bool], reason: str) -> None:
    wrong = next((name for name, is_given in given.items() if is_given), None)
    if wrong is not None:
        raise UsageError(f"{wrong}: {reason}")
