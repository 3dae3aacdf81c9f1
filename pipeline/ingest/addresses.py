"""Which network addresses may be connected to: public ones, on ports where the web is served.

The guard sits where a socket is made: whatever a URL, a name server or a redirect said, the very address that is about
to be connected is checked, so nothing can change between check and use (DNS rebinding). Names are filtered once more
where they are looked up, so that a name with a public and a private address is fetched from the public one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses that a gateway turns into IPv4 ones (RFC 6052)."""

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that was ever given out for public hosts; site-local, compatible and reserved addresses are outside."""

REFUSED_NETWORKS: tuple[Network, ...] = (
    ipaddress.ip_network("192.0.0.0/24"),  # IETF protocol assignments; a cloud's metadata server at .192
    ipaddress.ip_network("192.88.99.0/24"),  # relays of 6to4, deprecated by RFC 7526
    ipaddress.ip_network("168.63.129.16/32"),  # a cloud's host agent: a public number that every guest reaches
    ipaddress.ip_network("2001::/23"),  # Teredo and other protocol assignments
    ipaddress.ip_network("2002::/16"),  # 6to4: an IPv4 address in disguise
    ipaddress.ip_network("3fff::/20"),  # documentation (RFC 9637)
)
"""What `ipaddress` calls global, in some Python version at least, and no picture is served from."""

WEB_PORTS = frozenset({80, 443})
MAX_SYSTEM_PORT = 1023
SERVICE_PORTS = frozenset(
    {
        *(1080, 1433, 1521, 1719, 1720, 1723, 2049, 2375, 2376, 2379, 2380, 3128, 3306, 3389, 3659, 4045, 4190, 5060),
        *(5061, 5432, 5672, 5900, 5984, 6000, 6379, 6443, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 9042, 9092),
        *(9200, 9300, 10080, 10250, 11211, 27017),
    }
)
"""Databases, queues, cluster agents and what browsers refuse: an odd request can do harm there."""

_DIGITS = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)


class RefusedAddress(Exception):  # noqa: N818 - it names what was refused; not an OSError, which aiohttp would retry
    """The address that a URL leads to is not a public one."""


class RefusedPort(Exception):  # noqa: N818 - as above
    """The port of a URL is one that pictures are not served on."""


class LookupTimedOut(Exception):  # noqa: N818 - not a TimeoutError, which aiohttp would turn into one of connecting
    """No name server answered in time."""


class AddressGuard:
    """Makes sockets for public addresses and refuses the rest."""

    def __init__(self, allowed_networks: Sequence[str] = (), allowed_ports: Sequence[int] = ()) -> None:
        """Keep what is allowed beyond public addresses and the usual ports.

        Raises:
            ValueError: if a network is none.
        """
        self.networks = tuple(ipaddress.ip_network(network) for network in allowed_networks)
        self.ports = WEB_PORTS | frozenset(allowed_ports)

    def open_socket(self, address_info: tuple[Any, ...]) -> socket.socket:
        """Return a socket for one checked address; aiohttp connects it to this address and no other.

        Raises:
            RefusedAddress: if the address is not public.
            RefusedPort: if the port is not one for pictures.
        """
        family, kind, protocol, _, (host, port, *_) = address_info
        if not self.allows_port(port):
            raise RefusedPort(f"port {port} is not one that pictures are served on")
        if not self.allows(host):
            raise RefusedAddress(f"{host} is not a public address")
        return socket.socket(family=family, type=kind, proto=protocol)

    def allows(self, host: str) -> bool:
        """Return whether the numeric address `host` may be connected to."""
        address = ipaddress.ip_address(host.partition("%")[0])
        reached = reached_address(address)
        is_allowed = any(one in network for network in self.networks for one in (address, reached))
        return is_allowed or is_public(reached)

    def allows_port(self, port: int) -> bool:
        """Return whether `port` may be connected to: 80, 443, and ports from 1024 that no known service listens on."""
        return port in self.ports or (port > MAX_SYSTEM_PORT and port not in SERVICE_PORTS)


class GuardedResolver(AbstractResolver):
    """Looks names up through another resolver, in bounded time, and drops the addresses that the guard refuses."""

    def __init__(self, resolver: AbstractResolver, guard: AddressGuard, timeout_seconds: float) -> None:
        self.resolver = resolver
        self.guard = guard
        self.timeout_seconds = timeout_seconds

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of `host` that may be connected to.

        Raises:
            RefusedAddress: if it has addresses, and all are refused.
            LookupTimedOut: if nobody answered in time.
            OSError: if the name does not exist, or could not be looked up.
        """
        try:
            async with asyncio.timeout(self.timeout_seconds):
                found = await self.resolver.resolve(host, port, family)
        except TimeoutError as error:
            raise LookupTimedOut(f"no answer about {host} in {self.timeout_seconds} s") from error
        allowed = [result for result in found if self.guard.allows(result["host"])]
        if not found:
            raise socket.gaierror(socket.EAI_NODATA, f"{host} has no address")
        if not allowed:
            raise RefusedAddress(f"{host} leads to {found[0]['host']}, which is not a public address")
        return allowed

    async def close(self) -> None:
        """Close the resolver behind."""
        await self.resolver.close()


def is_public(address: Address) -> bool:
    """Return whether `address` is one that anybody on the internet may serve pictures from."""
    if address.version == 6 and address not in GLOBAL_UNICAST:
        return False
    is_refused = any(address in network for network in REFUSED_NETWORKS)
    return address.is_global and not address.is_multicast and not is_refused


def is_disguised(host: str) -> bool:
    """Return whether a URL's host would be read as a number by some programs, without being four plain bytes.

    As browsers see it (WHATWG URL, "ends in a number"): 2130706433, 0x7f.1, 0177.0.0.1 and 127.1 are all addresses.
    """
    if not _DIGITS.fullmatch(host.rstrip(".").rpartition(".")[2]):
        return False
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return True
    return False


def reached_address(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for where a kernel or gateway maps it, else itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address
