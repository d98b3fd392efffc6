"""Messages, which the calling thread moves itself: in order, whole, and never lost, however the bytes arrive."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest

from kraken_compiler.errors import RankFailedError
from kraken_compiler.ranks.communicators.connection import ANSWER, Connection, OversizeError
from kraken_compiler.ranks.communicators.mover import Mover
from kraken_compiler.ranks.communicators.peers import Peer

LOOK_SECONDS = 0.05
LITTLE = 1 << 16
"""Bytes for which the kernel is asked to have space; it takes some more."""
LARGE = 3 << 20


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        listener.accept()[0] as other,
    ):
        yield one, other


@pytest.fixture
def movers() -> Iterator[list[Mover]]:
    movers = [Mover(), Mover()]
    yield movers
    for mover in movers:
        mover.close()


@pytest.fixture
def connections(sockets: tuple[socket.socket, socket.socket], movers: list[Mover]) -> tuple[Connection, Connection]:
    one, other = (Connection(end, LOOK_SECONDS, LITTLE, mover.wake) for end, mover in zip(sockets, movers))
    movers[0].serve(one)
    movers[1].serve(other)
    return one, other


def alone(end: socket.socket) -> Connection:
    """A connection whose bytes nobody else moves."""
    return Connection(end, LOOK_SECONDS, LITTLE, lambda: None)


def received(connection: Connection, count: int, size: int = 0) -> dict[int, bytes]:
    while len(connection.arrived) < count:
        assert not connection.closed
        connection.receive(size)
    return {number: bytes(content) for number, content in connection.arrived.items()}


def send_for_long(connection: Connection) -> None:
    """The first that is sent to a closed connection is only answered with its end."""
    for number in range(100):
        connection.send(number, bytes(1000))


def whole(number: int, content: bytes) -> bytes:
    return struct.pack("<QQ", number, len(content)) + content


@pytest.mark.parametrize("expected", [0, 5, 10_000, LARGE])
def test_messages_come_in_order_whatever_was_expected(
    connections: tuple[Connection, Connection], expected: int
) -> None:
    one, other = connections
    sizes = (5, 0, 1, 4096, LARGE, 3, 100_000, 1000)
    contents = {number: bytes([number]) * size for number, size in enumerate(sizes)}
    for number, content in contents.items():
        one.send(number, memoryview(content))
    one.send(3 | ANSWER, b"answer")
    arrived = received(other, len(sizes) + 1, expected)
    assert list(arrived) == [*contents, 3 | ANSWER]
    assert arrived == contents | {3 | ANSWER: b"answer"}
    assert not other.receive(wait=False)


@pytest.mark.parametrize("large", [b"d" * 40, b"d" * 70_000])
def test_a_message_in_pieces_is_given_out_once_it_is_whole(
    sockets: tuple[socket.socket, socket.socket], large: bytes
) -> None:
    sender, end = sockets
    connection = alone(end)
    sent = whole(0, b"abc") + whole(1, large) + whole(2, b"")
    pieces = [sent[begin : begin + 1] for begin in range(60)] + [sent[60:-20]]
    for piece in pieces + [sent[begin : begin + 1] for begin in range(len(sent) - 20, len(sent))]:
        sender.sendall(piece)
        if len(piece) == 1:
            assert connection.receive()
        assert 1 not in connection.arrived or piece is not pieces[-1]
    assert received(connection, 3) == {0: b"abc", 1: large, 2: b""}


def test_numbers_begin_where_a_processor_reads_them_at_once(sockets: tuple[socket.socket, socket.socket]) -> None:
    sender, end = sockets
    connection = alone(end)
    number = struct.pack("d", 1.5)
    sender.sendall(whole(0, b"abc") + whole(1, number) + whole(2, number * 10_000))
    received(connection, 3, 100)
    assert bytes(connection.arrived[1]) == number
    assert all(np.frombuffer(connection.arrived[which]).flags.aligned for which in (1, 2))


def test_contents_stay_while_anybody_looks_at_them(connections: tuple[Connection, Connection]) -> None:
    one, other = connections
    views = []
    for number in range(40):
        one.send(number, bytes([number]) * 100_000)
        received(other, 1, 100_000)
        view = np.frombuffer(other.arrived.pop(number), np.uint8)
        if number % 3:
            views.append((number, view[5:]))
    assert all((view == number).all() for number, view in views)


def test_both_may_send_more_than_the_kernel_holds(connections: tuple[Connection, Connection]) -> None:
    """Neither reads before it has sent everything, as ranks with many sums in flight."""
    contents = {number: bytes([number % 256]) * (LARGE if number % 4 == 3 else 60_000) for number in range(30)}
    remainders = [
        connection.send(number, memoryview(content))
        for number, content in contents.items()
        for connection in connections
    ]
    assert any(remainder is not None for remainder in remainders)
    for connection in connections:
        assert received(connection, len(contents), LARGE) == contents
    assert all(remainder.sent.wait(10) and not remainder.lost for remainder in remainders if remainder is not None)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """True as soon as something holds; False if it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def test_what_the_kernel_cannot_hold_is_read_while_nobody_waits(connections: tuple[Connection, Connection]) -> None:
    one, other = connections
    contents = {number: bytes([number]) * LARGE for number in range(4)}
    for content in contents.values():
        other.expect(len(content))
    remainders = [one.send(number, memoryview(content)) for number, content in contents.items()]
    assert remainders[-1] is not None
    assert remainders[-1].sent.wait(10)  # though the other one has not read
    # What it has not read is in the kernel's buffers, once the mover has read what these have no space for.
    assert within(10, lambda: other.awaited_events() == 0)
    assert received(other, len(contents), LARGE) == contents
    assert other.awaited_events() == one.awaited_events() == 0


def test_who_reads_and_who_moves_get_along(connections: tuple[Connection, Connection]) -> None:
    """One waits for messages, of which the kernel holds a part; another thread may read at the same time."""
    one, other = connections
    contents = {number: bytes([number]) * (LARGE + number) for number in range(12)}
    for content in contents.values():
        other.expect(len(content))
    sender = threading.Thread(
        target=lambda: [(one.send(number, content), time.sleep(0.01)) for number, content in contents.items()]
    )
    sender.start()
    for number, content in contents.items():
        while number not in other.arrived:
            assert not other.closed
            other.receive(len(content))
        assert bytes(other.arrived.pop(number)) == content
    sender.join()


def test_nothing_is_lost_of_what_the_kernel_does_not_take(sockets: tuple[socket.socket, socket.socket]) -> None:
    connection = alone(sockets[0])
    for number in range(1000):
        remainder = connection.send(number, bytes(60_000))
        if remainder is not None:
            break
    assert remainder is not None
    assert not remainder.sent.is_set()
    assert connection.send(number + 1, b"behind it") is not None
    connection.close()
    assert remainder.sent.is_set()
    assert remainder.lost


def test_what_came_before_the_end_is_given_out(connections: tuple[Connection, Connection]) -> None:
    one, other = connections
    one.send(0, b"last")
    one.close()
    assert received(other, 1) == {0: b"last"}
    assert not other.closed
    assert not other.receive()
    assert other.closed
    assert not other.receive()
    with pytest.raises(ConnectionError):
        send_for_long(other)


def test_a_remainder_for_a_peer_that_has_gone_is_lost(connections: tuple[Connection, Connection]) -> None:
    one, other = connections
    remainders = [one.send(number, bytes(LARGE)) for number in range(8)]
    other.close()
    assert remainders[-1] is not None
    assert remainders[-1].sent.wait(10)
    assert remainders[-1].lost
    with pytest.raises(ConnectionError):
        one.send(8, b"")


def test_more_than_the_limit_is_refused(sockets: tuple[socket.socket, socket.socket]) -> None:
    sender, end = sockets
    with closing(alone(end)) as connection:
        connection.limit = 16
        sender.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(OversizeError, match="at most 16 may come"):
            received(connection, 1)


@pytest.mark.parametrize("sent", [whole(0, b"nekot"), whole(0, b"to"), b"GET / HTTP/1.1\r\n\r\n"])
def test_a_stranger_is_told(sockets: tuple[socket.socket, socket.socket], sent: bytes) -> None:
    stranger, end = sockets
    with closing(Peer(0, 1, alone(end), 2.0)) as peer:
        stranger.sendall(sent)
        with pytest.raises(RankFailedError, match="rank 0 was called by a stranger where it expected rank 1"):
            peer.require_introduction(b"token")
