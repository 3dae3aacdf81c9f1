"""What a person sees while shards are made: a live bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
"""Where there is no terminal, such as in the log of a cluster job."""


class ShardProgress:
    """Counts shards and rows as they are committed, and shows them."""

    def __init__(self, what: str, num_shards: int, num_there: int, console: Console | None = None) -> None:
        """Show `num_there` of `num_shards` shards as done already."""
        self.what = what
        self.num_shards = num_shards
        self.num_there = num_there
        self.num_done = num_there
        self.num_rows = 0
        self.console = console or Console(stderr=True)
        self.started = self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[rows]} rows  {task.fields[rate]:.0f} rows/s  elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=num_shards, completed=num_there, rows=0, rate=0.0)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, num_rows: int) -> None:
        """Count one more shard of `num_rows` rows."""
        self.num_done += 1
        self.num_rows += num_rows
        now = time.monotonic()
        rate = self.num_rows / max(now - self.started, 1e-9)
        self.bar.update(self.task, advance=1, rows=self.num_rows, rate=rate)
        is_due = now - self.last_line >= SECONDS_BETWEEN_LINES or self.num_done == self.num_shards
        if is_due and not self.console.is_terminal:
            self.last_line = now
            self.console.print(self._line(now - self.started, rate), soft_wrap=True, highlight=False)

    def _line(self, elapsed_seconds: float, rate: float) -> str:
        num_made = self.num_done - self.num_there
        left_seconds = (self.num_shards - self.num_done) * elapsed_seconds / num_made
        return (
            f"{self.what}: {self.num_done}/{self.num_shards} shards, {self.num_rows} rows, {rate:.0f} rows/s, "
            f"{elapsed_seconds:.0f} s elapsed, {left_seconds:.0f} s left"
        )
