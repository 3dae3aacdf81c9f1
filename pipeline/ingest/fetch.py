"""Bytes of many rows' URLs, in the rows' order, downloaded ahead of the caller in bounded memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from aiohttp.abc import AbstractResolver

from pipeline.ingest.admission import Admission, Turn
from pipeline.ingest.client import Client, FetchConfig
from pipeline.ingest.outcomes import FETCH_REASONS, TRANSIENT_REASONS
from pipeline.store.schema import Reject, SourceRow

__all__ = ["FETCH_REASONS", "TRANSIENT_REASONS", "FetchConfig", "Fetcher"]

BATCH_ROWS = 16
"""Rows handed to the event loop at once: waking it costs more than the rest of the handing."""

T = TypeVar("T")


class Fetcher:
    """Downloads in a thread of its own while its caller decodes what came before."""

    def __init__(self, config: FetchConfig, resolver: AbstractResolver | None = None) -> None:
        """Keep the configuration; the thread starts with the `with` block.

        Args:
            config: limits.
            resolver: looks names up; None for the system's.
        """
        self.config = config
        self.resolver = resolver
        self.loop = asyncio.new_event_loop()
        self.lookups = ThreadPoolExecutor(config.num_lookups, "lookup")
        self.thread = Thread(target=self.loop.run_forever, daemon=True)
        self.client: Client

    def __enter__(self) -> Self:
        self.loop.set_default_executor(self.lookups)
        self.thread.start()
        self.client = self._run(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.lookups.shutdown(wait=False, cancel_futures=True)
        self.loop.close()

    def fetch(self, url: str) -> bytes | Reject:
        """Return the bytes of one URL, or why there are none."""
        ((_, outcome),) = self.payloads([SourceRow(key="", captions=(), url=url)])
        return outcome

    def payloads(self, rows: Iterable[SourceRow]) -> Iterator[tuple[SourceRow, bytes | Reject]]:
        """Yield each row with its image's bytes, or why there are none, in the order of the rows.

        Rows are downloaded ahead of the caller, as many and as much as the config allows. Bytes that came with a row
        are passed through.
        """
        passage = _Passage(self)
        try:
            for row in rows:
                passage.add(row)
                while passage.is_full():
                    yield passage.take()
            while passage.rows:
                yield passage.take()
        finally:
            passage.abandon()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def _open(self) -> Client:
        return Client(self.config, self.resolver)

    async def _close(self) -> None:
        unfinished = asyncio.all_tasks() - {asyncio.current_task()}
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        await self.client.close()


class _Passage:
    """The rows that were read and not taken yet.

    `_advance`, `_arrive` and `_cancel` run in the event loop's thread, the rest in the caller's.
    """

    def __init__(self, fetcher: Fetcher) -> None:
        config = fetcher.config
        self.loop = fetcher.loop
        self.client = fetcher.client
        self.admission = Admission(config.num_connections, config.num_connections_per_host, config.max_buffer_bytes)
        self.num_rows_ahead = config.num_rows_ahead
        self.max_buffer_bytes = config.max_buffer_bytes
        self.rows: deque[SourceRow] = deque()
        self.head = 0
        self.told_head = 0
        self.num_payload_bytes = 0
        self.batch: list[tuple[int, str]] = []
        self.arrived: SimpleQueue[tuple[int, asyncio.Task[bytes | Reject]]] = SimpleQueue()
        self.outcomes: dict[int, asyncio.Task[bytes | Reject]] = {}
        self.num_taken_bytes = 0
        self.tasks: set[asyncio.Task[bytes | Reject]] = set()

    def add(self, row: SourceRow) -> None:
        """Let a row in; its download starts soon."""
        order = self.head + len(self.rows)
        self.rows.append(row)
        if row.payload is not None:
            self.num_payload_bytes += len(row.payload)
        elif row.url:
            self.batch.append((order, row.url))
            if len(self.batch) >= BATCH_ROWS:
                self._tell_loop()

    def is_full(self) -> bool:
        """Return whether the first row is to be taken before another is let in: reading on would gain nothing."""
        is_here = bool(self.rows) and not _is_download(self.rows[0])
        has_many = len(self.rows) > self.num_rows_ahead or self.num_payload_bytes > self.max_buffer_bytes
        return is_here or (bool(self.rows) and has_many)

    def take(self) -> tuple[SourceRow, bytes | Reject]:
        """Return the first row and its bytes, waiting for them."""
        row = self.rows[0]
        outcome = self._outcome(row)
        self.rows.popleft()
        self.head += 1
        if self.head - self.told_head >= BATCH_ROWS or self.num_taken_bytes * BATCH_ROWS >= self.max_buffer_bytes:
            self._tell_loop()
        return row, outcome

    def _outcome(self, row: SourceRow) -> bytes | Reject:
        if row.payload is not None:
            self.num_payload_bytes -= len(row.payload)
            return row.payload
        if not row.url:
            return Reject("no_image")
        while self.head not in self.outcomes:
            if self.arrived.empty() and (self.batch or self.head != self.told_head):
                self._tell_loop()
            order, task = self.arrived.get()
            self.outcomes[order] = task
        outcome = self.outcomes.pop(self.head).result()
        self.num_taken_bytes += len(outcome) if isinstance(outcome, bytes) else 0
        return outcome

    def abandon(self) -> None:
        """Stop what nobody will take."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._cancel)

    def _tell_loop(self) -> None:
        """Send new rows, and what was taken since, to the event loop."""
        self.loop.call_soon_threadsafe(self._advance, self.batch, self.head, self.num_taken_bytes)
        self.batch, self.num_taken_bytes, self.told_head = [], 0, self.head

    def _advance(self, batch: list[tuple[int, str]], head: int, num_taken_bytes: int) -> None:
        self.admission.memory.give(num_taken_bytes)
        self.admission.advance(head)
        for order, url in batch:
            task = self.loop.create_task(self.client.download(url, Turn(self.admission, order)))
            self.tasks.add(task)
            task.add_done_callback(partial(self._arrive, order))

    def _arrive(self, order: int, task: asyncio.Task[bytes | Reject]) -> None:
        self.tasks.discard(task)
        self.arrived.put((order, task))

    def _cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


def _is_download(row: SourceRow) -> bool:
    return row.payload is None and bool(row.url)
