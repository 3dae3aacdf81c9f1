"""What a person sees while shards are made: a live bar on a terminal, a line now and then anywhere else.

Rows are input rows: the success share is how many of them came out, the rest is counted by reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from pipeline.effort import Effort, WorkByWorker

SECONDS_BETWEEN_LINES = 15.0
"""Where there is no terminal, such as in the log of a cluster job."""
NUM_REASONS = 3
"""Reasons for rejects that are shown while the work goes on."""
KEPT = "ok"
"""The status of rows that came out."""


class ShardProgress:
    """Counts shards and rows as they are committed, and shows them."""

    def __init__(
        self,
        what: str,
        num_shards: int,
        num_there: int,
        console: Console | None = None,
        work: WorkByWorker | None = None,
    ) -> None:
        """Show `num_there` of `num_shards` shards as done already; `work` adds up what the others take."""
        self.what = what
        self.num_shards = num_shards
        self.num_there = num_there
        self.num_done = num_there
        self.num_rows = 0
        self.counts = Counter[str]()
        self.work = work or WorkByWorker()
        self.console = console or Console(stderr=True)
        self.started = self.last_line = time.monotonic()
        self.bar = Progress(
            # The first that gives way in a narrow terminal is the bar itself.
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=30),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("shards", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[values]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TextColumn("ETA", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=num_shards, completed=num_there, values="0 rows")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, num_rows: int, counts: Mapping[str, int], effort: Effort | None = None) -> None:
        """Count one more shard of `num_rows` rows, made of input rows with these statuses, and what it took."""
        if effort is not None:
            self.work.add(effort)
        self.num_done += 1
        self.num_rows += num_rows
        self.counts.update(counts)
        now = time.monotonic()
        values = self._values(now - self.started)
        self.bar.update(self.task, advance=1, values=values)
        is_due = now - self.last_line >= SECONDS_BETWEEN_LINES or self.num_done == self.num_shards
        if is_due and not self.console.is_terminal:
            self.last_line = now
            self.console.print(self._line(now - self.started, values), soft_wrap=True, highlight=False)

    def _values(self, elapsed_seconds: float) -> str:
        """Return rows, rate, the share that came out and why the others did not."""
        rate = self.num_rows / max(elapsed_seconds, 1e-9)
        values = f"{self.num_rows} rows, {rate:{'.0f' if rate >= 10 else '.2g'}} rows/s"
        total = self.counts.total()
        if total:
            values += f", {100 * self.counts[KEPT] / total:.1f} % ok"
        rejected = Counter({reason: count for reason, count in self.counts.items() if reason != KEPT and count})
        if rejected:
            top = sorted(rejected.items(), key=lambda item: (-item[1], item[0]))[:NUM_REASONS]
            values += f" ({', '.join(f'{reason} {count}' for reason, count in top)})"
        return values + self._work()

    def _work(self) -> str:
        """Return images a second of one worker, how busy its encoder is and how long that waits for images."""
        num_workers = len(self.work.by_name())
        if not num_workers:
            return ""
        work = self.work.together()
        return (
            f", {num_workers} worker{'s' * (num_workers > 1)} at {work.rows_per_second:.1f} images/s, "
            f"encoder busy {100 * work.busy_share:.0f} %, data wait {100 * work.wait_share:.0f} %"
        )

    def _line(self, elapsed_seconds: float, values: str) -> str:
        num_made = self.num_done - self.num_there
        left_seconds = (self.num_shards - self.num_done) * elapsed_seconds / num_made
        return (
            f"{self.what}: {self.num_done}/{self.num_shards} shards, {values}, "
            f"{elapsed_seconds:.0f} s elapsed, {left_seconds:.0f} s left"
        )


def counts_table(counts: Mapping[str, int]) -> Table:
    """Return a table of input rows by status, the kept ones first, then the commonest reason."""
    total = max(sum(counts.values()), 1)
    title = "input rows by what became of them"
    table = Table("rows", "share", "status", title=title, title_justify="left", min_width=len(title))
    for status, count in sorted(counts.items(), key=lambda item: (item[0] != KEPT, -item[1], item[0])):
        table.add_row(f"{count:,}", f"{100 * count / total:.1f} %", status)
    return table
