"""The addresses at which peers reach a rank. Knows no torch."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""


def bind_host(master: str) -> str:
    """The interface or address that peers reach this rank at.

    `GLOO_SOCKET_IFNAME` names it, so that it is the one that a process group uses; else it is the address that packets
    to the master come from.

    Args:
        master: Name or address of the host at which the ranks meet.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface:
        return _address_of(interface)
    try:
        family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            host = str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _address_of(interface: str) -> str:
    """The interface's IPv4 address; its name if it has none, for ZeroMQ to make sense of.

    ZeroMQ does not find the address itself where an interface also has a link-local IPv6 one.
    """
    import fcntl

    request = struct.pack("256s", interface.encode()[:15])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
    except OSError:
        return interface
    return socket.inet_ntoa(reply[20:24])


def network_id() -> str:
    """An identifier that two processes share only if they share their network interfaces: loopback connects them."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/net")
    if boot.exists():
        parts.append(boot.read_text().strip())
    if namespace.exists():
        parts.append(str(namespace.stat().st_ino))
    return "/".join(parts)


def host_of(endpoint: str) -> str:
    """The host of `tcp://HOST:PORT`; where it is an IPv4 address in IPv6's form, as ZeroMQ writes it, that address."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]").removeprefix("::ffff:")


def is_loopback(endpoint: str) -> bool:
    """True if only processes of this machine can connect to `tcp://HOST:PORT`."""
    host = host_of(endpoint)
    return host.startswith("127.") or host == "::1"
