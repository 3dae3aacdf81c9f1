"""Source rows → one shard of a dataset: tar, index, and a ledger with one line for every input row.

Which rows of the source's shard are made is in the plan: all of them, those that failed before, or those that an older
version of the source's file did not have. Rows are checked, fetched ahead, and made in the order of the source.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from ldm.storage import exists
from pipeline.ingest.amend import AmendedRows, amended_rows
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.fetch import Fetcher
from pipeline.ingest.growth import SUPERSEDES
from pipeline.ingest.page import Page, ledger_path
from pipeline.ingest.retrying import Retry, failed_rows
from pipeline.ingest.rows import Candidate, candidate_of, outcome_of, rejected, thumbnail_of
from pipeline.plan import ShardTask
from pipeline.sources.source import Source
from pipeline.store.journal import Journal, PlannedShard, place, read_journal
from pipeline.store.ledger import DUPLICATE_KEY, LEDGER_SUFFIX, LedgerLine, read_ledger
from pipeline.store.manifest import ShardRecord
from pipeline.store.schema import Reject, Row, SourceRow
from pipeline.store.shards import write_shard

NumberedRow = tuple[int, SourceRow]
"""A source row and its position in the source's shard."""


class IngestStage:
    """Makes the shards of one dataset; built once in each worker."""

    def __init__(self, config: DatasetConfig, output_root: str) -> None:
        """Keep the configuration and open the source; shards are written to the given folder."""
        self.config = config
        self.output_root = output_root
        self.source: Source = config.source.build()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tar, index and ledger and return their record."""
        shard, generation = planned(task)
        page = Page()
        supersedes = Counter[str]()
        if shard.amends and exists(ledger_path(self.config.root, shard.amends)):
            rows, supersedes = self._amended(shard, page)
        else:
            rows = self._ingested(self._chosen(shard, generation, supersedes), page, set())
        files = write_shard(self.output_root, task.split, task.name, (row for _, row in rows))
        files[LEDGER_SUFFIX] = page.write(self.output_root, task.split, task.name)
        return ShardRecord(
            name=task.name,
            split=task.split,
            num_rows=page.num_ok,
            files=files,
            counts=page.counts,
            source=task.source_digest,
            details={SUPERSEDES: dict(sorted(supersedes.items()))} if supersedes else {},
        )

    @cached_property
    def _journal(self) -> Journal:
        """The journal as it was when the worker began, which is the one that its tasks are from."""
        return read_journal(self.config.root)

    def _chosen(self, shard: PlannedShard, generation: int, supersedes: Counter[str]) -> Iterator[NumberedRow]:
        """Yield the source rows that the plan wants."""
        found = self.source.open_shard_at_row(shard.source_name, 0, shard.source_payload)
        rows: Iterator[NumberedRow] = enumerate(found)
        if shard.retries:
            now = self._journal.replaced_by()
            chain = [now.get(older, older) for older in shard.retries]
            wanted = failed_rows(self.config.root, chain, Retry(shard.retry))
            supersedes.update(wanted.values())
            rows = ((position, row) for position, row in rows if position in wanted)
        elif shard.previous:
            seen = self._seen_before(shard, generation)
            rows = ((position, row) for position, row in rows if row.key not in seen)
        yield from rows

    def _seen_before(self, shard: PlannedShard, generation: int) -> set[str]:
        """Return which of the shard's keys stand in shards of an older version of the same file.

        Ledgers are read one at a time, so memory holds one shard's keys and one ledger's.
        """
        rows = self.source.open_shard_at_row(shard.source_name, 0, shard.source_payload)
        keys = {row.key for row in rows}
        seen: set[str] = set()
        for older in _shards_of_file(self._journal, self.source, shard.previous, generation):
            column = read_ledger(ledger_path(self.config.root, older), ["key"])["key"]
            seen.update(keys.intersection(column.to_pylist()))
        return seen

    def _amended(self, shard: PlannedShard, page: Page) -> tuple[Iterator[tuple[int, Row]], Counter[str]]:
        """Return the rows of a shard that is filtered anew, and the statuses that its record supersedes already."""
        amended: AmendedRows = amended_rows(self.config, shard)
        for line in amended.settled:
            page.add(line)
        rows = enumerate(self.source.open_shard_at_row(shard.source_name, 0, shard.source_payload))
        entering = ((position, row) for position, row in rows if position in amended.open)
        made = self._ingested(entering, page, amended.keys)
        merged = heapq.merge(amended.rows(page), made, key=lambda numbered: numbered[0])
        return merged, amended.supersedes

    def _ingested(self, rows: Iterator[NumberedRow], page: Page, seen: set[str]) -> Iterator[tuple[int, Row]]:
        """Yield the rows that go into the tar with their positions, writing a line for every row."""
        waiting: deque[Candidate] = deque()
        with Fetcher(self.config.fetch) as fetcher:
            for _, payload in fetcher.payloads(self._candidates(rows, page, waiting)):
                candidate = waiting.popleft()
                made = self._made(candidate, payload, page, seen)
                if made is not None:
                    yield candidate.line.source_row, made

    def _candidates(self, rows: Iterator[NumberedRow], page: Page, waiting: deque[Candidate]) -> Iterator[SourceRow]:
        """Yield the rows whose bytes are worth having, in order; the others' lines are written at once."""
        for position, row in rows:
            candidate = candidate_of(row, position, self.config)
            if isinstance(candidate, LedgerLine):
                page.add(candidate)
                continue
            waiting.append(candidate)
            # A finished row needs no bytes: with empty ones nobody fetches its address.
            yield row if row.members is None else replace(row, payload=b"", url=None)

    def _made(self, candidate: Candidate, payload: bytes | Reject, page: Page, seen: set[str]) -> Row | None:
        key = candidate.row.key
        if key in seen:
            repeated = rejected(candidate.line, Reject(DUPLICATE_KEY))
            page.add(replace(repeated, duplicate_of=key))
            return None
        outcome = outcome_of(candidate, payload, self.config)
        shown = outcome.payload
        page.add(outcome.line, None if shown is None else lambda: thumbnail_of(shown, self.config))
        if outcome.members is not None:
            seen.add(key)
        return outcome.members


def task_of(shard: PlannedShard, generation: int) -> ShardTask:
    """Return the task of making a planned shard."""
    return ShardTask(
        split=shard.split,
        name=shard.name,
        source_name=shard.source_name,
        source_digest=shard.digest,
        num_rows=shard.num_rows,
        payload=json.dumps({"generation": generation, "shard": shard.to_dict()}, sort_keys=True),
    )


def planned(task: ShardTask) -> tuple[PlannedShard, int]:
    """Return the planned shard that `task_of` was given, and its generation."""
    raw = json.loads(task.payload)
    return PlannedShard.from_dict(raw["shard"]), int(raw["generation"])


def _shards_of_file(journal: Journal, source: Source, file: str, before: int) -> list[str]:
    """Return the shards of earlier generations that were made of any version of a file."""
    return [
        place(shard.split, shard.name)
        for generation, shard in journal.shards()
        if generation < before and source.previous_of(shard.source_name) == file
    ]
