"""One message socket to every peer: who they are, where they are, and what has come from them."""

from __future__ import annotations

import json
import secrets
import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
import zmq

from kraken_compiler.communicators.addresses import bind_host, is_loopback, network_id
from kraken_compiler.errors import RankFailedError, UsageError

_LOOK_MILLISECONDS = 200
"""How often a rank that waits looks whether its peer is still connected."""
_SOCKET_BUFFER_BYTES = 4 << 20
_LINGER_MILLISECONDS = 10_000
_PEER_BYTES = 128


class Peer:
    """The connection to one peer. What comes on it is numbered from 0 in the order in which the peer sent it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], own: int, rank: int, timeout: float) -> None:
        self.rank = rank
        self.token = b""
        self._own = own
        self._timeout = timeout
        self._next = 0
        self._early: dict[int, zmq.Frame] = {}
        socket = self._socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.SNDBUF, _SOCKET_BUFFER_BYTES)
        socket.setsockopt(zmq.RCVBUF, _SOCKET_BUFFER_BYTES)
        # Closing sends what is left, but waits for no peer for ever.
        socket.setsockopt(zmq.LINGER, _LINGER_MILLISECONDS)
        # A peer that is gone stays gone: what was lost with it would be missing in the sums.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.RCVTIMEO, _LOOK_MILLISECONDS)
        socket.setsockopt(zmq.SNDTIMEO, _LOOK_MILLISECONDS)
        socket.copy_threshold = 0
        self._events = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def bind(self, host: str) -> str:
        """Be there for the peer at a free port; returns the endpoint."""
        self._socket.bind(f"tcp://{host}:*")
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def connect(self, endpoint: str) -> None:
        """Connect to where the peer is."""
        self._socket.connect(endpoint)

    def send(self, content: Any, copy: bool = True) -> None:
        """Send a message; without `copy` it is sent from where it lies, later.

        Raises:
            RankFailedError: The peer is gone, or did not connect for as long as collectives may take.
        """
        deadline = 0.0
        while True:
            with suppress(zmq.Again):
                self._socket.send(content, copy=copy)
                return
            # Only a socket without a connection does not take a message.
            deadline = self._require_alive(deadline)

    def frame(self, number: int) -> zmq.Frame:
        """The message of that number.

        Raises:
            RankFailedError: The peer is gone, or sent nothing for as long as collectives may take.
        """
        early = self._early.pop(number, None)
        if early is not None:
            return early
        assert number >= self._next, f"message {number} of rank {self.rank} was taken before"
        deadline = 0.0
        while True:
            frame = None
            with suppress(zmq.Again):
                frame = self._socket.recv(copy=False)
            if frame is None:
                deadline = self._require_alive(deadline)
                continue
            found, self._next = self._next, self._next + 1
            if found == number:
                return frame
            self._early[found] = frame

    def _require_alive(self, deadline: float) -> float:
        """Look at a connection on which nothing happens; returns when to give up."""
        reason = ""
        if self._events.poll(0) and not self._socket.poll(0):
            reason = f"connection closed by peer: rank {self.rank} went away while rank {self._own} needed its part"
        elif deadline and time.monotonic() > deadline:
            reason = f"rank {self._own} timed out waiting for rank {self.rank}: nothing came for {self._timeout:g} s"
        if reason:
            self._socket.setsockopt(zmq.LINGER, 0)
            raise RankFailedError(reason)
        return deadline or time.monotonic() + self._timeout

    def close(self) -> None:
        self._socket.disable_monitor()
        self._events.close(0)
        self._socket.close()


def meet_peers(context: zmq.Context[zmq.Socket[bytes]], group: dist.ProcessGroup, timeout: float) -> list[Peer]:
    """Connect every rank of a group to every other; all must call it together.

    Addresses travel through the group. The first message on every connection is a random token from there, so that no
    stranger is taken for a peer.

    Args:
        context: Where the sockets are made.
        group: The ranks.
        timeout: Seconds without an answer after which a peer counts as dead.

    Returns:
        The peers in the order of their ranks, without this one.

    Raises:
        RankFailedError: A peer did not connect in time, or someone else did.
        UsageError: Ranks of several hosts would meet at a loopback address.
    """
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    host = bind_host(group)
    peers = [Peer(context, rank, other, timeout) for other in range(degree) if other != rank]
    endpoints = {peer.rank: peer.bind(host) for peer in peers if peer.rank > rank}
    token = secrets.token_hex(8)
    cards = _exchange({"token": token, "network": network_id(), "endpoints": endpoints}, group)
    for peer in peers:
        card = cards[peer.rank]
        peer.token = card["token"].encode()
        if peer.rank < rank:
            endpoint = card["endpoints"][str(rank)]
            if is_loopback(endpoint) and card["network"] != cards[rank]["network"]:
                raise UsageError(
                    f"rank {peer.rank} is on another host, but would be reached at {endpoint}; set GLOO_SOCKET_IFNAME "
                    f"there to the network interface that connects the hosts"
                )
            peer.connect(endpoint)
    for peer in peers:
        peer.send(token.encode())
    for peer in peers:
        if peer.frame(0).bytes != peer.token:
            raise RankFailedError(f"rank {rank} was called by a stranger where it expected rank {peer.rank}")
    return peers


def _exchange(card: dict[str, Any], group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Every rank's card, as JSON through the group."""
    degree = dist.get_world_size(group)
    text = json.dumps(card).encode().ljust(_PEER_BYTES * (degree + 2))
    assert len(text) == _PEER_BYTES * (degree + 2), "a rank's card is longer than planned"
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor(list(text), dtype=torch.uint8, device=device)
    all_cards = [torch.empty_like(mine) for _ in range(degree)]
    dist.all_gather(all_cards, mine, group=group)
    return [json.loads(bytes(other.tolist())) for other in all_cards]
