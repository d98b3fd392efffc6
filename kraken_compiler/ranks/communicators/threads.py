"""Ranks that are threads of one process, for measuring and testing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from kraken_compiler.errors import RankFailedError

Result = TypeVar("Result")

_PART, _ANSWER = "part", "answer"


@dataclass
class Mailboxes:
    """The messages that threads have left for each other.

    Attributes:
        degree: How many threads there are.
        contents: By sender, receiver, kind and number.
        failed: True once a thread has ended with an error: nobody waits for it.
    """

    degree: int
    contents: dict[Hashable, bytes | bytearray] = field(default_factory=dict)
    failed: bool = False
    condition: threading.Condition = field(default_factory=threading.Condition)

    def leave(self, key: Hashable, content: bytes | bytearray) -> None:
        """Leave a message for another thread."""
        with self.condition:
            self.contents[key] = content
            self.condition.notify_all()

    def take(self, key: Hashable) -> bytes | bytearray:
        """Take a message of another thread, which may still have to leave it.

        Raises:
            RankFailedError: A thread has failed.
        """
        with self.condition:
            self.condition.wait_for(lambda: self.failed or key in self.contents)
            if key not in self.contents:
                raise RankFailedError("another rank of this process failed")
            return self.contents.pop(key)

    def fail(self) -> None:
        """End all waits with an error."""
        with self.condition:
            self.failed = True
            self.condition.notify_all()


class ThreadSending(NamedTuple):
    """Parts that were left for the peers, and what they leave in return; see `message_exchange.Sending`."""

    numbers: list[int]
    own_numbers: list[int]
    sizes: Sequence[int]


class ThreadExchange:
    """The exchange of one thread, as `message_exchange.MessageExchange` is a process's."""

    def __init__(self, mailboxes: Mailboxes, rank: int) -> None:
        self._mailboxes, self._rank = mailboxes, rank
        self._peers = [peer for peer in range(mailboxes.degree) if peer != rank]
        self._messages_sent: Counter[int] = Counter()
        self._messages_expected: Counter[int] = Counter()

    def send(self, contents: Sequence[memoryview], sizes: Sequence[int]) -> ThreadSending:
        """Leave every peer a part of its own."""
        numbers = [self._next(peer) for peer in self._peers]
        own_numbers = [self._leave(peer, bytearray(content)) for peer, content in zip(self._peers, contents)]
        return ThreadSending(numbers, own_numbers, sizes)

    def receive(self, sending: ThreadSending) -> list[memoryview]:
        """The parts that the peers left, in the order of their ranks.

        Raises:
            RankFailedError: A thread has failed, or left something of another size.
        """
        return self._take(_PART, sending.numbers, sending.sizes)

    def answer(self, sending: ThreadSending, content: memoryview, sizes: Sequence[int]) -> ThreadSending:
        """Leave all peers the same answer to their parts."""
        for peer, number in zip(self._peers, sending.numbers):
            self._mailboxes.leave((self._rank, peer, _ANSWER, number), bytearray(content))
        return sending._replace(sizes=sizes)

    def answers(self, answering: ThreadSending) -> list[memoryview]:
        """The peers' answers, in the order of their ranks; see `receive`."""
        return self._take(_ANSWER, answering.own_numbers, answering.sizes)

    def _take(self, kind: str, numbers: Sequence[int], sizes: Sequence[int]) -> list[memoryview]:
        contents = [
            self._mailboxes.take((peer, self._rank, kind, number)) for peer, number in zip(self._peers, numbers)
        ]
        for peer, content, size in zip(self._peers, contents, sizes):
            if len(content) != size:
                raise RankFailedError(f"rank {peer} sent {len(content)} bytes where rank {self._rank} has {size}")
        return [memoryview(content) for content in contents]

    def require_sent(self, sending: ThreadSending) -> None:
        """Nothing to wait for: what is left is a copy."""

    def send_only(self, content: bytes) -> None:
        """Leave bytes for every peer; nothing comes in return."""
        for peer in self._peers:
            self._leave(peer, content)

    def receive_only(self, rank: int) -> bytes:
        """The bytes that a peer left with `send_only`."""
        return bytes(self._mailboxes.take((rank, self._rank, _PART, self._next(rank))))

    def close(self) -> None:
        """Nothing to give back."""

    def _next(self, peer: int) -> int:
        self._messages_expected[peer] += 1
        return self._messages_expected[peer]

    def _leave(self, peer: int, content: bytes | bytearray) -> int:
        self._messages_sent[peer] += 1
        self._mailboxes.leave((self._rank, peer, _PART, self._messages_sent[peer]), content)
        return self._messages_sent[peer]


def in_threads(mailboxes: Mailboxes, act: Callable[[int], Result]) -> list[Result]:
    """Call `act` in one thread per rank; returns what they return, rank 0 first.

    Raises:
        Exception: What the first rank that failed raised.
    """
    failures: list[BaseException] = []

    def guarded(rank: int) -> Result:
        try:
            return act(rank)
        except BaseException as error:
            failures.append(error)
            mailboxes.fail()
            raise

    with ThreadPoolExecutor(mailboxes.degree) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(mailboxes.degree)]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
