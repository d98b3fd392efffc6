"""The rendezvous of ranks without torch: rank 0 listens at an address that all know, and tells each of the others.

A call is one message: who is calling, of how many, and the rank's info. When all have called, or it is clear that they
will not, rank 0 answers all callers alike: with everybody's info, or with what is wrong. torchrun has a store for that,
and listens at the master's port itself, so there the infos go through it.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import zmq

from kraken_compiler.errors import KrakenError, RankFailedError, UsageError, first_line
from kraken_compiler.ranks.communicators.agreement import error_as_dict, error_from_dict
from kraken_compiler.ranks.communicators.peers import RankInfo

RENDEZVOUS = "KRAKEN_MEET"
"""Environment variable with HOST:PORT of the rendezvous."""

GRACE_SECONDS = 3.0
"""Seconds that rank 0 listens on when something is wrong, to tell those who call a little later."""

_VERSION = 6
_MOST_BYTES = 1 << 20
_OTHER_VERSION = "another version of kraken-compiler than"
_HINT = f"set {RENDEZVOUS} to rank 0's host and a free port there, HOST:PORT, the same on all ranks"


@dataclass(frozen=True)
class RendezvousPoint:
    """The address at which rank 0 listens. As text, HOST:PORT."""

    host: str
    port: int

    @classmethod
    def from_environment(cls) -> RendezvousPoint:
        """The point that `KRAKEN_MEET` names, or else `MASTER_ADDR` and `MASTER_PORT`.

        Raises:
            UsageError: Neither is set, or it is no host and port.
        """
        text = os.environ.get(RENDEZVOUS)
        if text is None:
            try:
                text = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            except KeyError as error:
                raise UsageError(f"the ranks cannot meet: {error.args[0]} is not set; {_HINT}") from None
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise UsageError(f"the ranks cannot meet at '{text}', which is no host and port; {_HINT}")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listen_endpoints(self) -> list[str]:
        """The endpoints at which rank 0 may listen; it takes the first that this machine has.

        What a name stands for here need not be what it stands for on other hosts, and behind a forwarded address there
        may be no interface of it; so then rank 0 listens on all interfaces.
        """
        every_interface = f"tcp://*:{self.port}"
        return [self.call_endpoint(), every_interface] if self._is_address() else [every_interface]

    def call_endpoint(self) -> str:
        """The endpoint to connect to."""
        return f"tcp://{RendezvousPoint('127.0.0.1', self.port) if self.host == 'localhost' else self}"

    def _is_address(self) -> bool:
        if self.host == "localhost":
            return True
        with suppress(ValueError):
            return bool(ip_address(self.host))
        return False


def rendezvous(rank: int, degree: int, point: RendezvousPoint, info: RankInfo, *, timeout: float) -> list[RankInfo]:
    """Meet the other ranks; all must call it together.

    Args:
        rank: This one.
        degree: How many there are.
        point: Where rank 0 listens.
        info: What the others are to know of this rank.
        timeout: Seconds that rank 0 waits for the others.

    Returns:
        Everybody's info, rank 0's first.

    Raises:
        RankFailedError: A rank did not come in time, or someone came who is none.
        UsageError: The ranks were not started as ranks of one run, or rank 0 cannot listen there.
    """
    call = {"version": _VERSION, "rank": rank, "degree": degree, "info": info}
    with zmq.Context() as context:
        if rank == 0:
            return _Host(context, degree, point, call).run(timeout)
        return _call(context, point, call, timeout + GRACE_SECONDS)


def rendezvous_in_store(rank: int, degree: int, info: RankInfo, *, timeout: float) -> list[RankInfo]:
    """Meet the other ranks of a torchrun in the store that its agent keeps; see `rendezvous`."""
    # Imported here: whoever was started otherwise may have no torch.
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    prefix = f"kraken/{_VERSION}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    peer = rank
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
        store.set(f"{prefix}/{rank}", json.dumps(info))
        infos = []
        for peer in range(degree):
            infos.append(json.loads(store.get(f"{prefix}/{peer}")))
    except DistError as error:
        reason = first_line(error)
        raise RankFailedError(
            f"rank {peer} did not come to torchrun's store within {timeout:g} s ({reason}); start all ranks with "
            "the same version, and --timeout SECONDS allows more"
        ) from error
    return infos


def has_store() -> bool:
    """True if torchrun started this process, and keeps a store for its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


@dataclass
class _Host:
    """Rank 0 at the rendezvous."""

    context: zmq.Context[zmq.Socket[bytes]]
    degree: int
    point: RendezvousPoint
    own_call: dict[str, Any]
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    callers: list[bytes] = field(default_factory=list)
    trouble: KrakenError | None = None

    def run(self, timeout: float) -> list[RankInfo]:
        self.calls[0] = self.own_call
        with self._listen() as router:
            self._take_calls(router, timeout)
            infos = [self.calls[rank]["info"] for rank in sorted(self.calls)]
            answer: dict[str, Any] = {"version": _VERSION, "infos": infos}
            if self.trouble is not None:
                answer = {"version": _VERSION, "trouble": error_as_dict(self.trouble)}
            for caller in self.callers:
                router.send_multipart([caller, json.dumps(answer).encode()])
        if self.trouble is not None:
            raise self.trouble
        return infos

    def _listen(self) -> zmq.Socket[bytes]:
        router = self.context.socket(zmq.ROUTER)
        _prepare(router)
        router.setsockopt(zmq.LINGER, round(GRACE_SECONDS * 1000))
        reason = ""
        for endpoint in self.point.listen_endpoints():
            try:
                router.bind(endpoint)
            except zmq.ZMQError as error:
                reason = _reason_of(error)
                if error.errno == zmq.EADDRNOTAVAIL:
                    continue
                break
            return router
        router.close()
        raise UsageError(f"rank 0 cannot listen at {self.point}: {reason}; {_HINT}")

    def _take_calls(self, router: zmq.Socket[bytes], timeout: float) -> None:
        """Listen until all ranks have called, or for as long as they may take."""
        deadline = time.monotonic() + timeout
        while len(self.calls) < self.degree:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not router.poll(max(1, round(remaining * 1000))):
                break
            caller, *content = router.recv_multipart()
            trouble = self._take(caller, content)
            if trouble is not None and self.trouble is None:
                self.trouble = trouble
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        missing_ranks = [str(rank) for rank in range(self.degree) if rank not in self.calls]
        if missing_ranks and self.trouble is None:
            name = f"rank{'s' * (len(missing_ranks) > 1)} {', '.join(missing_ranks)}"
            self.trouble = RankFailedError(f"{name} did not come to {self.point} within {timeout:g} s")

    def _take(self, caller: bytes, content: list[bytes]) -> KrakenError | None:
        """Take a call; returns what is wrong with it."""
        call = _parse(content)
        if call.get("version") != _VERSION and isinstance(call.get("rank"), int):
            self.callers.append(caller)
            return UsageError(f"rank {call.get('rank')} has {_OTHER_VERSION} rank 0 has")
        if call.get("version") != _VERSION or not _is_call(call):
            return RankFailedError(f"rank 0 was called by a stranger at {self.point}; {_HINT}")
        self.callers.append(caller)
        rank, degree = call["rank"], call["degree"]
        if degree != self.degree:
            return UsageError(
                f"rank {rank} was started with WORLD_SIZE={degree}, rank 0 with WORLD_SIZE={self.degree}; "
                f"if they belong to different runs, these need different ports"
            )
        if rank in self.calls:
            return UsageError(
                f"two processes came to {self.point} as rank {rank}; "
                f"if they belong to different runs, these need different ports"
            )
        self.calls[rank] = call
        return None


def _call(
    context: zmq.Context[zmq.Socket[bytes]], point: RendezvousPoint, call: dict[str, Any], timeout: float
) -> list[RankInfo]:
    """Meet as any other rank than 0."""
    rank = call["rank"]
    with context.socket(zmq.DEALER) as dealer:
        _prepare(dealer)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        try:
            dealer.connect(point.call_endpoint())
        except zmq.ZMQError as error:
            raise UsageError(f"rank {rank} cannot call {point}: {_reason_of(error)}; {_HINT}") from None
        dealer.send(json.dumps(call).encode())
        if not dealer.poll(round(timeout * 1000)):
            raise RankFailedError(f"rank {rank} called {point} and rank 0 did not answer within {timeout:g} s")
        answer = _parse(dealer.recv_multipart())
    if answer and answer["version"] != _VERSION:
        raise UsageError(f"rank {rank} has {_OTHER_VERSION} rank 0 has")
    if "trouble" in answer:
        raise error_from_dict(answer["trouble"])
    infos = answer.get("infos")
    if not isinstance(infos, list) or len(infos) != call["degree"]:
        raise RankFailedError(f"rank {rank} called {point}, and who answered is not rank 0 of this run; {_HINT}")
    return infos


def _prepare(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.IPV6, 1)
    # Strangers do not make this process allocate memory.
    socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)


def _reason_of(error: zmq.ZMQError) -> str:
    """The reason of an error, without the address that pyzmq puts behind it."""
    return zmq.strerror(error.errno or 0)


def _is_call(message: dict[str, Any]) -> bool:
    kinds = {"rank": int, "degree": int, "info": dict}
    return all(isinstance(message.get(name), kind) for name, kind in kinds.items())


def _parse(content: list[bytes]) -> dict[str, Any]:
    """A message of a rendezvous; empty if it is none."""
    with suppress(ValueError, RecursionError):
        message = json.loads(b"".join(content))
        if isinstance(message, dict) and isinstance(message.get("version"), int):
            return message
    return {}
