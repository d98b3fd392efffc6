"""The connections to a rank's peers: one message socket to each. Knows no torch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import zmq

from kraken_compiler.errors import RankFailedError, UsageError
from kraken_compiler.ranks.communicators.addresses import is_loopback, network_id

_LOOK_MILLISECONDS = 200
"""The interval at which a waiting rank looks whether its peer is still connected."""
_SOCKET_BUFFER_BYTES = 4 << 20
_LINGER_MILLISECONDS = 10_000
"""The longest that closing waits for a peer to take the rest."""
_LINGER_MILLISECONDS_IN_FAILURE = 1_000
_NEVER_MILLISECONDS = 10**9
_NUMBER_BYTES = 8

RankInfo = dict[str, Any]
"""A rank's description of itself, as plain values."""
Swap = Callable[[RankInfo], list[RankInfo]]
"""Gives a rank's info to all ranks; returns everybody's, rank 0's first."""


class Peer:
    """The connection to one peer. What comes on it is numbered from 0 in the order in which the peer sent it.

    An answer to a message has that one's number, and does not count itself.

    Attributes:
        rank: The peer's.
        failed: It went away or did not answer in time.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], own_rank: int, rank: int, timeout: float) -> None:
        self.rank = rank
        self.failed = False
        self._own_rank = own_rank
        self._timeout = timeout
        self._messages_sent = 0
        self._messages_expected = 0
        self._next = 0
        self._messages: dict[int, zmq.Frame] = {}
        self._answers: dict[int, zmq.Frame] = {}
        socket = self._socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.SNDBUF, _SOCKET_BUFFER_BYTES)
        socket.setsockopt(zmq.RCVBUF, _SOCKET_BUFFER_BYTES)
        # Until it is closed on purpose: ZeroMQ begins to linger when a peer goes away, and nothing can reach that one.
        socket.setsockopt(zmq.LINGER, 0)
        # A peer that is gone stays gone: what was lost with it would be missing in the sums. Not -1, with which ZeroMQ
        # would throw away what the peer sent before it left.
        socket.setsockopt(zmq.RECONNECT_IVL, _NEVER_MILLISECONDS)
        socket.setsockopt(zmq.RCVTIMEO, _LOOK_MILLISECONDS)
        socket.setsockopt(zmq.SNDTIMEO, _LOOK_MILLISECONDS)
        socket.copy_threshold = 0
        self._events = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def bind(self, host: str) -> str:
        """Listen for the peer at a free port; returns the endpoint.

        Raises:
            UsageError: This machine has no such address or interface.
        """
        try:
            self._socket.bind(f"tcp://{host}:*")
        except zmq.ZMQError as error:
            raise UsageError(
                f"rank {self._own_rank} cannot be reached at {host}: {reason_of(error)}; set GLOO_SOCKET_IFNAME "
                f"to the network interface that connects the ranks"
            ) from None
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def connect(self, endpoint: str) -> None:
        """Connect to the peer's endpoint."""
        self._socket.connect(endpoint)

    def send(self, content: Any, copy: bool = True) -> int:
        """Send a message; without `copy` it is sent from where it lies, later. Returns its number.

        Raises:
            RankFailedError: The peer is gone, or did not connect for as long as collectives may take.
        """
        self._send([content], copy)
        number, self._messages_sent = self._messages_sent, self._messages_sent + 1
        return number

    def answer(self, number: int, content: Any, copy: bool = True) -> None:
        """Send the answer to one of the peer's messages; see `send`."""
        self._send([number.to_bytes(_NUMBER_BYTES, "little"), content], copy)

    def _send(self, parts: list[Any], copy: bool) -> None:
        deadline = 0.0
        while True:
            with suppress(zmq.Again):
                self._socket.send_multipart(parts, copy=copy)
                return
            # Only a socket without a connection does not take a message.
            deadline = self._require_alive(deadline)

    def expect(self) -> int:
        """The number of the first message that was not expected before."""
        number, self._messages_expected = self._messages_expected, self._messages_expected + 1
        return number

    def frame(self, number: int) -> zmq.Frame:
        """The message of that number.

        Raises:
            RankFailedError: The peer is gone, or sent nothing for as long as collectives may take.
        """
        assert number >= self._next or number in self._messages, (
            f"message {number} of rank {self.rank} was taken before"
        )
        return self._take(self._messages, number)

    def answer_frame(self, number: int) -> zmq.Frame:
        """The peer's answer to the message of that number; see `frame`."""
        return self._take(self._answers, number)

    def _take(self, frames: dict[int, zmq.Frame], number: int) -> zmq.Frame:
        deadline = 0.0
        while number not in frames:
            parts: list[zmq.Frame] = []
            with suppress(zmq.Again):
                parts = self._socket.recv_multipart(copy=False)
            if not parts:
                deadline = self._require_alive(deadline)
            elif len(parts) == 1:
                self._messages[self._next] = parts[0]
                self._next += 1
            else:
                self._answers[int.from_bytes(parts[0].bytes, "little")] = parts[1]
        return frames.pop(number)

    def require_taken(self, tracker: zmq.MessageTracker) -> None:
        """Wait until a message that was sent without a copy is not read any more.

        Raises:
            RankFailedError: The peer is gone, or did not take it for as long as collectives may take.
        """
        deadline = time.monotonic() + self._timeout
        while not tracker.done:
            with suppress(zmq.NotDone):
                tracker.wait(_LOOK_MILLISECONDS / 1000)
                return
            if self._events.poll(0):
                self._fail(
                    f"connection closed by peer: rank {self.rank} went away before it took rank {self._own_rank}'s part"
                )
            if time.monotonic() > deadline:
                self._fail(
                    f"rank {self._own_rank} timed out waiting for rank {self.rank} to take its part, "
                    f"for {self._timeout:g} s"
                )

    def _require_alive(self, deadline: float) -> float:
        """Check an idle connection; returns the time to give up."""
        if self._events.poll(0) and not self._socket.poll(0):
            self._fail(
                f"connection closed by peer: rank {self.rank} went away while rank {self._own_rank} needed its part"
            )
        if deadline and time.monotonic() > deadline:
            self._fail(
                f"rank {self._own_rank} timed out waiting for rank {self.rank}: nothing came for {self._timeout:g} s; "
                "--timeout SECONDS allows more"
            )
        return deadline or time.monotonic() + self._timeout

    def _fail(self, reason: str) -> NoReturn:
        self.failed = True
        raise RankFailedError(reason)

    def close(self, in_failure: bool = False) -> None:
        """Send the rest and disconnect; in a failure, only for a moment, since peers may have stopped to listen."""
        if not self.failed:
            linger = _LINGER_MILLISECONDS_IN_FAILURE if in_failure else _LINGER_MILLISECONDS
            self._socket.setsockopt(zmq.LINGER, linger)
        self._socket.disable_monitor()
        self._events.close(0)
        self._socket.close()


def reason_of(error: zmq.ZMQError) -> str:
    """The reason of an error, without the address that pyzmq puts behind it."""
    return zmq.strerror(error.errno or 0)


def connect_peers(
    context: zmq.Context[zmq.Socket[bytes]], rank: int, degree: int, host: str, swap: Swap, timeout: float
) -> list[Peer]:
    """Connect every rank to every other; all must call it together.

    The first message on every connection is a random token from the peer's info, so that no stranger is taken for a
    peer.

    Args:
        context: Where the sockets are made.
        rank: This one.
        degree: How many there are.
        host: Address or interface at which peers reach this rank.
        swap: How the ranks tell each other where they are.
        timeout: Seconds without an answer after which a peer counts as dead.

    Returns:
        The peers in the order of their ranks, without this one.

    Raises:
        RankFailedError: A peer did not connect in time, or someone else did.
        UsageError: Ranks of several hosts would meet at a loopback address.
    """
    peers = [Peer(context, rank, other, timeout) for other in range(degree) if other != rank]
    endpoints = {str(peer.rank): peer.bind(host) for peer in peers if peer.rank > rank}
    token = secrets.token_hex(8)
    infos = swap({"token": token, "network": network_id(), "endpoints": endpoints})
    for peer in peers:
        if peer.rank < rank:
            info = infos[peer.rank]
            endpoint = info["endpoints"][str(rank)]
            if is_loopback(endpoint) and info["network"] != infos[rank]["network"]:
                raise UsageError(
                    f"rank {peer.rank} is on another host, but would be reached at {endpoint}; set GLOO_SOCKET_IFNAME "
                    f"there to the network interface that connects the hosts"
                )
            peer.connect(endpoint)
    for peer in peers:
        peer.send(token.encode())
    for peer in peers:
        if peer.frame(peer.expect()).bytes != infos[peer.rank]["token"].encode():
            raise RankFailedError(f"rank {rank} was called by a stranger where it expected rank {peer.rank}")
    return peers
