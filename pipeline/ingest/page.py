"""The ledger lines of one shard while it is made, and the few rejected pictures that a person may look at.

Which pictures those are is decided by the rows' keys (the smallest ones), so every run keeps the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from ldm.storage import join
from pipeline.store.ledger import LEDGER_SUFFIX, MAX_THUMBNAILS, OK, LedgerLine, write_ledger
from pipeline.store.manifest import FileRecord, shard_path
from pipeline.store.schema import Split


class Page:
    """Lines by source row; written in that order however they came."""

    def __init__(self) -> None:
        """Begin with no line."""
        self._lines: dict[int, LedgerLine] = {}
        self._pictured: list[tuple[str, int]] = []

    def add(self, line: LedgerLine, make_thumbnail: Callable[[], bytes] | None = None) -> None:
        """Take a row's line; its thumbnail is made only where the row is among those that are shown."""
        self._lines[line.source_row] = line
        if line.thumbnail:
            self._show(line, line.thumbnail)
        elif make_thumbnail is not None and self._is_shown(line):
            self._show(line, make_thumbnail())

    @property
    def counts(self) -> dict[str, int]:
        """Input rows by status."""
        return dict(sorted(Counter(line.status for line in self._lines.values()).items()))

    @property
    def num_ok(self) -> int:
        """Rows that are in the tar."""
        return sum(line.status == OK for line in self._lines.values())

    def write(self, root: str, split: Split, name: str) -> FileRecord:
        """Publish the ledger of a shard."""
        lines = [self._lines[row] for row in sorted(self._lines)]
        return write_ledger(shard_path(root, split, name, LEDGER_SUFFIX), lines)

    def _is_shown(self, line: LedgerLine) -> bool:
        return len(self._pictured) < MAX_THUMBNAILS or (line.key, line.source_row) < self._pictured[-1]

    def _show(self, line: LedgerLine, content: bytes) -> None:
        """Give a line its thumbnail and take it from the one with the largest key, if there are too many now."""
        if not content:
            return
        self._lines[line.source_row] = replace(line, thumbnail=content)
        self._pictured = sorted([*self._pictured, (line.key, line.source_row)])
        if len(self._pictured) > MAX_THUMBNAILS:
            _, last = self._pictured.pop()
            self._lines[last] = replace(self._lines[last], thumbnail=b"")


def ledger_path(root: str, place: str) -> str:
    """Return where the ledger of a shard such as "train/000003" lies."""
    return join(root, f"{place}.{LEDGER_SUFFIX}")
