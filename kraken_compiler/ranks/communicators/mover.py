"""`Mover`: the thread that moves what the kernel's buffers have no space for. Knows no torch."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress

from kraken_compiler.ranks.communicators.connection import Connection


class Mover:
    """Sends the remainders of messages, and reads what the kernel could not hold, while a rank computes.

    Its thread begins when it is first needed: where all messages fit into the kernel's buffers, it never is.
    """

    def __init__(self) -> None:
        self._connections: tuple[Connection, ...] = ()
        self._thread: threading.Thread | None = None
        self._ends = False
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)

    def serve(self, connection: Connection) -> None:
        """Move the bytes of one more connection."""
        self._connections = (*self._connections, connection)

    def wake(self) -> None:
        """Look again at what the connections wait for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kraken-mover", daemon=True)
            self._thread.start()
        with suppress(BlockingIOError):  # it has rung often enough
            self._ringer.send(b"\0")

    def _run(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self._bell, select.POLLIN)
            connections = {connection.fileno(): connection for connection in self._connections}
            for number, connection in connections.items():
                if events := connection.awaited_events():
                    poll.register(number, events)
            for number, events in poll.poll():
                if number in connections:
                    connections[number].move(events)
                    continue
                with suppress(BlockingIOError):
                    self._bell.recv(1 << 10)
            if self._ends:
                return

    def close(self) -> None:
        """End the thread; what the connections still wait for stays where it is."""
        if self._thread is not None:
            self._ends = True
            self.wake()
            self._thread.join()
        self._bell.close()
        self._ringer.close()
