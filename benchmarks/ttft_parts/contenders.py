"""Who competes: a family (what is computed, by whom) in a mode: eager, compiled, eager over gloo, or by ONNX Runtime.

The peers know gloo only; ours on gloo shows what of the difference is the communicator's.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

TP_PLAN = "tp_plan"
DTENSOR = "dtensor"
BOUND = "bound"
SINGLE = "single"
NATIVE = "native"
"""A Kraken model of the paper's own kind beside the standard one, see `Workload.write_native`."""
PEERS = (TP_PLAN, DTENSOR)
FORMS = ("standard", "kraken", "ladder", "delayed", "sync-drop")
SPLIT = "+split"
"""Behind a form: prefills run as two halves of the tokens, whose reduces fly while the other half computes."""
SPLITS = tuple(form + SPLIT for form in ("standard", "kraken", "sync-drop"))
MODES = ("eager", "compiled", "gloo", "ort")

MEANING = {
    TP_PLAN: 'transformers, loaded with tp_plan="auto"; eager with a DynamicCache, compiled with a StaticCache',
    DTENSOR: "torch's parallelize_module (DTensor) on transformers' model; the same two caches",
    **{form: f"ours, {form} form" for form in FORMS},
    **{split: f"ours, {split.removesuffix(SPLIT)} form, prefills in two halves" for split in SPLITS},
    BOUND: "ours, kraken form with the collectives removed: wrong numbers, the time no communication could beat",
    NATIVE: "ours, a Kraken model as the paper has it, of as many parameters: another model, with random weights",
    SINGLE: "ours, standard form at degree 1: one process on one core, on the longest prompt only",
}


@dataclass(frozen=True)
class Contender:
    """One column of the comparison."""

    family: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.family}/{self.mode}"

    @property
    def form(self) -> str | None:
        """The form to compile for it; None if it is not ours. What is native has no other than its own."""
        form = None if self.family in PEERS else self.family.removesuffix(SPLIT)
        return {BOUND: "kraken", SINGLE: "standard"}.get(self.family, form)

    @property
    def split(self) -> bool:
        """Its prefills run as two halves."""
        return self.family.endswith(SPLIT)

    @property
    def artifact(self) -> str | None:
        """What tells its artifact from the others of a dtype; None if it has none."""
        return SINGLE if self.alone else self.form

    @property
    def alone(self) -> bool:
        """It runs on rank 0, without the others."""
        return self.family == SINGLE

    @property
    def checkable(self) -> bool:
        """The bound never adds up its parts, so there is nothing its numbers could be compared with."""
        return self.family != BOUND


# In the order of running; those that are compared most closely are neighbours.
ALL = (
    *(Contender(family, mode) for family in PEERS for mode in ("eager", "compiled")),
    *(
        Contender(family, mode)
        for mode in ("eager", "compiled")
        for family in ("standard", *SPLITS[:2], "kraken", BOUND)
    ),
    *(
        Contender(family, mode)
        for family in ("ladder", "delayed", "sync-drop", SPLITS[2], NATIVE)
        for mode in ("eager", "compiled")
    ),
    *(Contender(family, "gloo") for family in ("standard", "kraken")),
)
ONNX = tuple(Contender(family, "ort") for family in (SINGLE, "standard", *SPLITS[:2], "kraken", BOUND))
"""Those of `benchmarks/onnx.py`, whose ranks have no torch."""


def chosen(patterns: list[str], among: Sequence[Contender] = ALL) -> tuple[Contender, ...]:
    """The contenders that match any pattern: a name, a family, or a shell pattern such as `kraken/*`.

    Raises:
        ValueError: A pattern matches nothing.
    """
    for pattern in patterns:
        if not any(_matches(contender, pattern) for contender in among):
            raise ValueError(f"no contender matches '{pattern}'; there are {', '.join(one.name for one in among)}")
    return tuple(contender for contender in among if any(_matches(contender, pattern) for pattern in patterns))


def named(name: str) -> Contender:
    return next(contender for contender in (*ALL, *ONNX) if contender.name == name)


def rotated(contenders: list[Contender], repetition: int) -> list[Contender]:
    """The order of one repetition: nobody always runs after the same neighbour's caches, or always first."""
    start = repetition % max(1, len(contenders))
    return contenders[start:] + contenders[:start]


def _matches(contender: Contender, pattern: str) -> bool:
    return contender.family == pattern or fnmatch.fnmatchcase(contender.name, pattern)
