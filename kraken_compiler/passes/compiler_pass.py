"""The interface of passes.

A pass is a frozen dataclass whose fields are its options. It says which stage of a program it works on, changes the
program it is given, and returns a `PassResult`. It neither prints nor times nor raises for an unsupported model: a
part it cannot handle is a `Rejection` in the result. The runner in `manager.py` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program


@dataclass(frozen=True)
class PassResult:
    """The outcome of a pass.

    Attributes:
        matches: How many places it changed, or found if it is an analysis.
        rejections: Why parts of the model cannot be handled; any of them stops the compile.
        program: The program at its next stage, if the pass leads there; None if it is the one that was given.
        near: Why places that look much like what the pass matches are something else. They stay as they are.
    """

    matches: int = 0
    rejections: tuple[Rejection, ...] = ()
    program: Program | None = None
    near: tuple[Rejection, ...] = ()

    @classmethod
    def of(cls, outcomes: Iterable[bool | Rejection]) -> PassResult:
        """The result of a matcher from its outcomes, place by place: whether it fired, or why it nearly did."""
        every = tuple(outcomes)
        return cls(
            sum(outcome is True for outcome in every),
            near=tuple(outcome for outcome in every if isinstance(outcome, Rejection)),
        )


ProgramT = TypeVar("ProgramT", bound=Program, contravariant=True)


class Pass(ABC, Generic[ProgramT]):
    """Base class of all passes on programs of one stage or a later one."""

    name: ClassVar[str]
    """Kebab-case verb phrase, unique in a pipeline."""
    requires: ClassVar[type[Program]] = Program
    """That stage."""

    @abstractmethod
    def run(self, program: ProgramT) -> PassResult:
        """Work on `program` in place. Called again on its own output, it must change nothing."""
