"""One URL → its bytes, or the named reason why not.

Order of an attempt: URL → gates → connection (guarded) → status and opt-out → redirect: again from the URL, or bytes →
undo a compression that nobody asked for. Order of a URL: attempt → if the cause may pass, back off → attempt again.
"""

from __future__ import annotations

import asyncio
import re
import string
import zlib
from dataclasses import dataclass
from urllib.parse import quote

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from ldm.config import Config
from pipeline.ingest.addresses import (
    AddressGuard,
    GuardedResolver,
    LookupTimedOut,
    RefusedAddress,
    RefusedPort,
    is_disguised,
)
from pipeline.ingest.admission import Turn
from pipeline.ingest.optouts import DEFAULT_DIRECTIVES, opt_out_of, robot_name
from pipeline.ingest.outcomes import NO_CONTACT_REASONS, TRANSIENT_REASONS, reject, reject_error, reject_status
from pipeline.ingest.retries import backoff_seconds, retry_after_seconds
from pipeline.store.schema import Reject

MAX_URL_CHARS = 8192
"""Servers refuse longer ones; in a listing they are `data:` or broken lines."""
READ_BYTES = 1 << 16
"""What a stream holds before its socket is paused."""
KEEP_ALIVE_SECONDS = 5.0
"""How long an idle connection waits for the next row of its host."""
MAX_CACHED_NAMES = 10_000
REDIRECTS = (301, 302, 303, 307, 308)
GZIP_OR_ZLIB = zlib.MAX_WBITS | 32

_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*(%[a-z0-9._~-]+)?", re.IGNORECASE)
_ERRORS = (aiohttp.ClientError, RefusedAddress, RefusedPort, LookupTimedOut, TimeoutError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig(Config):
    """How images are fetched from the network."""

    connect_timeout_seconds: float = 5.0
    """Time to look a name up, and again to connect, TLS included."""
    read_timeout_seconds: float = 10.0
    """Longest silence of a server."""
    timeout_seconds: float = 20.0
    """Time for one attempt, redirects included."""
    deadline_seconds: float = 60.0
    """Time for one row in all, every attempt and the waits between them included."""
    num_attempts: int = 3
    """Tries for a cause that may pass, such as a time-out."""
    backoff_seconds: float = 0.5
    """Longest wait before the second attempt; it doubles for every further one, and its jitter goes down to none."""
    max_backoff_seconds: float = 10.0
    """Longest wait between two attempts by our own choice."""
    max_retry_after_seconds: float = 30.0
    """Longest wait that a server may ask for; where it asks for more, the row is given up."""
    seed: int = 0
    """Seed of the jitter."""
    max_host_failures: int = 10
    """Attempts in a row that may fail to reach a host before its other rows are given up without asking."""
    max_bytes: int = 20_000_000
    """Longer answers are given up."""
    max_redirects: int = 5
    """Redirects followed, each address checked anew."""
    num_connections: int = 256
    """Downloads at once in one worker."""
    num_connections_per_host: int = 8
    """Downloads at once from one host and port."""
    num_rows_ahead: int = 2048
    """Rows begun before the first of them is taken, so that a slow one does not hold the others up."""
    max_buffer_bytes: int = 268_435_456
    """Memory for downloads that are under way or not taken yet; the row to be taken next may go beyond."""
    num_lookups: int = 64
    """Names looked up at once."""
    dns_cache_seconds: int = 60
    """How long an address of a name is used again."""
    allowed_networks: tuple[str, ...] = ()
    """Private networks that may be fetched from after all, such as 10.1.0.0/16."""
    allowed_ports: tuple[int, ...] = ()
    """Ports to allow beyond 80, 443 and those from 1024 that no known service other than the web listens on."""
    opt_out_directives: tuple[str, ...] = DEFAULT_DIRECTIVES
    """Words of an X-Robots-Tag header that a picture is left out for."""
    user_agent: str = "latent-diffusion-pipeline/1"
    """What the fetcher calls itself to servers; rules for its first word are followed."""
    contact: str = ""
    """URL or e-mail address of whoever runs this, told to servers so that they can complain."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing passes, networks that are none, and names that no header can hold."""
        for name in (
            *("connect_timeout_seconds", "read_timeout_seconds", "timeout_seconds", "deadline_seconds", "num_attempts"),
            *("max_bytes", "num_connections", "num_connections_per_host", "num_rows_ahead", "max_buffer_bytes"),
            *("num_lookups", "max_host_failures", "dns_cache_seconds"),
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_redirects", "backoff_seconds", "max_backoff_seconds", "max_retry_after_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("user_agent", "contact"):
            if not getattr(self, name).isascii() or not getattr(self, name).isprintable():
                raise ValueError(f"{name} must be printable ASCII, got {getattr(self, name)!r}")
        if not robot_name(self.user_agent):
            raise ValueError("user_agent must begin with a name: servers are told who asks")
        AddressGuard(self.allowed_networks, self.allowed_ports)

    def headers(self) -> dict[str, str]:
        """Return what every request says about who asks and what for."""
        contact = f" (+{self.contact})" if self.contact else ""
        return {"User-Agent": self.user_agent + contact, "Accept": "image/*,*/*;q=0.8", "Accept-Encoding": "identity"}


class Client:
    """Downloads URLs under the limits of its config; lives in one event loop."""

    def __init__(self, config: FetchConfig, resolver: AbstractResolver | None = None) -> None:
        """Open a session. `resolver` looks names up; None for the system's."""
        self.config = config
        self.robot = robot_name(config.user_agent)
        self.opt_outs = frozenset(word.lower() for word in config.opt_out_directives)
        self.failures: dict[str, tuple[int, Reject]] = {}
        guard = AddressGuard(config.allowed_networks, config.allowed_ports)
        self.resolver = GuardedResolver(resolver or ThreadedResolver(), guard, config.connect_timeout_seconds)
        connector = aiohttp.TCPConnector(
            limit=0,  # the gates count
            resolver=self.resolver,
            socket_factory=guard.open_socket,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            ttl_dns_cache=config.dns_cache_seconds,
            dns_cache_max_size=MAX_CACHED_NAMES,
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=config.connect_timeout_seconds, sock_read=config.read_timeout_seconds
            ),
            headers=config.headers(),
            read_bufsize=READ_BYTES,
            auto_decompress=False,  # an answer may unpack to a thousand times its size
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy would connect where the guard does not look
        )

    async def close(self) -> None:
        """Close every connection."""
        await self.session.close()
        await self.resolver.close()

    async def download(self, address: str, turn: Turn) -> bytes | Reject:
        """Return the bytes of a URL or why there are none; `turn` holds the memory of the bytes."""
        url = _url(address.strip())
        if isinstance(url, Reject):
            return url
        deadline = turn.seconds() + self.config.deadline_seconds
        for attempt in range(self.config.num_attempts):
            outcome, asked_seconds = await self._attempt(url, turn, deadline)
            if not isinstance(outcome, Reject) or outcome.reason not in TRANSIENT_REASONS:
                return outcome
            wait_seconds = self._wait_seconds(address, attempt, asked_seconds)
            if turn.seconds() + wait_seconds >= deadline or asked_seconds > self.config.max_retry_after_seconds:
                return outcome
            if attempt + 1 < self.config.num_attempts:
                await asyncio.sleep(wait_seconds)
        return outcome

    def _wait_seconds(self, address: str, attempt: int, asked_seconds: float) -> float:
        config = self.config
        own_seconds = backoff_seconds(config.seed, address, attempt, config.backoff_seconds, config.max_backoff_seconds)
        return max(asked_seconds, own_seconds)

    async def _attempt(self, url: URL, turn: Turn, deadline: float) -> tuple[bytes | Reject, float]:
        """Return the bytes or why there are none, and the wait that the server asks for before the next attempt."""
        ends = min(deadline, turn.seconds() + self.config.timeout_seconds)
        for _ in range(self.config.max_redirects + 1):
            host = f"{url.raw_host}:{url.port}"
            await turn.enter(host)
            num_kept_bytes = 0
            try:
                if host in self.failures and self.failures[host][0] >= self.config.max_host_failures:
                    return self.failures[host][1], 0.0
                outcome, asked_seconds = await self._hop(url, turn, ends)
                self._note_contact(host, outcome)
                num_kept_bytes = len(outcome) if isinstance(outcome, bytes) else 0
            finally:
                turn.leave(num_kept_bytes)
            if not isinstance(outcome, URL):
                return outcome, asked_seconds
            url = outcome
        return reject("too_many_redirects", url), 0.0

    def _note_contact(self, host: str, outcome: URL | bytes | Reject) -> None:
        """Count how many attempts in a row did not reach a host."""
        if isinstance(outcome, Reject) and outcome.reason in NO_CONTACT_REASONS:
            self.failures[host] = (self.failures.get(host, (0, outcome))[0] + 1, outcome)
        else:
            self.failures.pop(host, None)

    async def _hop(self, url: URL, turn: Turn, ends: float) -> tuple[URL | bytes | Reject, float]:
        """Return where one request leads to, its bytes, or why there are none; and the wait that was asked for."""
        try:
            async with asyncio.timeout_at(ends + turn.waited_seconds) as clock:
                # A connection that nobody waits for would only lie idle, thousands of them in a listing of many hosts.
                headers = {"Connection": "close"} if turn.is_last_of_host() else None
                async with self.session.get(url, allow_redirects=False, headers=headers) as response:
                    early = self._judge(response)
                    if early is not None:
                        return early, retry_after_seconds(response.headers)
                    content = await self._content(response, turn, clock, ends)
                    return content, 0.0
        except _ERRORS as error:
            return reject_error(error), 0.0

    def _judge(self, response: aiohttp.ClientResponse) -> URL | Reject | None:
        """Return what an answer's status and headers decide; None if its content is wanted."""
        location = response.headers.get("Location") if response.status in REDIRECTS else None
        if response.status != 200 and location is None:
            return reject_status(response.status, str(response.url))
        tags = response.headers.getall("X-Robots-Tag", ())
        if tags and (word := opt_out_of(tags, self.robot, self.opt_outs)):
            return reject("opted_out", word)
        if location is not None:
            return _url(location, response.url)
        if (response.content_length or 0) > self.config.max_bytes:
            return reject("too_large", f"{response.content_length} bytes announced")
        return None

    async def _content(
        self, response: aiohttp.ClientResponse, turn: Turn, clock: asyncio.Timeout, ends: float
    ) -> bytes | Reject:
        await _grow(turn, response.content_length or 0, clock, ends)
        chunks: list[bytes] = []
        num_bytes = 0
        while chunk := await response.content.readany():
            chunks.append(chunk)
            num_bytes += len(chunk)
            if num_bytes > self.config.max_bytes:
                return reject("too_large", f"more than {self.config.max_bytes} bytes")
            if num_bytes > turn.held_bytes:
                await _grow(turn, min(2 * num_bytes, self.config.max_bytes), clock, ends)
        content = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding in ("gzip", "x-gzip", "deflate"):
            await _grow(turn, self.config.max_bytes, clock, ends)
            return _unpacked(content, self.config.max_bytes)
        return content if encoding not in ("br", "zstd", "compress") else reject("bad_encoding", encoding)


async def _grow(turn: Turn, num_bytes: int, clock: asyncio.Timeout, ends: float) -> None:
    """Wait for memory, with the download's clock stopped: the server is not to blame."""
    if num_bytes > turn.held_bytes:
        clock.reschedule(None)
        await turn.grow(num_bytes)
        clock.reschedule(ends + turn.waited_seconds)


def _unpacked(content: bytes, max_bytes: int) -> bytes | Reject:
    """Undo gzip or deflate, up to `max_bytes`."""
    inflater = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        unpacked = inflater.decompress(content, max_bytes + 1)
    except zlib.error as error:
        return reject("bad_encoding", error)
    if len(unpacked) > max_bytes:
        return reject("too_large", f"unpacks to more than {max_bytes} bytes")
    return unpacked if inflater.eof else reject("bad_encoding", "the compressed content has no end")


def _url(text: str, base: URL | None = None) -> URL | Reject:
    """Return the address that `text` means, seen from `base`, without user, password and fragment."""
    if len(text) > MAX_URL_CHARS:
        return reject("bad_url", f"{len(text)} characters")
    try:
        if base is not None and not text.isascii():  # bytes of no encoding in a Location header
            text = quote(text.encode(errors="surrogateescape"), safe=string.printable)
        url = URL(text) if base is None else base.join(URL(text))
        host = url.raw_host
    except (ValueError, IndexError) as error:  # IndexError: yarl 1.25 of "http://[]@"
        return reject("bad_url", error)
    if url.scheme not in ("http", "https"):
        return reject("not_http" if url.scheme else "bad_url", text)
    if not host or not url.port or not _HOST.fullmatch(host):
        return reject("bad_url", text)
    if is_disguised(host):
        return reject("refused_address", f"{host} is a number in disguise")
    return url.with_user(None).with_fragment(None) if url.raw_user is not None or url.raw_password is not None else url
