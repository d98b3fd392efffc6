"""`Connection`: a TCP connection to a peer, whose bytes the calling thread moves itself. Knows no torch.

What a rank sends goes into the kernel's buffers, which carry it while the rank computes; what it waits for lies in them
by then. A thread beside it, which would have to be woken up by every packet, takes the core from the one that computes
and runs code that is in no cache by then. So there is one only for what the buffers have no space for (`mover.py`).
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from kraken_compiler.weights.io.buffers import Buffers

ANSWER = 1 << 63
"""Added to a message's number in its answer's."""

_HEADER = struct.Struct("<QQ")
"""A message's number and the size of its content in bytes."""
_ALIGNED = _HEADER.size
_SMALL_BYTES = 64 << 10
"""The largest content that is read in one with its header; larger ones get memory of their own."""
_BUFFERS = 16
"""Larger contents for which memory is kept; two sums in flight from each of a few peers take some of it."""
_AT_ONCE = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class OversizeError(Exception):
    """A message that is larger than the limit."""


class Remainder:
    """What the kernel's buffers had no space for, and somebody else sends.

    Attributes:
        sent: Set once its memory is not read any more, whether it was sent or never will be.
        lost: It never will be: the peer is gone.
    """

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self.parts = deque(parts)
        self.sent = threading.Event()
        self.lost = False

    def drop(self, count: int) -> None:
        """Forget bytes that were sent."""
        while count:
            part = self.parts.popleft()
            if count < len(part):
                self.parts.appendleft(part[count:])
                return
            count -= len(part)
        while self.parts and not len(self.parts[0]):
            self.parts.popleft()


class Connection:
    """Messages to and from one peer, in order.

    One thread sends and receives; another one may `move` what the kernel has no space for.

    Attributes:
        arrived: Contents that have come and were not taken yet, by their message's number.
        closed: The peer has closed it; what came before has arrived.
        limit: The largest content that is accepted; None accepts any.
    """

    def __init__(
        self, connection: socket.socket, look_seconds: float, buffer_bytes: int, ask_for_help: Callable[[], None]
    ) -> None:
        """Use a connection.

        Args:
            connection: A TCP socket, connected.
            look_seconds: The longest that `receive` waits.
            buffer_bytes: What the kernel should hold in each direction, if it may.
            ask_for_help: Called when another thread must look at `awaited_events`.
        """
        self.arrived: dict[int, memoryview] = {}
        self.closed = False
        self.limit: int | None = None
        self._socket = connection
        self._ask_for_help = ask_for_help
        self._reading, self._sending = threading.Lock(), threading.Lock()
        self._read, self._filled = bytearray(), 0
        self._large: tuple[int, memoryview, int] | None = None
        self._buffers = Buffers(_SMALL_BYTES, _BUFFERS)
        self._remainders: deque[Remainder] = deque()
        self._broken = False
        self._expected_bytes = self._read_bytes = 0
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        # It makes space for so many bytes, beyond what SO_RCVBUF may, and leaves the kernel free to make more.
        self._lowest = 0
        self._wake_at(buffer_bytes)
        self._wake_at(1)
        # Half of it is for what the kernel itself needs.
        self._capacity = connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        # Not Python's own time limit, which costs a system call more every time.
        seconds, fraction = divmod(look_seconds, 1)
        limit = struct.pack("ll", int(seconds), int(fraction * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, number: int, content: memoryview | bytes) -> Remainder | None:
        """Send a message; what the kernel takes of it is copied.

        Args:
            number: Its number.
            content: Must not change while a remainder is not sent.

        Returns:
            What the kernel's buffers had no space for; None if that is nothing.

        Raises:
            ConnectionError: The peer has closed the connection.
        """
        header = _HEADER.pack(number, len(content))
        with self._sending:
            if self._broken:
                raise BrokenPipeError
            sent = 0 if self._remainders else self._send_now((header, content))
            if sent == _HEADER.size + len(content):
                return None
            remainder = Remainder([memoryview(header), memoryview(content)])
            remainder.drop(sent)
            self._remainders.append(remainder)
        self._ask_for_help()
        return remainder

    def _send_now(self, parts: Sequence[memoryview | bytes]) -> int:
        """Give the kernel as much as it takes; returns how many bytes that was."""
        try:
            return self._socket.sendmsg(parts, (), _AT_ONCE)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise BrokenPipeError(error.errno, error.strerror) from error

    def expect(self, size: int) -> None:
        """Say that so many bytes will come, so that they are read early if the kernel has no space for them."""
        if size > _SMALL_BYTES:
            self._expected_bytes += size
            if self._is_overfull():
                self._ask_for_help()

    def _is_overfull(self) -> bool:
        return self._expected_bytes - self._read_bytes > self._capacity

    def receive(self, size: int = 0, *, wait: bool = True) -> bool:
        """Read once; what is complete then lies in `arrived`.

        Args:
            size: Bytes of the content that is expected next.
            wait: Wait for a moment if there is nothing.

        Returns:
            Whether anything has come; nothing comes of a connection that is `closed`.

        Raises:
            OversizeError: More is announced than the limit.
        """
        with self._reading:
            if self._lowest > 1:
                self._wake_at(1)
            moved = self._read_once(size, 0 if wait else socket.MSG_DONTWAIT)
        if self._is_overfull():
            self._ask_for_help()
        return moved

    def _wake_at(self, count: int) -> None:
        """Whoever waits for the socket is woken up by so many bytes."""
        self._lowest = count
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _read_once(self, size: int, flags: int) -> bool:
        if self._large is not None:
            return self._read_large(flags)
        if not self._read:
            self._read = bytearray(_HEADER.size + (size if size <= _SMALL_BYTES else 0))
        memory = memoryview(self._read)
        count = self._receive_into(memory[self._filled :], flags)
        self._filled += count
        if self._filled == len(memory) == _HEADER.size + size:
            number, announced_size = _HEADER.unpack_from(memory)
            if announced_size == size:
                # What is expected has come, and nothing else, as in every decode step.
                self.arrived[number] = memory[_HEADER.size :]
                self._read, self._filled = bytearray(), 0
                return True
        self._take_messages()
        return bool(count)

    def _read_large(self, flags: int) -> bool:
        assert self._large is not None, "the header of one was read"
        number, content, filled = self._large
        count = self._receive_into(content[filled:], flags or socket.MSG_WAITALL)
        self._fill_large(number, content, filled, count)
        return bool(count)

    def _fill_large(self, number: int, content: memoryview, filled: int, count: int) -> None:
        """Note that more of a large content has come."""
        self._read_bytes += count
        filled += count
        self._large = (number, content, filled) if filled < len(content) else None
        if self._large is None:
            self.arrived[number] = content

    def _receive_into(self, memory: memoryview, flags: int) -> int:
        """Read what there is; returns how many bytes that was."""
        if self.closed:
            return 0
        try:
            count = self._socket.recv_into(memory, 0, flags)
        except BlockingIOError:
            return 0
        except OSError:
            count = 0
        self.closed = not count
        return count

    def _take_messages(self) -> None:
        """Give out the messages that are complete; what is left of the next one waits for the rest."""
        begins, memory = 0, memoryview(self._read)
        needed = _HEADER.size
        while self._filled - begins >= _HEADER.size:
            number, size = _HEADER.unpack_from(memory, begins)
            content_begins = begins + _HEADER.size
            if self.limit is not None and size > self.limit:
                raise OversizeError(f"{size} bytes were announced where at most {self.limit} may come")
            if size > _SMALL_BYTES:
                # What has come of it is the last that was read.
                content = memoryview(self._buffers.take(size))[:size]
                count = self._filled - content_begins
                content[:count] = memory[content_begins : self._filled]
                self._fill_large(number, content, 0, count)
                begins = self._filled
                break
            needed = _HEADER.size + size
            if self._filled - begins < needed:
                break
            content = memory[content_begins : begins + needed]
            # Arrays of numbers must begin where the processor reads them at once.
            self.arrived[number] = memoryview(bytearray(content)) if begins % _ALIGNED else content
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

    def awaited_events(self) -> int:
        """The events of the socket, as `select.poll` knows them, at which another thread should `move` bytes."""
        # Whoever is reading asks for help afterwards.
        reads = self._is_overfull() and not self.closed and not self._reading.locked()
        return (select.POLLOUT if self._remainders else 0) | (select.POLLIN if reads else 0)

    def move(self, events: int) -> None:
        """Move what these events of the socket allow, in another thread than the one that sends and receives."""
        if events & ~select.POLLIN:
            with self._sending:
                self._send_remainders()
        if events & select.POLLIN and self._reading.acquire(blocking=False):
            try:
                self._read_once(0, socket.MSG_DONTWAIT)
                rest = self._expected_bytes - self._read_bytes
                self._wake_at(max(1, min(rest, self._capacity // 2)))
            finally:
                self._reading.release()

    def _send_remainders(self) -> None:
        """Give the kernel what it takes of the remainders, in their order."""
        try:
            while self._remainders:
                remainder = self._remainders[0]
                remainder.drop(self._send_now(remainder.parts))
                if remainder.parts:
                    return
                self._remainders.popleft().sent.set()
        except ConnectionError:
            self._give_up()

    def _give_up(self) -> None:
        """Note that nothing can be sent any more."""
        self._broken = True
        while self._remainders:
            remainder = self._remainders.popleft()
            remainder.lost = True
            remainder.sent.set()

    def flush(self, deadline: float) -> None:
        """Wait until the kernel has taken everything; not longer than to this time."""
        with self._sending:
            last = self._remainders[-1] if self._remainders else None
        if last is not None:
            last.sent.wait(max(0.0, deadline - time.monotonic()))

    def drain(self, deadline: float) -> None:
        """Read what the peer still sends until it closes the connection; not longer than to this time.

        The kernel throws away what is still on its way to the peer when somebody closes who has not read everything.
        """
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        while not self.closed and time.monotonic() < deadline:
            self.receive()

    def close(self) -> None:
        """Disconnect; what the kernel has taken still arrives. Nobody may move anything any more."""
        self._give_up()
        self._socket.close()
