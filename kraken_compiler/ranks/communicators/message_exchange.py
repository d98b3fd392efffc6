"""`MessageExchange`: bytes from every rank to every other. Knows no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from kraken_compiler.errors import RankFailedError
from kraken_compiler.ranks.communicators.connection import Remainder
from kraken_compiler.ranks.communicators.mover import Mover
from kraken_compiler.ranks.communicators.peers import Exchanged, Peer, Swap, connect_peers

_LINGER_SECONDS = 10.0
"""The longest that closing waits for peers to take the rest."""
_LINGER_SECONDS_IN_FAILURE = 0.5

Result = TypeVar("Result")


class Sending(NamedTuple):
    """Parts on their way to all peers, and what comes from them in return.

    Attributes:
        parts: In the order of the peers.
        sizes: Bytes that come from each of them.
    """

    parts: list[Exchanged]
    sizes: Sequence[int]

    @property
    def remainders(self) -> list[Remainder | None]:
        """What is sent later of the parts, in the order of the peers; None if that is nothing."""
        return [part.remainder for part in self.parts]


class Answering(NamedTuple):
    """Answers on their way to all peers, and theirs in return.

    Attributes:
        sending: One's own parts, which the peers answer.
        sizes: Bytes of the peers' answers.
        remainders: What is sent later of one's own answers, in the order of the peers; None if that is nothing.
    """

    sending: Sending
    sizes: Sequence[int]
    remainders: list[Remainder | None]


class MessageExchange:
    """Connections to all peers.

    All ranks must call the same methods in the same order, except that `receive` may come in any order and at any time
    after its `send`. One thread at a time.
    """

    def __init__(self, rank: int, degree: int, host: str, swap: Swap, timeout: float) -> None:
        """Connect; all ranks must do so together.

        Args:
            rank: This one.
            degree: How many there are.
            host: Address or interface at which peers reach this rank.
            swap: How the ranks tell each other where they are.
            timeout: Seconds without an answer after which a peer counts as dead.

        Raises:
            RankFailedError: A peer did not connect in time, or someone else did.
            UsageError: The ranks cannot reach each other at these addresses.
        """
        self._rank = rank
        self._mover = Mover()
        self._peers = connect_peers(rank, degree, host, swap, timeout, self._mover)

    def send(self, contents: Sequence[memoryview], sizes: Sequence[int]) -> Sending:
        """Send every peer a part of its own.

        Args:
            contents: Buffers of bytes, in the order of the peers. They must not change until `require_sent` returns.
            sizes: Bytes that will come from each peer in return.

        Raises:
            RankFailedError: A peer is gone.
        """
        return Sending(self._with_all(Peer.exchange, contents, sizes), sizes)

    def receive(self, sending: Sending) -> list[memoryview]:
        """The parts that the peers sent, in the order of their ranks, in the memory of their messages.

        Raises:
            RankFailedError: A peer is gone, sent nothing in time, or sent a part of another size.
        """
        contents = [
            peer.message(part.number, size) for peer, part, size in zip(self._peers, sending.parts, sending.sizes)
        ]
        self._require_sizes(contents, sending.sizes)
        return contents

    def _require_sizes(self, contents: Sequence[memoryview], sizes: Sequence[int]) -> None:
        """Make sure that messages are as large as they should be.

        Raises:
            RankFailedError: One is not.
        """
        for peer, content, size in zip(self._peers, contents, sizes):
            if len(content) != size:
                raise RankFailedError(
                    f"rank {peer.rank} sent {len(content)} bytes where rank {self._rank} has {size}; "
                    f"the ranks do not run the same program on inputs of the same shape"
                )

    def answer(self, sending: Sending, content: memoryview, sizes: Sequence[int]) -> Answering:
        """Answer all peers' parts alike; see `send`. Answers may be given in another order than their parts were sent.

        Args:
            sending: One's own parts, which the peers will answer, too.
            content: Bytes, which must not change until `require_sent` returns.
            sizes: Bytes of each peer's answer.
        """
        numbers = [part.number for part in sending.parts]
        return Answering(sending, sizes, self._with_all(Peer.answer, numbers, [content] * len(self._peers), sizes))

    def answers(self, answering: Answering) -> list[memoryview]:
        """The peers' answers, in the order of their ranks; see `receive`."""
        contents = [
            peer.answer_to(part.own_number, size)
            for peer, part, size in zip(self._peers, answering.sending.parts, answering.sizes)
        ]
        self._require_sizes(contents, answering.sizes)
        return contents

    def require_sent(self, sending: Sending | Answering) -> None:
        """Wait until the memory of the parts, or of the answer, is not read any more.

        Raises:
            RankFailedError: A peer is gone, or did not take it in time.
        """
        for peer, remainder in zip(self._peers, sending.remainders):
            if remainder is not None:
                peer.require_taken(remainder)

    def send_only(self, content: bytes) -> None:
        """Send bytes to every peer, which takes them with `receive_only`; nothing comes in return.

        Raises:
            RankFailedError: A peer is gone.
        """
        self._with_all(Peer.send, [content] * len(self._peers))

    def receive_only(self, rank: int) -> bytes:
        """The bytes that a peer sent with `send_only`.

        Raises:
            RankFailedError: The peer is gone, or sent nothing in time.
        """
        peer = next(peer for peer in self._peers if peer.rank == rank)
        return bytes(peer.next_message())

    def _with_all(self, act: Callable[..., Result], *arguments: Sequence[Any]) -> list[Result]:
        """Act on every peer, with its own arguments; returns what came of it, in their order."""
        failure: RankFailedError | None = None
        results = []
        for peer, *own_arguments in zip(self._peers, *arguments):
            try:
                results.append(act(peer, *own_arguments))
            except RankFailedError as error:
                # The others get their part all the same, so that they miss the rank that is gone, and not this one.
                failure = failure or error
        if failure is not None:
            raise failure
        return results

    def close(self) -> None:
        """Send the rest and disconnect. It cannot be used afterwards."""
        in_failure = any(peer.failed for peer in self._peers)
        # In a failure only for a moment, since peers may have stopped to listen.
        deadline = time.monotonic() + (_LINGER_SECONDS_IN_FAILURE if in_failure else _LINGER_SECONDS)
        for peer in self._peers:
            peer.flush(deadline)
        if in_failure:
            for peer in self._peers:
                peer.drain(deadline + _LINGER_SECONDS_IN_FAILURE)
        self._mover.close()
        for peer in self._peers:
            peer.close()
        self._peers = []
