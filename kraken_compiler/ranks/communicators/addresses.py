"""The addresses at which peers reach a rank. Knows no torch."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""
_LINK_LOCAL = 0x20
"""The scope of IPv6 addresses that mean something only together with an interface of this host, in `if_inet6`."""


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
    """The interface's IPv4 address, or else an IPv6 one; its name if it has none.

    An IPv4 address comes first, because an interface usually has a link-local IPv6 one besides.
    """
    import fcntl

    request = struct.pack("256s", interface.encode()[:15])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
    except OSError:
        return next(iter(_ipv6_addresses(interface)), interface)
    return socket.inet_ntoa(reply[20:24])


def _ipv6_addresses(interface: str) -> list[str]:
    """The interface's IPv6 addresses that mean something on other hosts, in brackets."""
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    digits = [row[0] for row in rows if row[-1] == interface and int(row[3], 16) != _LINK_LOCAL]
    return [f"[{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))}]" for address in digits]


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


def is_loopback(host: str) -> bool:
    """True if only processes of this machine can connect to this address."""
    return host.startswith("127.") or host == "::1"
