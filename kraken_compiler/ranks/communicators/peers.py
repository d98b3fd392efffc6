"""The connections to a rank's peers. Knows no torch."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, NoReturn

from kraken_compiler.errors import RankFailedError, UsageError
from kraken_compiler.ranks.communicators.addresses import is_loopback, network_id
from kraken_compiler.ranks.communicators.connection import ANSWER, Connection, OversizeError, Remainder
from kraken_compiler.ranks.communicators.mover import Mover

_LOOK_SECONDS = 0.2
"""The interval at which a waiting rank looks whether its peer is still connected."""
BUFFER_BYTES = 4 << 20
"""What the kernel should hold of what is in flight."""

RankInfo = dict[str, Any]
"""A rank's description of itself, as plain values."""
Swap = Callable[[RankInfo], list[RankInfo]]
"""Gives a rank's info to all ranks; returns everybody's, rank 0's first."""


class Exchanged(NamedTuple):
    """A message on its way, and the one that comes in return.

    Attributes:
        number: Of the peer's.
        own_number: Of one's own.
        remainder: What is sent later, from where the content lies; None if that is nothing. See `Peer.require_taken`.
    """

    number: int
    own_number: int
    remainder: Remainder | None


class Peer:
    """One peer, connected.

    Messages are numbered from 0 in the order in which they are sent. An answer to a message has that one's number, and
    does not count itself. These methods run some hundred times a token, each time behind a layer's weights, when their
    code is in no cache: a call less is a microsecond.

    Attributes:
        rank: The peer's.
        failed: It went away or did not answer in time.
    """

    def __init__(self, own_rank: int, rank: int, connection: Connection, timeout: float) -> None:
        self.rank = rank
        self.failed = False
        self._own_rank = own_rank
        self._connection = connection
        self._timeout = timeout
        self._messages_sent = 0
        self._messages_expected = 0

    def require_introduction(self, token: bytes) -> None:
        """Make sure that it is the peer who is connected: what comes first is its token.

        Raises:
            RankFailedError: It is not, or says nothing in time.
        """
        self._connection.limit = len(token)
        try:
            content = self.next_message(len(token))
        except OversizeError:
            self._fail_stranger()
        if content != token:
            self._fail_stranger()
        self._connection.limit = None

    def send(self, content: memoryview | bytes) -> Remainder | None:
        """Send a message; returns what is sent later, from where it lies.

        Raises:
            RankFailedError: The peer is gone.
        """
        self._messages_sent += 1
        return self._send(self._messages_sent - 1, content)

    def exchange(self, content: memoryview, size: int) -> Exchanged:
        """Send a message for one of so many bytes; see `send`."""
        number, self._messages_expected = self._messages_expected, self._messages_expected + 1
        own_number, self._messages_sent = self._messages_sent, self._messages_sent + 1
        self._connection.expect(size)
        return Exchanged(number, own_number, self._send(own_number, content))

    def answer(self, number: int, content: memoryview, size: int) -> Remainder | None:
        """Send the answer to one of the peer's messages, for one of so many bytes; see `send`."""
        self._connection.expect(size)
        return self._send(number | ANSWER, content)

    def _send(self, number: int, content: memoryview | bytes) -> Remainder | None:
        try:
            return self._connection.send(number, content)
        except ConnectionError:
            self._fail_closed()

    def next_message(self, size: int = 0) -> memoryview:
        """The first message that was not expected before; see `message`."""
        number, self._messages_expected = self._messages_expected, self._messages_expected + 1
        content = self.message(number, size)
        self._connection.expect(len(content))  # which is known only now, and has been read
        return content

    def message(self, number: int, size: int) -> memoryview:
        """The message of that number.

        Args:
            number: The message's.
            size: Bytes that it should have. One of another size is taken, too, but costs more.

        Raises:
            RankFailedError: The peer is gone, or sent nothing for as long as collectives may take.
        """
        arrived, deadline = self._connection.arrived, 0.0
        while number not in arrived:
            deadline = 0.0 if self._connection.receive(size) else self._require_alive(deadline)
        return arrived.pop(number)

    def answer_to(self, number: int, size: int) -> memoryview:
        """The peer's answer to the message of that number; see `message`."""
        return self.message(number | ANSWER, size)

    def require_taken(self, remainder: Remainder) -> None:
        """Wait until what is sent later is not read any more.

        Raises:
            RankFailedError: The peer is gone, or did not take it for as long as collectives may take.
        """
        if not remainder.sent.wait(self._timeout):
            self._fail(
                f"rank {self._own_rank} timed out waiting for rank {self.rank} to take its part, "
                f"for {self._timeout:g} s"
            )
        if remainder.lost:
            self._fail(
                f"connection closed by peer: rank {self.rank} went away before it took rank {self._own_rank}'s part"
            )

    def _require_alive(self, deadline: float) -> float:
        """Check a connection on which nothing comes; returns the time to give up."""
        if self._connection.closed:
            self._fail_closed()
        if deadline and time.monotonic() > deadline:
            self._fail_late()
        return deadline or time.monotonic() + self._timeout

    def _fail_closed(self) -> NoReturn:
        self._fail(f"connection closed by peer: rank {self.rank} went away while rank {self._own_rank} needed its part")

    def _fail_late(self) -> NoReturn:
        self._fail(_late(self._own_rank, self.rank, self._timeout))

    def _fail_stranger(self) -> NoReturn:
        self._fail(f"rank {self._own_rank} was called by a stranger where it expected rank {self.rank}")

    def _fail(self, reason: str) -> NoReturn:
        self.failed = True
        raise RankFailedError(reason)

    def flush(self, deadline: float) -> None:
        """Wait until the rest is sent; not longer than to this time."""
        if not self.failed:
            self._connection.flush(deadline)

    def drain(self, deadline: float) -> None:
        """Let the peer have what was sent, though one has not read what it sends; not longer than to this time."""
        if not self.failed:
            self._connection.drain(deadline)

    def close(self) -> None:
        """Disconnect, once nobody else moves the connection's bytes."""
        self._connection.close()


def connect_peers(rank: int, degree: int, host: str, swap: Swap, timeout: float, mover: Mover) -> list[Peer]:
    """Connect every rank to every other; all must call it together.

    What comes first on a connection is a random token from the peer's info, so that no stranger is taken for a peer.

    Args:
        rank: This one.
        degree: How many there are.
        host: Address or interface at which peers reach this rank.
        swap: How the ranks tell each other where they are.
        timeout: Seconds without an answer after which a peer counts as dead.
        mover: Moves what the kernel has no space for.

    Returns:
        The peers in the order of their ranks, without this one.

    Raises:
        RankFailedError: A peer did not connect in time, or someone else did.
        UsageError: Ranks of several hosts would meet at a loopback address, or this host has no such address.
    """
    others = [other for other in range(degree) if other != rank]
    token = secrets.token_hex(8)
    connections: list[Connection] = []
    try:
        with ExitStack() as listening:
            listeners = {other: listening.enter_context(_listener(rank, host)) for other in others if other > rank}
            addresses = {str(other): listener.getsockname()[:2] for other, listener in listeners.items()}
            infos = swap({"token": token, "network": network_id(), "addresses": addresses})
            for other in others:
                calls = other < rank
                one = (
                    _called(infos, rank, other, timeout) if calls else _accepted(listeners[other], rank, other, timeout)
                )
                connections.append(Connection(one, _LOOK_SECONDS, BUFFER_BYTES, mover.wake))
                mover.serve(connections[-1])
        peers = [Peer(rank, other, connection, timeout) for other, connection in zip(others, connections)]
        for peer in peers:
            peer.send(token.encode())
        for peer in peers:
            peer.require_introduction(infos[peer.rank]["token"].encode())
    except BaseException:
        mover.close()
        for connection in connections:
            connection.close()
        raise
    return peers


def _listener(rank: int, host: str) -> socket.socket:
    """Listens for one peer, at a free port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=1)
    except OSError as error:
        raise UsageError(
            f"rank {rank} cannot be reached at {host}: {error.strerror or error}; set GLOO_SOCKET_IFNAME "
            f"to the network interface that connects the ranks"
        ) from None


def _called(infos: Sequence[RankInfo], rank: int, other: int, timeout: float) -> socket.socket:
    """A connection to a peer that listens."""
    host, port = infos[other]["addresses"][str(rank)]
    if is_loopback(host) and infos[other]["network"] != infos[rank]["network"]:
        raise UsageError(
            f"rank {other} is on another host, but would be reached at {host}; set GLOO_SOCKET_IFNAME "
            f"there to the network interface that connects the hosts"
        )
    try:
        return socket.create_connection((host, port), timeout)
    except OSError as error:
        raise RankFailedError(
            f"rank {rank} cannot reach rank {other} at {host}, port {port}: {error.strerror or error}"
        ) from None


def _accepted(listener: socket.socket, rank: int, other: int, timeout: float) -> socket.socket:
    """The connection of a peer that calls."""
    listener.settimeout(timeout)
    try:
        return listener.accept()[0]
    except TimeoutError:
        raise RankFailedError(_late(rank, other, timeout)) from None


def _late(rank: int, other: int, timeout: float) -> str:
    return (
        f"rank {rank} timed out waiting for rank {other}: nothing came for {timeout:g} s; --timeout SECONDS allows more"
    )
