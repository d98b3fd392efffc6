"""`ArrayCommunicator`: sums and gathers of numpy arrays, for ranks that have no torch.

It sends messages with ZeroMQ: that is maintained, comes as a wheel, and moves bytes in a thread of its own while this
rank computes. mpi4py would need an MPI installation and its launcher, and MPI makes progress inside of its calls only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kraken_compiler.communicators.addresses import bind_host
from kraken_compiler.communicators.agreement import Claims
from kraken_compiler.communicators.exchange import Exchange, Sending
from kraken_compiler.communicators.meeting import MeetingPoint, meet
from kraken_compiler.communicators.peers import Card
from kraken_compiler.errors import UsageError

Array = npt.NDArray[Any]

Handle = tuple[Sending | None, Array, np.dtype[Any]]
"""The part on its way (None: nothing is), the part as it is sent, the sum's dtype."""


class ArrayCommunicator:
    """Sums and gathers arrays over the ranks, by exchanging parts directly; see `base.Communicator`.

    Every rank must call the same operations in the same order, except that waits may come in any order. A sum is in
    flight from `start` to `wait`; any number may be. One thread at a time.

    Parts are added in the order of the ranks and in the array's dtype, so all ranks get the same bits. A rank sends
    (N-1) times the payload, where a ring would send 2 (N-1) / N times: the same for two ranks, more for many.

    Attributes:
        rank: This rank's number, which is its lane's.
        degree: Number of ranks.
        reduce_dtype: To which every rank rounds its part of a sum before it is sent; None sends it as it is.
        identical_on_all_ranks: True: a sum is the same on all ranks to the last bit.
    """

    identical_on_all_ranks = True

    def __init__(
        self, rank: int, degree: int, exchange: Exchange | None, reduce_dtype: npt.DTypeLike | None = None
    ) -> None:
        """Use connections that are there, see `from_environment`.

        Args:
            rank: This one.
            degree: How many there are.
            exchange: Connects them; None for a single one.
            reduce_dtype: To which parts are rounded before they are sent; None leaves them.
        """
        assert (exchange is None) == (degree == 1), "ranks need connections if there are several"
        self.rank = rank
        self.degree = degree
        self.reduce_dtype = None if reduce_dtype is None else np.dtype(reduce_dtype)
        self._exchange = exchange

    @classmethod
    def from_environment(
        cls,
        *,
        timeout: float,
        claims: Claims | None = None,
        reduce_dtype: npt.DTypeLike | None = None,
    ) -> Self:
        """Meet the ranks that were started with this one; all must do so together.

        Which rank of how many this is say `RANK` and `WORLD_SIZE`; where rank 0 listens says `KRAKEN_MEET` as
        HOST:PORT, or else `MASTER_ADDR` and `MASTER_PORT`. Under torchrun it must be `KRAKEN_MEET`, since torchrun
        itself listens at `MASTER_PORT`. A single rank meets nobody.

        Args:
            timeout: Seconds without an answer after which a peer counts as dead.
            claims: What must be the same on all ranks, such as a hash of the program, or why this one cannot take part,
                which is told to the others and raised.
            reduce_dtype: To which parts are rounded before they are sent; None leaves them.

        Raises:
            UsageError: The environment does not say which rank this is or where to meet, the ranks were not started as
                ranks of one run, they differ in `claims`, or an address cannot be used.
            InputFileError: The ranks have different artifacts.
            RankFailedError: A rank did not come in time, or someone came who is none.
        """
        claims = claims or Claims()
        rank, degree = _place()
        if degree == 1:
            if claims.trouble is not None:
                raise claims.trouble
            return cls(rank, degree, None, reduce_dtype)
        point = MeetingPoint.from_environment()

        def swap(own: Card) -> list[Card]:
            return meet(rank, degree, point, own, claims=claims, timeout=timeout)

        return cls(rank, degree, Exchange(rank, degree, bind_host(point.host), swap, timeout), reduce_dtype)

    def start(self, x: Array) -> Handle:
        """Begin the sum of `x` over the ranks.

        Args:
            x: This rank's part, same shape and dtype on all ranks. It must not change until `wait` returns.

        Returns:
            A handle, to be given to `wait` once.

        Raises:
            RankFailedError: A peer went away.
        """
        part = np.asarray(x, order="C")
        dtype = self.reduce_dtype
        if dtype is not None and dtype.itemsize < part.itemsize and part.dtype.kind not in "biu":
            part = part.astype(dtype)
        return self._send(part), part, x.dtype

    def wait(self, handle: Handle, out: Array | None = None) -> Array:
        """The finished sum.

        Args:
            handle: What `start` returned.
            out: Where to put it, with the shape and dtype of the part; it must share no memory with any part in flight.
                None makes a new array.

        Returns:
            The sum, with the shape and dtype of the part; it shares no memory with the part.

        Raises:
            RankFailedError: A peer went away or did not answer in time.
        """
        sending, part, dtype = handle
        total = np.empty(part.shape, dtype) if out is None else out
        assert (total.shape, total.dtype) == (part.shape, dtype), "a sum has the shape and dtype of its parts"
        if sending is None:
            np.copyto(total, part)
            return total
        first, *others = (
            other if other.dtype == dtype else other.astype(dtype) for other in self._receive(sending, part)
        )
        np.add(first, others[0], out=total)
        for other in others[1:]:
            np.add(total, other, out=total)
        self._require_sent(sending)
        return total

    def all_gather(self, x: Array, axis: int) -> Array:
        """Concatenate the ranks' parts along `axis`, rank 0 first; `degree` times as long there. Never rounded.

        Args:
            x: This rank's part, same shape and dtype on all ranks.
            axis: May count from the end.

        Raises:
            RankFailedError: A peer went away or did not answer in time.
        """
        part = np.asarray(x, order="C")
        sending = self._send(part)
        if sending is None:
            return np.concatenate([part] * self.degree, axis)
        whole = np.concatenate(self._receive(sending, part), axis)
        self._require_sent(sending)
        return whole

    def broadcast(self, content: bytes | None) -> bytes:
        """Rank 0's bytes on all ranks. Rank 0 does not wait for the others to take them.

        Args:
            content: The bytes on rank 0; ignored elsewhere.

        Raises:
            RankFailedError: A peer went away or did not answer in time.
        """
        if self.rank != 0:
            assert self._exchange is not None
            return self._exchange.receive_only(0)
        assert content is not None, "rank 0 must say what to broadcast"
        if self.degree > 1:
            assert self._exchange is not None, "this communicator was closed"
            self._exchange.send_only(content)
        return content

    def barrier(self) -> None:
        """Return when all ranks have come here.

        Raises:
            RankFailedError: A peer went away or did not come in time.
        """
        if self.degree > 1:
            assert self._exchange is not None, "this communicator was closed"
            self._exchange.receive(self._exchange.send(b"", 0))

    def close(self) -> None:
        """Disconnect; a second call does nothing. It cannot be used afterwards."""
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def _send(self, part: Array) -> Sending | None:
        """Send a contiguous part to every peer; None if there is nothing to send or nobody to send it to."""
        if self.degree == 1 or not part.size:
            return None
        assert self._exchange is not None, "this communicator was closed"
        # As bytes, because the types that numpy itself does not have cannot be looked at through a buffer.
        return self._exchange.send(part.reshape(-1).view(np.uint8), part.nbytes)

    def _receive(self, sending: Sending, part: Array) -> Sequence[Array]:
        """All ranks' parts, rank 0 first; the peers' in the memory of their messages."""
        assert self._exchange is not None
        frames = self._exchange.receive(sending)
        others = [np.frombuffer(frame.buffer, part.dtype).reshape(part.shape) for frame in frames]
        return [*others[: self.rank], part, *others[self.rank :]]

    def _require_sent(self, sending: Sending) -> None:
        assert self._exchange is not None
        self._exchange.require_sent(sending)


def _place() -> tuple[int, int]:
    """Rank and number of ranks, as the environment says.

    Raises:
        UsageError: It does not.
    """
    try:
        rank, degree = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as error:
        raise UsageError(
            f"{error.args[0]} is not set; start this through kraken-run, or set RANK and WORLD_SIZE"
        ) from None
    except ValueError:
        raise UsageError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are no whole numbers"
        ) from None
    if not 0 <= rank < degree:
        raise UsageError(f"RANK={rank} is none of WORLD_SIZE={degree} ranks, which are numbered from 0")
    return rank, degree
