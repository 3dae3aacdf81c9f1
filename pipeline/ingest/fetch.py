"""Bytes of a URL, from public addresses only, or the named reason why not.

The guard sits where a socket is made: whatever a URL, a name server or a redirect said, the very address that is about
to be connected is checked, so nothing can change between check and use.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from types import TracebackType
from typing import Any, Self

import aiohttp

from ldm.config import Config
from pipeline.store.schema import Reject, SourceRow

CHUNK_BYTES = 1 << 16
TRANSIENT_REASONS = frozenset({"timeout", "connection", "dns", "http_429", "http_500", "http_502", "http_503"})
"""Reasons that a second attempt may not meet again."""

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses that a gateway turns into IPv4 ones (RFC 6052)."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig(Config):
    """How images are fetched from the network."""

    timeout_seconds: float = 10.0
    """Time for one whole download, redirects included."""
    num_attempts: int = 2
    """Tries for a cause that may pass, such as a time-out."""
    max_bytes: int = 20_000_000
    """Longer answers are given up."""
    max_redirects: int = 5
    """Redirects followed, each address checked anew."""
    num_connections: int = 64
    """Downloads at once in one worker."""
    allowed_networks: tuple[str, ...] = ()
    """Private networks that may be fetched from after all, such as 10.1.0.0/16."""
    user_agent: str = "latent-diffusion-pipeline/1"
    """What the fetcher calls itself to servers."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing passes and networks that are none."""
        for name in ("timeout_seconds", "num_attempts", "max_bytes", "num_connections"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.max_redirects < 0:
            raise ValueError(f"max_redirects must be at least 0, got {self.max_redirects}")
        for network in self.allowed_networks:
            ipaddress.ip_network(network)


class RefusedAddress(Exception):  # noqa: N818 - it names what was refused; not an OSError, which aiohttp would retry
    """The address that a URL leads to is not a public one."""


class Fetcher:
    """Downloads in a thread of its own while its caller decodes what came before."""

    def __init__(self, config: FetchConfig) -> None:
        """Keep the configuration; the thread starts with the `with` block."""
        self.config = config
        self.networks = tuple(ipaddress.ip_network(network) for network in config.allowed_networks)
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, daemon=True)
        self.session: aiohttp.ClientSession | None = None

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def fetch(self, url: str) -> bytes | Reject:
        """Return the bytes of one URL, or why there are none."""
        return asyncio.run_coroutine_threadsafe(self._fetch(url), self.loop).result()

    def payloads(self, rows: Iterable[SourceRow]) -> Iterator[tuple[SourceRow, bytes | Reject]]:
        """Yield each row with its image's bytes, in the order of the rows, downloading ahead of the caller."""
        pending: deque[tuple[SourceRow, Future[bytes | Reject]]] = deque()
        for row in rows:
            pending.append((row, self._start(row)))
            if len(pending) > 2 * self.config.num_connections:
                first, download = pending.popleft()
                yield first, download.result()
        for first, download in pending:
            yield first, download.result()

    def _start(self, row: SourceRow) -> Future[bytes | Reject]:
        if row.payload is None and row.url:
            return asyncio.run_coroutine_threadsafe(self._fetch(row.url), self.loop)
        done: Future[bytes | Reject] = Future()
        done.set_result(Reject("no_image") if row.payload is None else row.payload)
        return done

    async def _fetch(self, url: str) -> bytes | Reject:
        outcome: bytes | Reject = Reject("timeout")
        for _ in range(self.config.num_attempts):
            outcome = await self._attempt(url)
            if not isinstance(outcome, Reject) or outcome.reason not in TRANSIENT_REASONS:
                break
        return outcome

    async def _attempt(self, url: str) -> bytes | Reject:
        try:
            # aiohttp gives up at its limit, not beyond it
            async with self._open_session().get(url, max_redirects=self.config.max_redirects + 1) as response:
                if response.status != 200:
                    return Reject(f"http_{response.status}", str(response.url))
                return await self._content(response)
        except (aiohttp.ClientError, RefusedAddress, TimeoutError, OSError, ValueError) as error:
            return Reject(_reason(error), f"{type(error).__name__}: {error}"[:200])

    async def _content(self, response: aiohttp.ClientResponse) -> bytes | Reject:
        content = bytearray()
        if (response.content_length or 0) > self.config.max_bytes:
            return Reject("too_large", f"{response.content_length} bytes announced")
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            content += chunk
            if len(content) > self.config.max_bytes:
                return Reject("too_large", f"more than {self.config.max_bytes} bytes")
        return bytes(content)

    def _open_session(self) -> aiohttp.ClientSession:
        if self.session is None:
            # Addresses are tried one after another: in a race of several, a refused one would be lost among the others.
            connector = aiohttp.TCPConnector(
                limit=self.config.num_connections, socket_factory=self._guarded_socket, happy_eyeballs_delay=None
            )
            self.session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=self.config.timeout_seconds),
                headers={"User-Agent": self.config.user_agent, "Accept-Encoding": "identity"},
                auto_decompress=False,  # an answer may unpack to a thousand times its size
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self.session

    def _guarded_socket(self, address_info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = address_info
        if not self._is_allowed(address[0]):
            raise RefusedAddress(f"{address[0]} is not a public address")
        return socket.socket(family=family, type=kind, proto=protocol)

    def _is_allowed(self, host: str) -> bool:
        address = _reached(ipaddress.ip_address(host.partition("%")[0]))
        is_public = address.is_global and not address.is_multicast
        return is_public or any(address in network for network in self.networks)

    async def _close(self) -> None:
        unfinished = asyncio.all_tasks() - {asyncio.current_task()}
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        if self.session is not None:
            await self.session.close()


def _reached(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for (mapped, 6to4, Teredo, NAT64), else itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)


def _reason(error: Exception) -> str:
    """Return the word under which a failed download is counted."""
    match error:
        case RefusedAddress():
            return "refused_address"
        case TimeoutError():
            return "timeout"
        case aiohttp.ClientConnectorDNSError():
            return "dns"
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return "tls"
        case aiohttp.TooManyRedirects():
            return "too_many_redirects"
        case aiohttp.NonHttpUrlClientError():
            return "not_http"
        case aiohttp.InvalidURL():
            return "bad_url"
        case aiohttp.ClientPayloadError():
            return "cut_off"
        case aiohttp.ClientConnectionError() | OSError():
            return "connection"
        case aiohttp.ClientError():
            return "bad_answer"
        case _:
            return "bad_url"
