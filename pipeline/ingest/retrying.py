"""Which rows failed and are worth another try, from ledgers alone.

Shards made of the same source rows form a chain, oldest first: the first holds a line for every row, each later one for
the rows that it tried again. A row's latest line is what became of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from pipeline.ingest.fetch import FETCH_REASONS, TRANSIENT_REASONS
from pipeline.ingest.filters import is_filter_reason
from pipeline.ingest.page import ledger_path
from pipeline.ingest.transforms import PICTURE_REASONS
from pipeline.store.ledger import OK, read_ledger


class Retry(StrEnum):
    """Which failures are tried again."""

    NONE = "none"
    TRANSIENT = "transient"
    """Those that may pass by themselves, such as time-outs."""
    ALL = "all"
    """Every image that could not be fetched or decoded."""


def is_retried(reason: str, retry: Retry) -> bool:
    """Say whether a row with this status is tried again."""
    match retry:
        case Retry.NONE:
            return False
        case Retry.TRANSIENT:
            return reason in TRANSIENT_REASONS
        case Retry.ALL:
            return (reason in FETCH_REASONS or reason in PICTURE_REASONS) and not is_filter_reason(reason)


def failed_rows(root: str, chain: Sequence[str], retry: Retry) -> dict[int, str]:
    """Return the source rows to try again with their latest status, from the ledgers of a chain of shards.

    A row whose key another row of the chain has brought in meanwhile is not tried again.
    """
    latest: dict[int, tuple[str, str]] = {}
    for shard in chain:
        table = read_ledger(ledger_path(root, shard), ["source_row", "key", "status"])
        columns = (table[name].to_pylist() for name in ("source_row", "key", "status"))
        latest.update({row: (key, status) for row, key, status in zip(*columns, strict=True)})
    kept = {key for key, status in latest.values() if status == OK}
    return {row: status for row, (key, status) in latest.items() if is_retried(status, retry) and key not in kept}


def latest_counts(counts: Iterable[Mapping[str, int]], superseded: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return rows by their latest status: all lines less those in whose place later ones stand."""
    total = Counter[str]()
    for part in counts:
        total.update(part)
    for part in superseded:
        total.subtract(part)
    return {status: count for status, count in sorted(total.items()) if count}
