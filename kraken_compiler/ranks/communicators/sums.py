"""`MessageSums`: sums and gathers of arrays, by exchanging parts directly. Knows neither torch nor how bytes travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

A = TypeVar("A")

SHARED_BYTES = 4 << 20
"""The size from which more than two ranks add a share of a sum each."""


class Exchange(Protocol):
    """Bytes from every rank to every other; see `message_exchange.MessageExchange`."""

    def send(self, contents: Sequence[memoryview], sizes: Sequence[int]) -> Any:
        """Send every peer a part of its own; `sizes` are the bytes that will come from each in return."""

    def receive(self, sending: Any) -> list[memoryview]:
        """The parts that the peers sent, in the order of their ranks."""

    def answer(self, sending: Any, content: memoryview, sizes: Sequence[int]) -> Any:
        """Answer all peers' parts alike; `sizes` are the bytes of each peer's answer."""

    def answers(self, answering: Any) -> list[memoryview]:
        """The peers' answers, in the order of their ranks."""

    def require_sent(self, sending: Any) -> None:
        """Wait until the memory of the parts, or of the answer, is not read any more."""

    def send_only(self, content: bytes) -> None:
        """Send bytes to every peer; nothing comes in return."""

    def receive_only(self, rank: int) -> bytes:
        """The bytes that a peer sent with `send_only`."""

    def close(self) -> None:
        """Send the rest and disconnect."""


@dataclass(eq=False)
class SharedSum(Generic[A]):
    """A sum of which every rank adds a share.

    Attributes:
        sending: The other ranks' shares of this rank's part, on their way.
        part: The part as it is sent.
        dtype: The sum's element type.
        share: This rank's share of the sum, as it is sent to all others; None before it has been added.
        answering: It, on its way.
    """

    sending: Any
    part: A
    dtype: Any
    share: A | None = None
    answering: Any = None


class Handle(NamedTuple, Generic[A]):
    """A sum in flight.

    Attributes:
        sending: The part on its way, or a `SharedSum`; None if there is nothing to send, or nobody to send it to.
        part: The part as it is sent.
        dtype: The sum's element type.
    """

    sending: Any
    part: A
    dtype: Any


class MessageSums(ABC, Generic[A]):
    """Sums and gathers arrays of one kind, `A`, over the ranks.

    Every rank must call the same operations in the same order, except that waits may come in any order. A sum is in
    flight from `start` to `wait`; any number may be. One thread at a time.

    Parts are added in the order of the ranks and in the array's dtype, so all ranks get the same bits. A rank sends
    its part to all others: (N-1) times the payload. Large sums of more than two ranks are added in shares: a rank gets
    its share of all parts, adds it, and sends it to all; 2 (N-1) / N times the payload, of which half is on its way
    before `wait`. Whatever a rank waits for, it first adds its shares of what was begun before: a peer may wait for
    them.

    Attributes:
        rank: This rank's number, which is its lane's.
        degree: Number of ranks.
        reduce_dtype: To which every rank rounds its part of a sum before it is sent; None sends it as it is.
        identical_on_all_ranks: True: a sum is the same on all ranks to the last bit.
    """

    identical_on_all_ranks = True

    def __init__(self, rank: int, degree: int, exchange: Exchange | None, reduce_dtype: Any = None) -> None:
        """Use existing connections.

        Args:
            rank: This one.
            degree: How many there are.
            exchange: Connects them; None for a single one.
            reduce_dtype: To which parts are rounded before they are sent; None leaves them.
        """
        assert (exchange is None) == (degree == 1), "ranks need connections if there are several"
        self.rank, self.degree, self.reduce_dtype = rank, degree, reduce_dtype
        self._exchange = exchange
        self._unanswered_sums: deque[SharedSum[A]] = deque()

    @abstractmethod
    def _contiguous(self, x: A, dtype: Any = None) -> A:
        """An array in one piece; numbers with fractions are rounded to `dtype` if that is the smaller type."""

    @abstractmethod
    def _bytes(self, x: A) -> memoryview:
        """The memory of a contiguous array."""

    @abstractmethod
    def _flat(self, x: A) -> A:
        """A contiguous array as a flat one, of the same memory."""

    @abstractmethod
    def _shaped(self, flat: A, like: A) -> A:
        """A flat array in the shape of another, of the same memory."""

    @abstractmethod
    def _view(self, memory: memoryview, like: A) -> A:
        """Memory as a flat array with the element type of another."""

    @abstractmethod
    def _empty(self, like: A, dtype: Any) -> A:
        """A new array with the shape of another."""

    @abstractmethod
    def _add(self, parts: Sequence[A], out: A) -> None:
        """Add flat arrays, one after the other, in the element type of the flat array that takes the sum."""

    @abstractmethod
    def _join(self, parts: Sequence[A], like: A, dim: int) -> A:
        """Flat arrays, each shaped as another, one behind the other along `dim`."""

    def start(self, x: A) -> Handle[A]:
        """Begin the sum of `x` over the ranks.

        Args:
            x: This rank's part, same shape and dtype on all ranks. It must not change until `wait` returns.

        Returns:
            A handle, to be given to `wait` once.

        Raises:
            RankFailedError: A peer went away.
        """
        part = self._contiguous(x, self.reduce_dtype)
        dtype: Any = x.dtype  # type: ignore[attr-defined]
        content = self._bytes(part)
        if self.degree <= 2 or len(content) < SHARED_BYTES:
            return Handle(self._send(content), part, dtype)
        shares = self._shares(part)
        share_bytes = len(content[shares[self.rank]])
        parts = [content[share] for rank, share in enumerate(shares) if rank != self.rank]
        shared = SharedSum(self._open().send(parts, [share_bytes] * len(parts)), part, dtype)
        self._unanswered_sums.append(shared)
        return Handle(shared, part, dtype)

    def wait(self, handle: Handle[A]) -> A:
        """The finished sum.

        Args:
            handle: What `start` returned.

        Returns:
            The sum, with the shape and dtype of the part; it shares no memory with the part.

        Raises:
            RankFailedError: A peer went away or did not answer in time.
        """
        sending, part, dtype = handle
        if isinstance(sending, SharedSum):
            total = self._empty(part, dtype)
            self._settle(sending)
            self._join_shares(sending, total)
            return total
        if sending is None:
            return self._sum([], part, dtype)
        exchange = self._open()
        total = self._sum(exchange.receive(sending), part, dtype)
        exchange.require_sent(sending)
        return total

    def all_gather(self, x: A, dim: int) -> A:
        """Concatenate the ranks' parts along `dim`, rank 0 first; `degree` times as long there. Never rounded.

        Args:
            x: This rank's part, same shape and dtype on all ranks.
            dim: May count from the end.

        Raises:
            RankFailedError: A peer went away or did not answer in time.
        """
        part = self._contiguous(x)
        sending = self._send(self._bytes(part))
        self._settle()
        if sending is None:
            return self._join([self._flat(part)] * self.degree, part, dim)
        whole = self._join(self._all_parts(self._open().receive(sending), part), part, dim)
        self._open().require_sent(sending)
        return whole

    def close(self) -> None:
        """Disconnect; a second call does nothing. It cannot be used afterwards."""
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def _open(self) -> Exchange:
        assert self._exchange is not None, "there are no peers, or this was closed"
        return self._exchange

    def _send(self, content: memoryview) -> Any:
        """Send a part to every peer; None if there is nothing to send, or nobody to send it to."""
        if self.degree == 1 or not len(content):
            return None
        peers = self.degree - 1
        return self._open().send([content] * peers, [len(content)] * peers)

    def _sum(self, contents: Sequence[memoryview], part: A, dtype: Any) -> A:
        """This rank's part and those of the others, added in the order of the ranks.

        In the memory of the first peer's part, which is one of the first two, if its element type is the sum's: it was
        written just now, and new memory would have to be mapped.
        """
        parts = self._all_parts(contents, part)
        in_place = contents and part.dtype == dtype  # type: ignore[attr-defined]
        total = self._shaped(parts[0 if self.rank else 1], part) if in_place else self._empty(part, dtype)
        self._add(parts, self._flat(total))
        return total

    def _all_parts(self, contents: Sequence[memoryview], own_part: A) -> list[A]:
        """All ranks' parts, flat, rank 0's first; one's own alone if nothing was sent."""
        others = [self._view(memory, own_part) for memory in contents]
        return [*others[: self.rank], self._flat(own_part), *others[self.rank :]]

    def _shares(self, part: A) -> list[slice]:
        """Every rank's share of a part, in bytes."""
        item = int(part.dtype.itemsize)  # type: ignore[attr-defined]
        elements = len(self._bytes(part)) // item
        ends = [elements * rank // self.degree * item for rank in range(self.degree + 1)]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def _settle(self, last: SharedSum[A] | None = None) -> None:
        """Add this rank's share of sums, in the order of their starts, and send it to the others.

        Args:
            last: Up to this one, which may be settled; None settles all.
        """
        while self._unanswered_sums and (last is None or last.share is None):
            shared = self._unanswered_sums.popleft()
            shares = self._shares(shared.part)
            own_part = self._view(self._bytes(shared.part)[shares[self.rank]], shared.part)
            own_share = self._empty(own_part, shared.dtype)
            self._add(self._all_parts(self._open().receive(shared.sending), own_part), own_share)
            shared.share = self._contiguous(own_share, self.reduce_dtype)
            sizes = [share.stop - share.start for rank, share in enumerate(shares) if rank != self.rank]
            shared.answering = self._open().answer(shared.sending, self._bytes(shared.share), sizes)

    def _join_shares(self, shared: SharedSum[A], total: A) -> None:
        """Concatenate all ranks' shares of a sum."""
        own_share = shared.share
        assert own_share is not None, "it was settled"
        others = [self._view(memory, own_share) for memory in self._open().answers(shared.answering)]
        flat_total, begins = self._flat(total), 0
        for share in (*others[: self.rank], own_share, *others[self.rank :]):
            ends = begins + len(share)  # type: ignore[arg-type]
            self._add([share], flat_total[begins:ends])  # type: ignore[index]
            begins = ends
        self._open().require_sent(shared.sending)
        self._open().require_sent(shared.answering)
