"""`MessageExchange`: bytes from every rank to every other, over ZeroMQ, whose own thread moves them. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import zmq

from kraken_compiler.errors import RankFailedError
from kraken_compiler.ranks.communicators.peers import Peer, Swap, connect_peers

COPY_BYTES = 128 << 10
"""The size from which a part is sent from where it lies; smaller ones are copied into the message."""


class Sending(NamedTuple):
    """Parts on their way to all peers, and what comes from them in return.

    Attributes:
        numbers: Of the peers' messages, in the order of the peers.
        own_numbers: Of one's own messages to them.
        sizes: Bytes that come from each of them.
        trackers: Know whether the parts' memory is still read, in the order of the peers; none if it was copied.
    """

    numbers: list[int]
    own_numbers: list[int]
    sizes: Sequence[int]
    trackers: list[zmq.MessageTracker]


class Answering(NamedTuple):
    """Answers on their way to all peers, and theirs in return; see `Sending`.

    Attributes:
        own_numbers: Of one's own messages, which the peers answer.
        sizes: Bytes of the peers' answers.
        trackers: See `Sending`.
    """

    own_numbers: list[int]
    sizes: Sequence[int]
    trackers: list[zmq.MessageTracker]


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
        self._timeout = timeout
        # Not the process's own context: ours must be gone when the ranks part.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._peers = connect_peers(self._context, rank, degree, host, swap, timeout)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def send(self, contents: Sequence[memoryview], sizes: Sequence[int]) -> Sending:
        """Send every peer a part of its own.

        Args:
            contents: Buffers of bytes, in the order of the peers. They must not change until `require_sent` returns.
            sizes: Bytes that will come from each peer in return.

        Raises:
            RankFailedError: A peer is gone.
        """
        numbers = [peer.expect() for peer in self._peers]
        own_numbers: list[int] = []
        trackers = self._send_all(contents, lambda peer, content, copy: own_numbers.append(peer.send(content, copy)))
        return Sending(numbers, own_numbers, sizes, trackers)

    def receive(self, sending: Sending) -> list[memoryview]:
        """The parts that the peers sent, in the order of their ranks, in the memory of their messages.

        Raises:
            RankFailedError: A peer is gone, sent nothing in time, or sent a part of another size.
        """
        frames = [peer.frame(number) for peer, number in zip(self._peers, sending.numbers)]
        return self._buffers(frames, sending.sizes)

    def _buffers(self, frames: Sequence[zmq.Frame], sizes: Sequence[int]) -> list[memoryview]:
        """The memory of messages that must have sizes.

        Raises:
            RankFailedError: One has another.
        """
        for peer, frame, size in zip(self._peers, frames, sizes):
            if len(frame) != size:
                raise RankFailedError(
                    f"rank {peer.rank} sent {len(frame)} bytes where rank {self._rank} has {size}; "
                    f"the ranks do not run the same program on inputs of the same shape"
                )
        return [frame.buffer for frame in frames]

    def answer(self, sending: Sending, content: memoryview, sizes: Sequence[int]) -> Answering:
        """Answer all peers' parts alike; see `send`. Answers may be given in another order than their parts were sent.

        Args:
            sending: One's own parts, which the peers will answer, too.
            content: Bytes, which must not change until `require_sent` returns.
            sizes: Bytes of each peer's answer.
        """
        numbers = dict(zip(self._peers, sending.numbers))
        trackers = self._send_all(
            [content] * len(self._peers), lambda peer, part, copy: peer.answer(numbers[peer], part, copy)
        )
        return Answering(sending.own_numbers, sizes, trackers)

    def answers(self, answering: Answering) -> list[memoryview]:
        """The peers' answers, in the order of their ranks; see `receive`."""
        frames = [peer.answer_frame(number) for peer, number in zip(self._peers, answering.own_numbers)]
        return self._buffers(frames, answering.sizes)

    def require_sent(self, sending: Sending | Answering) -> None:
        """Wait until the part's memory is not read any more.

        Raises:
            RankFailedError: A peer is gone, or did not take it in time.
        """
        for peer, tracker in zip(self._peers, sending.trackers):
            peer.require_taken(tracker)

    def send_only(self, content: bytes) -> None:
        """Send bytes to every peer, which takes them with `receive_only`; nothing comes in return.

        Raises:
            RankFailedError: A peer is gone.
        """
        self._to_all([content] * len(self._peers), lambda peer, part: peer.send(part))

    def receive_only(self, rank: int) -> bytes:
        """The bytes that a peer sent with `send_only`.

        Raises:
            RankFailedError: The peer is gone, or sent nothing in time.
        """
        peer = next(peer for peer in self._peers if peer.rank == rank)
        return peer.frame(peer.expect()).bytes

    def _send_all(
        self, contents: Sequence[memoryview], send: Callable[[Peer, Any, bool], None]
    ) -> list[zmq.MessageTracker]:
        """Send every peer its part: small ones as copies, large ones from where they lie; these are tracked."""
        if max((len(content) for content in contents), default=0) < COPY_BYTES:
            self._to_all(contents, lambda peer, content: send(peer, content, True))
            return []
        # A frame for each, because only then it is known who did not take it.
        frames = [zmq.Frame(content, track=True, copy=False, copy_threshold=0) for content in contents]
        self._to_all(frames, lambda peer, frame: send(peer, frame, False))
        return [frame.tracker for frame in frames]

    def _to_all(self, contents: Sequence[Any], send: Callable[[Peer, Any], object]) -> None:
        failure: RankFailedError | None = None
        for peer, content in zip(self._peers, contents):
            try:
                send(peer, content)
            except RankFailedError as error:
                # The others get their part all the same, so that they miss the rank that is gone, and not this one.
                failure = failure or error
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Send the rest and disconnect. It cannot be used afterwards."""
        in_failure = any(peer.failed for peer in self._peers)
        for peer in self._peers:
            peer.close(in_failure)
        self._peers = []
        self._context.term()
