"""A proxy between a client and an HTTP server that fails one request in five: refuses, drops, cuts answers, delays.

What happens to request number n is a function of the seed. Requests reach the server as they came, signed headers
included, over a connection of their own.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
    len(SLOW_DOWN),
    SLOW_DOWN,
)
TROUBLES = ("busy", "drop", "cut", "delay")
LONGEST_DELAY = 0.3
SHARE = 0.2


class ChaosProxy:
    """Forwards to one server and fails as the seed says."""

    def __init__(self, upstream: str, seed: int) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname, parts.port)
        self.dice = random.Random(seed)
        self.troubles = Counter[str]()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, is_ready: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        is_ready.set()
        await stop.wait()
        server.close()
        answering = asyncio.all_tasks() - {asyncio.current_task()}
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"100-continue" in head.lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            await self._answer(head, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client hung up
        finally:
            writer.close()

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        trouble = self.dice.choice(TROUBLES) if self.dice.random() < SHARE else "none"
        self.troubles[trouble] += 1
        if trouble == "busy":
            writer.write(BUSY)
        elif trouble != "drop":
            if trouble == "delay":
                await asyncio.sleep(self.dice.random() * LONGEST_DELAY)
            answer = await self._forwarded(head, body)
            writer.write(answer[: len(answer) // 2] if trouble == "cut" else answer)
        await writer.drain()

    async def _forwarded(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self.upstream)
        head = re.sub(rb"(?i)\r\n(connection|expect):[^\r]*", b"", head)
        writer.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        return answer


@contextmanager
def chaos_proxy(upstream: str, seed: int) -> Iterator[ChaosProxy]:
    """Run a proxy in a thread of its own."""
    with running(ChaosProxy(upstream, seed)) as proxy:
        yield proxy


class Link(ChaosProxy):
    """A link that is as slow, or as wrong, as a test says, for downloads of tars; it counts them by path.

    Attributes:
        seconds: how long the body of an answer takes.
        num_wrong: how many of the next answers have a bit turned.
        num_cut: how many of the next answers break off.
        downloads: tars asked for.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, 0)
        self.seconds = 0.0
        self.num_wrong = self.num_cut = 0
        self.downloads = Counter[str]()

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        answer = await self._forwarded(head, body)
        method, path, _ = head.split(b" ", 2)
        if method == b"GET" and path.endswith(b".tar"):
            self.downloads[path.decode()] += 1
            if self.num_wrong:
                self.num_wrong -= 1
                answer = answer[:-1] + bytes([answer[-1] ^ 1])
            if self.num_cut:
                self.num_cut -= 1
                answer = answer[: len(answer) // 2]
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
            await asyncio.sleep(self.seconds)
            answer = answer[len(answer) // 2 :]
        writer.write(answer)
        await writer.drain()


Proxy = TypeVar("Proxy", bound=ChaosProxy)


@contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Run a proxy in a thread of its own."""
    is_ready, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(proxy.serve(is_ready, stop),))
    thread.start()
    is_ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
