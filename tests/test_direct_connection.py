"""Small messages, which the calling thread moves itself: in order, whole, and never lost, however the bytes arrive."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import zmq

from kraken_compiler.errors import RankFailedError
from kraken_compiler.ranks.communicators.direct import DIRECT_BYTES, Arrival, DirectConnection
from kraken_compiler.ranks.communicators.peers import Peer

LOOK_SECONDS = 0.05


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        listener.accept()[0] as other,
    ):
        yield one, other


@pytest.fixture
def connections(sockets: tuple[socket.socket, socket.socket]) -> tuple[DirectConnection, DirectConnection]:
    one, other = (DirectConnection(end, LOOK_SECONDS, 1 << 16) for end in sockets)
    return one, other


def received(connection: DirectConnection, count: int, size: int = 0) -> list[Arrival]:
    arrivals: list[Arrival] = []
    while len(arrivals) < count:
        assert not connection.closed
        arrivals += connection.receive(size)
    return arrivals


def send_for_long(connection: DirectConnection) -> None:
    """The first that is sent to a closed connection is only answered with its end."""
    for number in range(100):
        connection.send(number, bytes(1000))


def whole(number: int, content: bytes) -> bytes:
    return struct.pack("<QQ", number, len(content)) + content


@pytest.mark.parametrize("expected", [0, 5, 10_000])
def test_messages_come_in_order_whatever_was_expected(
    connections: tuple[DirectConnection, DirectConnection], expected: int
) -> None:
    one, other = connections
    contents = [bytes([number]) * size for number, size in enumerate((5, 0, 1, 4096, 3, 1000))]
    for number, content in enumerate(contents):
        assert one.send(number, memoryview(content)) is None
        if number == 2:
            assert one.send(99, None) is None
    arrivals = received(other, 7, expected)
    assert [arrival.number for arrival in arrivals] == [0, 1, 2, 99, 3, 4, 5]
    assert [bytes(arrival.content or b"") for arrival in arrivals if arrival.number != 99] == contents
    assert arrivals[3].content is None
    assert other.receive() == []


def test_a_message_in_pieces_is_given_out_once_it_is_whole(sockets: tuple[socket.socket, socket.socket]) -> None:
    sender, end = sockets
    connection = DirectConnection(end, LOOK_SECONDS, 1 << 20)
    sent = whole(0, b"abc") + whole(1, b"d" * 40) + whole(2, b"")
    arrivals: list[Arrival] = []
    for byte in sent:
        sender.sendall(bytes([byte]))
        arrivals += connection.receive()
    assert [(number, bytes(content or b"")) for number, content in arrivals] == [(0, b"abc"), (1, b"d" * 40), (2, b"")]


def test_numbers_begin_where_a_processor_reads_them_at_once(sockets: tuple[socket.socket, socket.socket]) -> None:
    sender, end = sockets
    connection = DirectConnection(end, LOOK_SECONDS, 1 << 20)
    sender.sendall(whole(0, b"abc") + whole(1, struct.pack("d", 1.5)))
    contents = [content for _, content in received(connection, 2, 100)]
    assert [bytes(content or b"") for content in contents] == [b"abc", struct.pack("d", 1.5)]
    assert contents[1] is not None
    assert np.frombuffer(contents[1]).flags.aligned


def test_both_may_send_more_than_the_kernel_holds(connections: tuple[DirectConnection, DirectConnection]) -> None:
    """Neither reads before it has sent everything, as ranks with many sums in flight."""
    contents = [bytes([number % 256]) * DIRECT_BYTES for number in range(30)]
    left: list[memoryview | None] = [None, None]
    sent = [0, 0]
    while min(sent) < len(contents) or any(rest is not None for rest in left):
        for side, connection in enumerate(connections):
            rest = left[side]
            if rest is not None:
                left[side], _ = connection.send_more(rest)
            elif sent[side] < len(contents):
                left[side] = connection.send(sent[side], contents[sent[side]])
                sent[side] += 1
    for connection in connections:
        arrivals = received(connection, len(contents), DIRECT_BYTES)
        assert [(number, bytes(content or b"")) for number, content in arrivals] == list(enumerate(contents))


def test_nothing_moves_while_the_peer_does_not_read(sockets: tuple[socket.socket, socket.socket]) -> None:
    connection = DirectConnection(sockets[0], LOOK_SECONDS, 1 << 16)
    rest: memoryview | None = None
    moved, sent = True, 0
    while moved:
        assert sent < 1000
        if rest is None:
            rest = connection.send(sent, bytes(DIRECT_BYTES))
            sent += 1
        else:
            rest, moved = connection.send_more(rest)
    assert rest is not None


def test_what_came_before_the_end_is_given_out(connections: tuple[DirectConnection, DirectConnection]) -> None:
    one, other = connections
    one.send(0, b"last")
    one.close()
    assert [bytes(content or b"") for _, content in received(other, 1)] == [b"last"]
    assert not other.closed
    assert other.receive() == []
    assert other.closed
    assert other.receive() == []
    with pytest.raises(ConnectionError):
        send_for_long(other)


def test_who_sends_something_else_is_refused(sockets: tuple[socket.socket, socket.socket]) -> None:
    sender, end = sockets
    with closing(DirectConnection(end, LOOK_SECONDS, 1 << 20)) as connection:
        sender.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(RankFailedError, match=f"at most {DIRECT_BYTES} come directly: a stranger sends"):
            received(connection, 1)


@pytest.mark.parametrize(("directly", "otherwise"), [(b"token", b"hello"), (b"nekot", b"hello"), (b"hello", b"")])
def test_a_stranger_is_told(directly: bytes, otherwise: bytes) -> None:
    """One that knows the token may send on one connection, and does not know how on the other."""
    with zmq.Context() as context, closing(Peer(context, 0, 1, 2.0)) as peer:
        endpoint, port = peer.listen("127.0.0.1")
        with socket.create_connection(("127.0.0.1", port)) as stranger, context.socket(zmq.PAIR) as other:
            other.setsockopt(zmq.LINGER, 0)
            other.connect(endpoint)
            other.send_multipart([struct.pack("<?Q", True, 0), otherwise] if directly != b"token" else [otherwise])
            stranger.sendall(whole(0, directly))
            peer.accept()
            with pytest.raises(RankFailedError, match="rank 0 was called by a stranger where it expected rank 1"):
                peer.require_introduction(b"token")
