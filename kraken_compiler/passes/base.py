"""What a pass is.

A pass is a frozen dataclass whose fields are its options. It says which facts of the program it `requires`, works on
the program it is given, and returns a `PassResult`. It neither prints nor times nor raises for an unsupported model: a
part it cannot handle is a `Rejection` in the result. The runner in `manager.py` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        matches: How many places it changed, or found if it is an analysis.
        rejections: Why parts of the model cannot be handled; any of them stops the compile.
    """

    matches: int = 0
    rejections: tuple[Rejection, ...] = ()


class Pass(ABC):
    """Base class of all passes."""

    name: ClassVar[str]
    """Kebab-case verb phrase, unique in a pipeline."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Attributes of `Program` that must be set before the pass runs, e.g. "layers"."""
    ensures: ClassVar[tuple[str, ...]] = ()
    """Attributes of `Program` that are set after it ran."""

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Work on `program` in place. Called again on its own output, it must change nothing."""
