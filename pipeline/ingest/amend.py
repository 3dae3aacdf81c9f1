"""A shard filtered anew: rows that stay are copied byte for byte, rows that leave get their reason, others may come in.

Only the filters changed, so what was fetched and decoded before is not fetched again: the old shard's tar and ledger
say all that the filters ask of rows that were kept. Rows that a filter had left out are made from the source once more.
The old shard is not touched; the journal drops it when the new one is there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ldm.storage import join, read_text
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.filters import is_filter_reason, kept_captions, reject_before_fetch, reject_measured
from pipeline.ingest.page import Page, ledger_path
from pipeline.ingest.rows import rejected, thumbnail_of
from pipeline.ingest.transforms import ImageFormat
from pipeline.store.journal import PlannedShard
from pipeline.store.ledger import OK, LedgerLine, lines_of, read_ledger
from pipeline.store.manifest import RECORD_SUFFIX
from pipeline.store.schema import Reject, Row, SourceRow, json_text
from pipeline.store.shards import read_rows

_IMAGES = frozenset(ImageFormat)


@dataclass(frozen=True, slots=True)
class AmendedRows:
    """What a shard's ledger says of a new filter.

    Attributes:
        config: the dataset's, with the new filters.
        tar: path of the old shard's tar.
        settled: lines that no filter changes.
        open: source rows that a filter had left out: they are made anew.
        kept: lines of the rows in the old tar, in its order.
        supersedes: what the old shard's record superseded, and so does the new one's.
    """

    config: DatasetConfig
    tar: str
    settled: tuple[LedgerLine, ...]
    open: frozenset[int]
    kept: tuple[LedgerLine, ...]
    supersedes: Counter[str]

    @property
    def keys(self) -> set[str]:
        """Keys that no row that comes in may have."""
        return {line.key for line in self.kept}

    def rows(self, page: Page) -> Iterator[tuple[int, Row]]:
        """Yield the rows that stay with their positions, writing a line for all that were in the tar."""
        for line, row in zip(self.kept, read_rows(self.tar), strict=True):
            assert line.key == row["__key__"]
            reject = _reject(json.loads(row["json"]), line, self.config)
            if isinstance(reject, Reject):
                image = next(content for suffix, content in row.items() if suffix in _IMAGES)
                page.add(rejected(line, reject), partial(thumbnail_of, image, self.config))
                continue
            page.add(replace(line, num_captions=len(reject)))
            yield line.source_row, _with_captions(row, reject)


def amended_rows(config: DatasetConfig, shard: PlannedShard) -> AmendedRows:
    """Return what the old shard's ledger says of the filters in `config`."""
    lines = lines_of(read_ledger(ledger_path(config.root, shard.amends)))
    record = json.loads(read_text(join(config.root, f"{shard.amends}.{RECORD_SUFFIX}")))
    return AmendedRows(
        config=config,
        tar=join(config.root, f"{shard.amends}.tar"),
        settled=tuple(line for line in lines if line.status != OK and not is_filter_reason(line.status)),
        open=frozenset(line.source_row for line in lines if is_filter_reason(line.status)),
        kept=tuple(line for line in lines if line.status == OK),
        supersedes=Counter(record["details"].get("supersedes", {})),
    )


def _reject(facts: Mapping[str, Any], line: LedgerLine, config: DatasetConfig) -> Reject | tuple[str, ...]:
    """Return why a kept row leaves under the filters, or the captions that stay."""
    captions = kept_captions(facts["captions"], config.filters)
    if isinstance(captions, Reject):
        return captions
    row = SourceRow(key=line.key, captions=captions, url=facts["url"], attributes=facts["attributes"])
    early = reject_before_fetch(row, captions, config.filters)
    if early is not None:
        return early
    late = reject_measured(line.original_width, line.original_height, line.num_bytes, config.filters)
    return captions if late is None else late


def _with_captions(row: Row, captions: tuple[str, ...]) -> Row:
    """Return a row with some of its captions left; the very same where all are."""
    facts = json.loads(row["json"])
    if facts["captions"] == list(captions):
        return row
    return {**row, "txt": captions[0].encode(), "json": json_text(facts | {"captions": captions}).encode()}
