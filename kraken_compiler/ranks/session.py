"""`Ranks`: this process as one of the ranks of a run. Imports no torch, unless torchrun started it.

Ranks that meet connect every one to every other over TCP (`message_exchange.py`). ZeroMQ, in which they meet, would
move bytes in a thread of its own, which every packet wakes up while this rank computes; MPI makes progress inside of
its calls only, and needs an installation and a launcher.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kraken_compiler.ranks.communicators.addresses import bind_host
from kraken_compiler.ranks.communicators.agreement import Claims, require_agreement
from kraken_compiler.ranks.communicators.arrays import ArraySums
from kraken_compiler.ranks.communicators.message_exchange import MessageExchange
from kraken_compiler.ranks.communicators.peers import RankInfo
from kraken_compiler.ranks.communicators.rendezvous import (
    RENDEZVOUS,
    RendezvousPoint,
    has_store,
    rendezvous,
    rendezvous_in_store,
)
from kraken_compiler.ranks.communicators.sums import Exchange
from kraken_compiler.ranks.environment import Place, collective_timeout
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.trace import Trace


class Ranks(ArraySums):
    """This process as a rank: who it is, and sums, gathers and broadcasts of numpy arrays and bytes over all ranks.

    All ranks must call the same methods in the same order; a method raises a `RankFailedError` where a peer went away
    or did not answer in time.

    Attributes:
        place: Which of the ranks this is.
        status: Where to report progress.
        exchange: Moves bytes between the ranks, for sums of other arrays than numpy's; None for a single rank.
        host: Address or interface at which peers reach this rank.
        timeout: Seconds without an answer after which a peer counts as dead.
        trace: Records what this rank does; None if nobody asked.
    """

    trace: Trace | None = None

    def __init__(
        self,
        place: Place,
        status: StatusWriter,
        exchange: Exchange | None,
        *,
        reduce_dtype: str | None = None,
        host: str = "127.0.0.1",
        timeout: float = 0.0,
    ) -> None:
        super().__init__(place.rank, place.degree, exchange, None if reduce_dtype is None else _dtype(reduce_dtype))
        self.place, self.status, self.host, self.timeout = place, status, host, timeout

    @classmethod
    def rendezvous(cls, place: Place, status: StatusWriter, timeout: float, reduce_dtype: str | None = None) -> Ranks:
        """Meet the ranks that were started with this one; all must do so together.

        They meet at `KRAKEN_MEET`, HOST:PORT; else under torchrun in its store, and otherwise at `MASTER_ADDR` and
        `MASTER_PORT`. A single rank meets nobody.

        Args:
            place: This rank.
            status: Where to report progress.
            timeout: Seconds without an answer after which a peer counts as dead.
            reduce_dtype: To which parts of sums are rounded before they are sent; None leaves them.

        Raises:
            UsageError: The environment does not say where to meet, the ranks were not started as ranks of one run, or
                an address cannot be used.
            RankFailedError: A rank did not come in time, or someone came who is none.
        """
        rank, degree = place.rank, place.degree
        if degree == 1:
            return cls(place, status, None, reduce_dtype=reduce_dtype)
        if has_store() and RENDEZVOUS not in os.environ:
            master = os.environ["MASTER_ADDR"]

            def swap(info: RankInfo) -> list[RankInfo]:
                return rendezvous_in_store(rank, degree, info, timeout=timeout)
        else:
            point = RendezvousPoint.from_environment()
            master = point.host

            def swap(info: RankInfo) -> list[RankInfo]:
                return rendezvous(rank, degree, point, info, timeout=timeout)

        host = bind_host(master)
        exchange = MessageExchange(rank, degree, host, swap, timeout)
        return cls(place, status, exchange, reduce_dtype=reduce_dtype, host=host, timeout=timeout)

    @property
    def exchange(self) -> Exchange | None:
        return self._exchange

    @property
    def one_machine(self) -> bool:
        """True if all ranks are known to be on one machine."""
        return self.place.one_machine

    def broadcast(self, content: bytes | None) -> bytes:
        """Rank 0's content, on every rank. Rank 0 does not wait for the others to take it.

        Args:
            content: On rank 0, what to send, which may be empty; ignored on the others.
        """
        self._settle()
        if self.rank != 0:
            return self._open().receive_only(0)
        assert content is not None, "rank 0 must say what to broadcast"
        if self.degree > 1:
            self._open().send_only(content)
        return content

    def gather(self, content: bytes) -> list[bytes]:
        """Every rank's content, rank 0's first."""
        if self.degree == 1:
            return [content]
        exchange = self._open()
        exchange.send_only(content)
        self._settle()
        return [content if rank == self.rank else exchange.receive_only(rank) for rank in range(self.degree)]

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self.gather(b"")

    def agree(self, claims: Claims) -> None:
        """Make sure that the ranks fit together.

        Args:
            claims: What must be the same on all ranks, or why this one cannot go on, which is told to the others.

        Raises:
            InputFileError, UsageError, RankFailedError: They do not; this rank's own trouble is raised as it is.
        """

        def swap(values: dict[str, Any]) -> list[dict[str, Any]]:
            return [json.loads(content) for content in self.gather(json.dumps(values).encode())]

        require_agreement(claims, swap)


@contextmanager
def joined(timeout: float | None = None, reduce_dtype: str | None = None) -> Iterator[Ranks]:
    """Be a rank, as torchrun, our launcher or anything else set it up in the environment; all leave together.

    Args:
        timeout: Seconds after which a peer that does not answer counts as dead; None asks the launcher.
        reduce_dtype: To which parts of sums are rounded before they are sent; None leaves them.

    Raises:
        UsageError, RankFailedError: See `Ranks.rendezvous`.
    """
    place = Place.from_environment()
    status = StatusWriter.from_environment(place.rank)
    status.start()
    try:
        with connected(place, status, collective_timeout(timeout), reduce_dtype) as ranks:
            status.progress("working")
            yield ranks
            status.progress("leaving")
    except BaseException as error:
        status.fail(error)
        raise
    status.finish()


@contextmanager
def connected(place: Place, status: StatusWriter, timeout: float, reduce_dtype: str | None = None) -> Iterator[Ranks]:
    """Meet the other ranks, and leave with them; see `Ranks.rendezvous`."""
    ranks = Ranks.rendezvous(place, status, timeout, reduce_dtype)
    try:
        yield ranks
        # A rank that leaves early would look like a dead one to peers that still compute.
        ranks.barrier()
    finally:
        ranks.close()


def _dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # numpy itself does not have it

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
