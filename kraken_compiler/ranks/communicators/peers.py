"""The connections to a rank's peers. Knows no torch."""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any, NamedTuple, NoReturn

import zmq

from kraken_compiler.errors import RankFailedError, UsageError
from kraken_compiler.ranks.communicators.addresses import host_of, is_loopback, network_id
from kraken_compiler.ranks.communicators.direct import DIRECT_BYTES, DirectConnection

_LOOK_MILLISECONDS = 200
"""The interval at which a waiting rank looks whether its peer is still connected."""
_SOCKET_BUFFER_BYTES = 4 << 20
_LINGER_MILLISECONDS = 10_000
"""The longest that closing waits for a peer to take the rest."""
_LINGER_MILLISECONDS_IN_FAILURE = 1_000
_NEVER_MILLISECONDS = 10**9
_ENVELOPE = struct.Struct("<?Q")
"""Before a content that travels through ZeroMQ: whether it is an answer, and the message's number."""

RankInfo = dict[str, Any]
"""A rank's description of itself, as plain values."""
Swap = Callable[[RankInfo], list[RankInfo]]
"""Gives a rank's info to all ranks; returns everybody's, rank 0's first."""


class Sent(NamedTuple):
    """A message on its way.

    Attributes:
        number: Its number.
        tracker: Knows whether the content's memory is still read; None if it was copied.
    """

    number: int
    tracker: zmq.MessageTracker | None


class Peer:
    """Two connections to one peer: what is small goes directly, what is large through ZeroMQ, whose thread moves it.

    Messages are numbered from 0 in the order in which they are sent. An answer to a message has that one's number, and
    does not count itself.

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
        self._messages: dict[int, memoryview] = {}
        self._answers: dict[int, memoryview] = {}
        self._announced: set[int] = set()
        self._listener: socket.socket | None = None
        self._direct: DirectConnection | None = None
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.SNDBUF, _SOCKET_BUFFER_BYTES)
        self._socket.setsockopt(zmq.RCVBUF, _SOCKET_BUFFER_BYTES)
        # Until it is closed on purpose: ZeroMQ begins to linger when a peer goes away, and nothing can reach that one.
        self._socket.setsockopt(zmq.LINGER, 0)
        # A peer that is gone stays gone: what was lost with it would be missing in the sums. Not -1, with which ZeroMQ
        # would throw away what the peer sent before it left.
        self._socket.setsockopt(zmq.RECONNECT_IVL, _NEVER_MILLISECONDS)
        self._socket.setsockopt(zmq.RCVTIMEO, _LOOK_MILLISECONDS)
        self._socket.setsockopt(zmq.SNDTIMEO, _LOOK_MILLISECONDS)
        self._socket.copy_threshold = 0
        self._events = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def listen(self, host: str) -> tuple[str, int]:
        """Listen for the peer at free ports.

        Returns:
            ZeroMQ's endpoint, and the port of the direct connection on the same host.

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
        endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        address = host_of(endpoint)
        self._listener = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        return endpoint, self._listener.getsockname()[1]

    def call(self, endpoint: str, direct_port: int) -> None:
        """Connect to a peer that listens; see `listen`.

        Raises:
            RankFailedError: It does not.
        """
        self._socket.connect(endpoint)
        host = host_of(endpoint)
        try:
            self._connect(socket.create_connection((host, direct_port), self._timeout))
        except OSError as error:
            self._fail(
                f"rank {self._own_rank} cannot reach rank {self.rank} at {host}, port {direct_port}: "
                f"{error.strerror or error}"
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
        self._direct = DirectConnection(connection, _LOOK_MILLISECONDS / 1000, _SOCKET_BUFFER_BYTES)

    def introduce(self, token: bytes) -> None:
        """Say who one is, on both connections, as the first that comes on them."""
        number, _ = self.send(token)
        self.answer(number, memoryview(token))

    def require_introduction(self, token: bytes) -> None:
        """Make sure that it is the peer who is connected.

        Raises:
            RankFailedError: It is not, or says nothing in time.
        """
        number = self.expect()
        if any(content != token for content in (self.message(number), self.answer_to(number))):
            self._fail_stranger()

    def send(self, content: memoryview | bytes, *, announced: bool = False) -> Sent:
        """Send a message.

        Args:
            content: A large one is sent from where it lies, later.
            announced: The peer does not know how large it is.

        Raises:
            RankFailedError: The peer is gone, or takes nothing for as long as collectives may take.
        """
        number = self._messages_sent
        self._messages_sent += 1
        directly = len(content) <= DIRECT_BYTES
        if directly or announced:
            self._send_directly(number, content if directly else None)
        return Sent(number, None if directly else self._send(_ENVELOPE.pack(False, number), content))

    def answer(self, number: int, content: memoryview) -> zmq.MessageTracker:
        """Send the answer to one of the peer's messages from where it lies, later; see `send`.

        Returns:
            What knows whether the content's memory is still read.
        """
        return self._send(_ENVELOPE.pack(True, number), content)

    def _send_directly(self, number: int, content: memoryview | bytes | None) -> None:
        assert self._direct is not None, "connected"
        deadline = 0.0
        try:
            rest = self._direct.send(number, content)
            while rest is not None:
                rest, moved = self._direct.send_more(rest)
                deadline = 0.0 if moved else self._require_alive(deadline, directly=True)
        except ConnectionError:
            self._fail_closed()

    def _send(self, envelope: bytes, content: memoryview | bytes) -> zmq.MessageTracker:
        # A frame for each peer, because only then it is known who did not take it.
        frame = zmq.Frame(content, track=True, copy=False, copy_threshold=0)
        deadline = 0.0
        while True:
            with suppress(zmq.Again):
                self._socket.send_multipart([envelope, frame], copy=False)
                tracker: zmq.MessageTracker = frame.tracker
                return tracker
            # Only a socket without a connection does not take a message.
            deadline = self._require_alive(deadline)

    def expect(self) -> int:
        """The number of the first message that was not expected before."""
        number, self._messages_expected = self._messages_expected, self._messages_expected + 1
        return number

    def message(self, number: int, size: int = 0) -> memoryview:
        """The message of that number.

        Args:
            number: The message's.
            size: Bytes that it should have, which says where it comes. One of another size is found, too, but later.

        Raises:
            RankFailedError: The peer is gone, or sent nothing for as long as collectives may take.
        """
        return self._take(self._messages, number, size)

    def answer_to(self, number: int) -> memoryview:
        """The peer's answer to the message of that number; see `message`."""
        return self._take(self._answers, number, None)

    def _take(self, arrived: dict[int, memoryview], number: int, size: int | None) -> memoryview:
        """What comes directly if it has a size up to `DIRECT_BYTES` and is not announced, else through ZeroMQ."""
        deadline = 0.0
        while number not in arrived:
            directly = size is not None and size <= DIRECT_BYTES and number not in self._announced
            if self._read_directly(size or 0) if directly else self._read():
                continue
            # Peers that run different programs send other sizes than one expects.
            if self._read(wait=False) if directly else self._read_directly(wait=False):
                continue
            deadline = self._require_alive(deadline, directly=directly)
        self._announced.discard(number)
        return arrived.pop(number)

    def _read_directly(self, size: int = 0, *, wait: bool = True) -> bool:
        """Take what has come directly, up to `_LOOK_MILLISECONDS` from now; False if it is nothing."""
        assert self._direct is not None, "connected"
        arrivals = self._direct.receive(size, wait=wait)
        for number, content in arrivals:
            if content is None:
                self._announced.add(number)
            else:
                self._messages[number] = content
        return bool(arrivals)

    def _read(self, *, wait: bool = True) -> bool:
        """Take one content that has come through ZeroMQ; see `_read_directly`."""
        try:
            envelope, *contents = self._socket.recv_multipart(0 if wait else zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        if len(envelope) != _ENVELOPE.size or len(contents) != 1:
            self._fail_stranger()
        is_answer, number = _ENVELOPE.unpack(envelope.buffer)
        (self._answers if is_answer else self._messages)[number] = contents[0].buffer
        return True

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

    def _require_alive(self, deadline: float, *, directly: bool = False) -> float:
        """Check a connection on which nothing comes; returns the time to give up."""
        if directly and self._direct is not None:
            gone = self._direct.closed
        else:
            gone = bool(self._events.poll(0)) and not self._socket.poll(0)
        if gone:
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

    def close(self, in_failure: bool = False) -> None:
        """Send the rest and disconnect; in a failure, only for a moment, since peers may have stopped to listen."""
        if not self.failed:
            linger = _LINGER_MILLISECONDS_IN_FAILURE if in_failure else _LINGER_MILLISECONDS
            self._socket.setsockopt(zmq.LINGER, linger)
        self._socket.disable_monitor()
        self._events.close(0)
        self._socket.close()
        if self._direct is not None:
            self._direct.close()
        if self._listener is not None:
            self._listener.close()


def reason_of(error: zmq.ZMQError) -> str:
    """The reason of an error, without the address that pyzmq puts behind it."""
    return zmq.strerror(error.errno or 0)


def connect_peers(
    context: zmq.Context[zmq.Socket[bytes]], rank: int, degree: int, host: str, swap: Swap, timeout: float
) -> list[Peer]:
    """Connect every rank to every other; all must call it together.

    What comes first on a connection is a random token from the peer's info, so that no stranger is taken for a peer.

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
    endpoints = {str(peer.rank): peer.listen(host) for peer in peers if peer.rank > rank}
    token = secrets.token_hex(8)
    infos = swap({"token": token, "network": network_id(), "endpoints": endpoints})
    for peer in peers:
        if peer.rank < rank:
            info = infos[peer.rank]
            endpoint, direct_port = info["endpoints"][str(rank)]
            if is_loopback(endpoint) and info["network"] != infos[rank]["network"]:
                raise UsageError(
                    f"rank {peer.rank} is on another host, but would be reached at {endpoint}; set GLOO_SOCKET_IFNAME "
                    f"there to the network interface that connects the hosts"
                )
            peer.call(endpoint, direct_port)
    for peer in peers:
        if peer.rank > rank:
            peer.accept()
    for peer in peers:
        peer.introduce(token.encode())
    for peer in peers:
        peer.require_introduction(infos[peer.rank]["token"].encode())
    return peers
