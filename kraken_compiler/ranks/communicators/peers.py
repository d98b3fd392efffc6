"""The connections to a rank's peers. Knows no torch."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NoReturn

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


class Peer:
    """The connection to one peer.

    Messages are numbered from 0 in the order in which they are sent. An answer to a message has that one's number, and
    does not count itself.

    Attributes:
        rank: The peer's.
        failed: It went away or did not answer in time.
    """

    def __init__(self, mover: Mover, own_rank: int, rank: int, timeout: float) -> None:
        self.rank = rank
        self.failed = False
        self._mover = mover
        self._own_rank = own_rank
        self._timeout = timeout
        self._messages_sent = 0
        self._messages_expected = 0
        self._listener: socket.socket | None = None
        self._connection: Connection | None = None

    def listen(self, host: str) -> tuple[str, int]:
        """Listen for the peer at a free port.

        Returns:
            The address and the port.

        Raises:
            UsageError: This machine has no such address or interface.
        """
        try:
            family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
            self._listener = socket.create_server(address, family=family, backlog=1)
        except OSError as error:
            raise UsageError(
                f"rank {self._own_rank} cannot be reached at {host}: {error.strerror or error}; set GLOO_SOCKET_IFNAME "
                f"to the network interface that connects the ranks"
            ) from None
        host, port, *_ = self._listener.getsockname()
        return host, port

    def call(self, host: str, port: int) -> None:
        """Connect to a peer that listens; see `listen`.

        Raises:
            RankFailedError: It does not.
        """
        try:
            self._connect(socket.create_connection((host, port), self._timeout))
        except OSError as error:
            self._fail(
                f"rank {self._own_rank} cannot reach rank {self.rank} at {host}, port {port}: {error.strerror or error}"
            )

    def accept(self) -> None:
        """Take the call of a peer for which one listens.

        Raises:
            RankFailedError: Nobody calls for as long as collectives may take.
        """
        assert self._listener is not None, "listen first"
        with closing(self._listener) as listener:
            listener.settimeout(self._timeout)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                self._fail_late()
        self._connect(connection)

    def _connect(self, connection: socket.socket) -> None:
        self._connection = Connection(connection, _LOOK_SECONDS, BUFFER_BYTES, self._mover.wake)
        self._mover.serve(self._connection)

    def introduce(self, token: bytes) -> None:
        """Say who one is, as the first that comes on the connection."""
        self.send(token)

    def require_introduction(self, token: bytes) -> None:
        """Make sure that it is the peer who is connected.

        Raises:
            RankFailedError: It is not, or says nothing in time.
        """
        connection = self._open()
        connection.limit = len(token)
        number = self.expect(len(token))
        try:
            content = self.message(number, len(token))
        except OversizeError:
            self._fail_stranger()
        if content != token:
            self._fail_stranger()
        connection.limit = None

    def send(self, content: memoryview | bytes) -> tuple[int, Remainder | None]:
        """Send a message.

        Returns:
            Its number, and what is sent later, from where it lies; see `require_taken`.

        Raises:
            RankFailedError: The peer is gone.
        """
        number, self._messages_sent = self._messages_sent, self._messages_sent + 1
        return number, self._send(number, content)

    def answer(self, number: int, content: memoryview) -> Remainder | None:
        """Send the answer to one of the peer's messages; returns what is sent later. See `send`."""
        return self._send(number | ANSWER, content)

    def _send(self, number: int, content: memoryview | bytes) -> Remainder | None:
        try:
            return self._open().send(number, content)
        except ConnectionError:
            self._fail_closed()

    def expect(self, size: int) -> int:
        """The number of the first message that was not expected before, which has so many bytes."""
        number, self._messages_expected = self._messages_expected, self._messages_expected + 1
        self._open().expect(size)
        return number

    def unexpected_message(self) -> memoryview:
        """The first message that was not expected before, of any size; see `message`."""
        content = self.message(self.expect(0))
        # Now that its size is known.
        self._open().expect(len(content))
        return content

    def expect_answer(self, size: int) -> None:
        """Say that an answer of so many bytes will come."""
        self._open().expect(size)

    def message(self, number: int, size: int = 0) -> memoryview:
        """The message of that number.

        Args:
            number: The message's.
            size: Bytes that it should have. One of another size is taken, too, but costs more.

        Raises:
            RankFailedError: The peer is gone, or sent nothing for as long as collectives may take.
        """
        connection, deadline = self._open(), 0.0
        while number not in connection.arrived:
            moved = connection.receive(size)
            deadline = 0.0 if moved else self._require_alive(deadline)
        return connection.arrived.pop(number)

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

    def _open(self) -> Connection:
        assert self._connection is not None, "connect first"
        return self._connection

    def _require_alive(self, deadline: float) -> float:
        """Check a connection on which nothing comes; returns the time to give up."""
        if self._open().closed:
            self._fail_closed()
        if deadline and time.monotonic() > deadline:
            self._fail_late()
        return deadline or time.monotonic() + self._timeout

    def _fail_closed(self) -> NoReturn:
        self._fail(f"connection closed by peer: rank {self.rank} went away while rank {self._own_rank} needed its part")

    def _fail_late(self) -> NoReturn:
        self._fail(
            f"rank {self._own_rank} timed out waiting for rank {self.rank}: nothing came for {self._timeout:g} s; "
            "--timeout SECONDS allows more"
        )

    def _fail_stranger(self) -> NoReturn:
        self._fail(f"rank {self._own_rank} was called by a stranger where it expected rank {self.rank}")

    def _fail(self, reason: str) -> NoReturn:
        self.failed = True
        raise RankFailedError(reason)

    def flush(self, deadline: float) -> None:
        """Wait until the rest is sent; not longer than to this time."""
        if self._connection is not None and not self.failed:
            self._connection.flush(deadline)

    def part(self, deadline: float) -> None:
        """Let the peer have what was sent, though one has not read what it sends; not longer than to this time."""
        if self._connection is not None and not self.failed:
            self._connection.part(deadline)

    def close(self) -> None:
        """Disconnect, once the mover has ended."""
        if self._connection is not None:
            self._connection.close()
        if self._listener is not None:
            self._listener.close()


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
        UsageError: Ranks of several hosts would meet at a loopback address.
    """
    peers = [Peer(mover, rank, other, timeout) for other in range(degree) if other != rank]
    try:
        _connect(peers, rank, host, swap)
    except BaseException:
        mover.close()
        for peer in peers:
            peer.close()
        raise
    return peers


def _connect(peers: Sequence[Peer], rank: int, host: str, swap: Swap) -> None:
    addresses = {str(peer.rank): peer.listen(host) for peer in peers if peer.rank > rank}
    token = secrets.token_hex(8)
    infos = swap({"token": token, "network": network_id(), "addresses": addresses})
    for peer in peers:
        if peer.rank < rank:
            info = infos[peer.rank]
            address, port = info["addresses"][str(rank)]
            if is_loopback(address) and info["network"] != infos[rank]["network"]:
                raise UsageError(
                    f"rank {peer.rank} is on another host, but would be reached at {address}; set GLOO_SOCKET_IFNAME "
                    f"there to the network interface that connects the hosts"
                )
            peer.call(address, port)
    for peer in peers:
        if peer.rank > rank:
            peer.accept()
    for peer in peers:
        peer.introduce(token.encode())
    for peer in peers:
        peer.require_introduction(infos[peer.rank]["token"].encode())
