"""`DirectConnection`: a TCP connection to a peer whose bytes the calling thread moves itself. Knows no torch.

A decode step sends a few kilobytes at a time. They fit into the kernel's buffers, which carry them while the rank
computes; a thread that would do it has to be woken up, takes the core from the one that computes, and runs code that is
in no cache by then.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from kraken_compiler.errors import RankFailedError

DIRECT_BYTES = 64 << 10
"""The largest content that travels directly: what is in flight must fit into the kernel's buffers, or senders wait."""

_HEADER = struct.Struct("<QQ")
"""A message's number and the size of its content in bytes."""
_ELSEWHERE = (1 << 64) - 1
"""In the place of a size: the content comes on another connection."""
_ALIGNED = _HEADER.size
_READ_BYTES = 4096
_AT_ONCE = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Arrival(NamedTuple):
    """A message that has come.

    Attributes:
        number: The sender's.
        content: None if it comes on another connection.
    """

    number: int
    content: memoryview | None


class DirectConnection:
    """Messages to and from one peer, in order.

    Attributes:
        closed: The peer has closed it; what came before has been given out.
    """

    def __init__(self, connection: socket.socket, look_seconds: float, buffer_bytes: int) -> None:
        """Use a connection.

        Args:
            connection: A TCP socket, connected.
            look_seconds: The longest that `receive` waits.
            buffer_bytes: What the kernel should hold in each direction, if it may.
        """
        self.closed = False
        self._socket = connection
        self._look_seconds = look_seconds
        self._read, self._filled = bytearray(), 0
        self._arrived: list[Arrival] = []
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        # Not Python's own time limit, which costs a system call more every time.
        seconds, fraction = divmod(look_seconds, 1)
        limit = struct.pack("ll", int(seconds), int(fraction * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def send(self, number: int, content: memoryview | bytes | None) -> memoryview | None:
        """Send a message; what the kernel takes of it is copied.

        Args:
            number: Its number.
            content: None announces one that comes on another connection.

        Returns:
            What the kernel's buffers had no space for, to be given to `send_more`; None if that is nothing.

        Raises:
            ConnectionError: The peer has closed the connection.
        """
        size = 0 if content is None else len(content)
        parts: list[bytes | memoryview] = [_HEADER.pack(number, _ELSEWHERE if content is None else size)]
        if content is not None:
            parts.append(content)
        sent = self._send_now(parts)
        return None if sent == _HEADER.size + size else memoryview(b"".join(parts))[sent:]

    def send_more(self, rest: memoryview) -> tuple[memoryview | None, bool]:
        """Wait a moment for space, and go on. Reads meanwhile: the peer may be sending, too, and not reading.

        Returns:
            What is left now, and whether anything has moved.

        Raises:
            ConnectionError: The peer has closed the connection.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT if self.closed else select.POLLOUT | select.POLLIN)
        events = sum(event for _, event in poll.poll(self._look_seconds * 1000))
        if events & select.POLLIN:
            self._receive(_READ_BYTES, socket.MSG_DONTWAIT)
        sent = self._send_now([rest]) if events & ~select.POLLIN else 0
        return rest[sent:] or None, bool(sent or events & select.POLLIN)

    def _send_now(self, parts: Sequence[memoryview | bytes]) -> int:
        """Give the kernel as much as it takes; returns how many bytes that was."""
        try:
            return self._socket.sendmsg(parts, (), _AT_ONCE)
        except BlockingIOError:
            return 0

    def receive(self, size: int = 0, *, wait: bool = True) -> list[Arrival]:
        """The messages that have come since the last call; nothing comes of a connection that is `closed`.

        Args:
            size: Bytes of the content that is expected next.
            wait: Wait for a moment if there is none.
        """
        if not self._arrived and not self.closed:
            self._receive(size + _HEADER.size, 0 if wait else socket.MSG_DONTWAIT)
        arrived, self._arrived = self._arrived, []
        return arrived

    def _receive(self, size: int, flags: int) -> None:
        """Read once, at least so many bytes if they are there."""
        if not self._read:
            self._read = bytearray(size)
        try:
            count = self._socket.recv_into(memoryview(self._read)[self._filled :], 0, flags)
        except BlockingIOError:
            return
        except ConnectionError:
            count = 0
        self.closed = not count
        self._filled += count
        self._take_messages()

    def _take_messages(self) -> None:
        """Give out the messages that are complete; what is left of the next one waits for the rest."""
        begins, memory = 0, memoryview(self._read)
        needed = _HEADER.size
        while self._filled - begins >= _HEADER.size:
            number, size = _HEADER.unpack_from(memory, begins)
            content_begins = begins + _HEADER.size
            if size == _ELSEWHERE:
                self._arrived.append(Arrival(number, None))
                begins = content_begins
                continue
            if size > DIRECT_BYTES:
                raise RankFailedError(
                    f"{size} bytes were announced where at most {DIRECT_BYTES} come directly: a stranger sends, "
                    "or a rank with another version of kraken-compiler"
                )
            needed = _HEADER.size + size
            if self._filled - begins < needed:
                break
            content = memory[content_begins : begins + needed]
            # Arrays of numbers must begin where the processor reads them at once.
            self._arrived.append(Arrival(number, memoryview(bytearray(content)) if begins % _ALIGNED else content))
            begins += needed
            needed = _HEADER.size
        left = memory[begins : self._filled]
        if not left:
            self._read, self._filled = bytearray(), 0
        elif begins or len(memory) < needed:
            # The memory belongs to the messages that were given out.
            self._read = bytearray(max(needed, len(left)))
            self._read[: len(left)] = left
            self._filled = len(left)

    def close(self) -> None:
        """Disconnect; what was sent still arrives."""
        self._socket.close()
