"""The schedule of a model's forms: every branch's read, every reduce, its start, its wait and its window."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NO_OVERLAP, TOKENS, ROWS, AUTO = OVERLAPS = ("none", "tokens", "rows", "auto")
"""What is cut into two halves, each of which hides the other's reduces: nothing, a prefill's tokens, a batch's rows."""


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
        first, last: The branches whose partial outputs it sums, inclusive, 1-based. None, `first` = `last` + 1, where
            it sums the rows of an embedding that lanes looked up, for a stream that begins behind branch `last`.
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

    @property
    def is_lookup(self) -> bool:
        """True if it sums no branches' outputs, but the rows of an embedding."""
        return self.first > self.last


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
    """The operations that lie between a reduce's start and its wait in a program.

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


@dataclass(frozen=True)
class RanNode:
    """A node that a runtime executed, after its own optimizations: it may stand for several nodes of the program.

    Attributes:
        name: Its name; one that a runtime put together from several says so itself.
        op: Its op type.
        microseconds: How long it took.
    """

    name: str
    op: str
    microseconds: float


@dataclass(frozen=True)
class RanWindow:
    """The operations that one rank ran in a reduce's window.

    Attributes:
        window: What the program promises.
        start_us: When its start ended, microseconds after the run began.
        products: The matrix products that ran between its start and its wait, in that order.
        attentions: The attentions likewise.
        wait_us: How long the rank waited, in microseconds.
    """

    window: Window
    start_us: float
    products: tuple[RanNode, ...]
    attentions: tuple[RanNode, ...]
    wait_us: float

    @property
    def hiding_us(self) -> float:
        """Microseconds of products and attentions that the sum had to hide behind."""
        return sum(node.microseconds for node in (*self.products, *self.attentions))

    def to_dict(self) -> dict[str, Any]:
        """The window as plain values."""
        return {
            "start_us": self.start_us,
            "products": [asdict(node) for node in self.products],
            "attentions": [asdict(node) for node in self.attentions],
            "wait_us": self.wait_us,
        }
