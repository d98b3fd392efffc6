"""What a form means for a model: every branch's read, every reduce, its start, its wait and its window."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Read:
    """Read of branch `branch`: G[peers] + (O^i[own] - O^i[peers]), points counted in contributed branches."""

    branch: int
    own: int
    peers: int


@dataclass(frozen=True)
class Reduce:
    """One all-reduce.

    Attributes:
        index: Number in launch order, 0-based.
        first, last: The branches whose partial outputs it sums, inclusive, 1-based.
        awaited_by: The branch whose read needs the sum first; None when only the model's end needs it.
        window: The branches that run between its start and its wait.
        bytes_per_token: Payload per token of the batch.
    """

    index: int
    first: int
    last: int
    awaited_by: int | None
    window: tuple[int, ...]
    bytes_per_token: int = 0

    @property
    def is_inside(self) -> bool:
        """True if its own branch awaits it: the means of norms over split columns."""
        return self.awaited_by == self.last


@dataclass(frozen=True)
class FormPlan:
    """The forms of all layers and what was derived from them.

    Attributes:
        forms: Form name of every layer.
        reads: One per branch, in order.
        reduces: In launch order.
    """

    forms: tuple[str, ...]
    reads: tuple[Read, ...]
    reduces: tuple[Reduce, ...]


@dataclass(frozen=True)
class Window:
    """What really lies between a reduce's start and its wait in a program.

    Attributes:
        reduce: Number of the reduce.
        start, wait: Node names.
        gemms: Names of the matrix multiplications and attentions between them.
        promised: The branches the plan says the window holds.
    """

    reduce: int
    start: str
    wait: str
    gemms: tuple[str, ...]
    promised: tuple[int, ...]
