"""`Exchange`: bytes from every rank to every other, over ZeroMQ, whose own thread moves them. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import zmq

from kraken_compiler.communicators.peers import Swap, connect_peers
from kraken_compiler.errors import RankFailedError

COPY_BYTES = 128 << 10
"""Below this a part is copied into the message; from here on it is sent from where it lies."""


class Sending(NamedTuple):
    """A part on its way to all peers, and what comes from them in return.

    Attributes:
        numbers: Of the peers' messages, in the order of the peers.
        nbytes: Size of the part, and of the peers' parts.
        trackers: Know whether the part's memory is still read, in the order of the peers; none if it was copied.
    """

    numbers: list[int]
    nbytes: int
    trackers: list[zmq.MessageTracker]


class Exchange:
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

    def send(self, content: Any, nbytes: int) -> Sending:
        """Send a part to every peer.

        Args:
            content: A buffer. It must not change until `require_sent` returns.
            nbytes: Its size.

        Raises:
            RankFailedError: A peer is gone.
        """
        numbers = [peer.expect() for peer in self._peers]
        if nbytes < COPY_BYTES:
            self.send_only(content)
            return Sending(numbers, nbytes, [])
        # A frame for each, because only then it is known who did not take it.
        frames = [zmq.Frame(content, track=True, copy=False, copy_threshold=0) for _ in self._peers]
        self._send_all(frames, copy=False)
        return Sending(numbers, nbytes, [frame.tracker for frame in frames])

    def receive(self, sending: Sending) -> list[zmq.Frame]:
        """The peers' parts, in the order of their ranks, in the memory of their messages.

        Raises:
            RankFailedError: A peer is gone, sent nothing in time, or sent a part of another size.
        """
        frames = [peer.frame(number) for peer, number in zip(self._peers, sending.numbers)]
        for peer, frame in zip(self._peers, frames):
            if len(frame) != sending.nbytes:
                raise RankFailedError(
                    f"rank {peer.rank} sent {len(frame)} bytes where rank {self._rank} has {sending.nbytes}; "
                    f"the ranks do not run the same program on inputs of the same shape"
                )
        return frames

    def require_sent(self, sending: Sending) -> None:
        """Wait until the part's memory is not read any more.

        Raises:
            RankFailedError: A peer is gone, or did not take it in time.
        """
        for peer, tracker in zip(self._peers, sending.trackers):
            peer.require_taken(tracker)

    def send_only(self, content: Any) -> None:
        """Send a copy of a buffer to every peer, which takes it with `receive_only`; nothing comes in return.

        Raises:
            RankFailedError: A peer is gone.
        """
        self._send_all([content] * len(self._peers), copy=True)

    def receive_only(self, rank: int) -> bytes:
        """What a peer sent with `send_only`.

        Raises:
            RankFailedError: The peer is gone, or sent nothing in time.
        """
        peer = next(peer for peer in self._peers if peer.rank == rank)
        return peer.frame(peer.expect()).bytes

    def _send_all(self, contents: Sequence[Any], copy: bool) -> None:
        failure: RankFailedError | None = None
        for peer, content in zip(self._peers, contents):
            try:
                peer.send(content, copy)
            except RankFailedError as error:
                # The others get their part all the same, so that they miss the rank that is gone, and not this one.
                failure = failure or error
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Send what is left and disconnect. It cannot be used afterwards."""
        in_failure = any(peer.failed for peer in self._peers)
        for peer in self._peers:
            peer.close(in_failure)
        self._peers = []
        self._context.term()
