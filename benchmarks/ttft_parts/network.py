"""The hosts: network namespaces joined by links whose rate can be changed while the ranks run.

Two hosts are joined by one veth pair; more by a bridge, which lives in a namespace of its own so that the machine's
own network is not touched. A link is limited at both ends by a token bucket (`tc ... tbf`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

UNLIMITED = "unlimited"

_PREFIX = "krakenbench"
_ADDRESS = "10.88.0.{}"
_QUEUE_SECONDS = 0.5
"""How long a packet may wait for its turn. TCP keeps megabytes in flight; a short queue would drop them."""
_BURST_SECONDS = 200e-6
"""A bucket holds what the link carries in this time: the timer that refills it is no finer at 10 Gbit/s."""
_LEAST_BURST = 80_000
"""Bytes; a bucket must hold one segment (64 KiB) as the kernel hands it over, or it is cut up, which costs CPU time."""


def gbits(link: str) -> float | None:
    """The rate a link's name stands for, in Gbit/s; None for the unlimited one.

    Raises:
        ValueError: It is neither a positive number nor `unlimited`.
    """
    if link == UNLIMITED:
        return None
    rate = float(link)
    if not rate > 0:
        raise ValueError(f"a link's rate is a number of Gbit/s above 0, or '{UNLIMITED}', not '{link}'")
    return rate


@dataclass
class Network:
    """Where the ranks run.

    Attributes:
        kind: `namespaces` or `loopback`, with the reason for the latter.
        interface: The network device that gloo binds to, in every host.
        address: Of the first host.
    """

    kind: str
    interface: str
    address: str
    note: str = ""
    _hosts: tuple[str, ...] = ()
    _limited: list[tuple[str, str]] = field(default_factory=list)

    @property
    def can_limit(self) -> bool:
        return bool(self._limited)

    def command(self, rank: int, command: list[str]) -> list[str]:
        """The command as it is started on a rank's host."""
        return ["ip", "netns", "exec", self._hosts[rank], *command] if self._hosts else command

    def set_link(self, link: str) -> None:
        """Give every link this rate, in both directions."""
        rate = gbits(link)
        for namespace, device in self._limited:
            if rate is None:
                _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root", check=False)
                continue
            burst = max(_LEAST_BURST, round(rate * 1e9 / 8 * _BURST_SECONDS))
            limit = max(burst, round(rate * 1e9 / 8 * _QUEUE_SECONDS))
            bucket = ("rate", f"{round(rate * 1e9)}bit", "burst", str(burst), "limit", str(limit))
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *bucket)


@contextmanager
def network(hosts: int, wanted: str = "auto") -> Iterator[Network]:
    """Hosts for as many ranks, gone when the context ends, however it ends.

    Args:
        hosts: How many.
        wanted: `namespaces`, `loopback`, or `auto`: namespaces where they can be made.

    Raises:
        RuntimeError: Namespaces are demanded and cannot be made.
    """
    reason = "asked for" if wanted == "loopback" else _obstacle()
    if reason is None:
        with _namespaces(hosts) as made:
            yield made
        return
    if wanted == "namespaces":
        raise RuntimeError(f"no network namespaces: {reason}")
    yield Network("loopback", "lo", "127.0.0.1", f"loopback, unlimited link only: {reason}")


def _obstacle() -> str | None:
    """Why there can be no namespaces; None if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (iproute2)"
    _remove_leftovers()
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "-n", probe, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
        bucket = ("rate", "1gbit", "burst", "80000", "limit", "1000000")
        _run("tc", "-n", probe, "qdisc", "replace", "dev", "probe0", "root", "tbf", *bucket)
    except RuntimeError as error:
        return str(error)
    finally:
        _run("ip", "netns", "del", probe, check=False)
    return None


def _namespaces(hosts: int) -> AbstractContextManager[Network]:
    return _pair() if hosts == 2 else _star(hosts)


@contextmanager
def _pair() -> Iterator[Network]:
    first, second = names = _names(2)
    with _removed_after(names):
        _add(names)
        _run("ip", "-n", first, "link", "add", "veth", "type", "veth", "peer", "name", "veth", "netns", second)
        _up(names)
        yield Network("namespaces", "veth", _ADDRESS.format(1), "", names, [(name, "veth") for name in names])


@contextmanager
def _star(hosts: int) -> Iterator[Network]:
    *names, switch = all_names = _names(hosts + 1)
    with _removed_after(all_names):
        _add(all_names)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for index, name in enumerate(names):
            peer = ("peer", "name", f"port{index}", "netns", switch)
            _run("ip", "-n", name, "link", "add", "veth", "type", "veth", *peer)
            _run("ip", "-n", switch, "link", "set", f"port{index}", "master", "bridge", "up")
        _up(tuple(names))
        # The switch's ports limit what comes in, as the hosts' ends limit what goes out.
        limited = [(name, "veth") for name in names] + [(switch, f"port{index}") for index in range(hosts)]
        yield Network("namespaces", "veth", _ADDRESS.format(1), "", tuple(names), limited)


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"{_PREFIX}-{os.getpid()}-{index}" for index in range(count))


def _add(names: tuple[str, ...]) -> None:
    for name in names:
        _run("ip", "netns", "add", name)


def _up(names: tuple[str, ...]) -> None:
    for index, name in enumerate(names):
        _run("ip", "-n", name, "addr", "add", f"{_ADDRESS.format(index + 1)}/24", "dev", "veth")
        _run("ip", "-n", name, "link", "set", "veth", "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")


@contextmanager
def _removed_after(names: tuple[str, ...]) -> Iterator[None]:
    """Their devices go with them."""
    try:
        yield
    finally:
        for name in names:
            _run("ip", "netns", "del", name, check=False)


def _remove_leftovers() -> None:
    """Namespaces of a run that was killed before it could clean up; the names say whose they are."""
    for name in re.findall(rf"^{_PREFIX}-\d+-\w+", _run("ip", "netns", "list"), re.MULTILINE):
        if not os.path.exists(f"/proc/{name.split('-')[1]}"):
            _run("ip", "netns", "del", name, check=False)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
