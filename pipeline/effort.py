"""What shards took: measured in the workers, passed beside the shards' records and never part of them.

busy share = seconds inside encoder calls / wall-clock seconds of a worker, from its first shard's start to its last
one's end; wait share = seconds that its encoder's thread waited for decoded images / the same. A worker with several
shards at once may wait for one while it encodes another, so the two may come to more than 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

from rich.table import Table

from pipeline.plan import ShardTask


class StageTimers:
    """Seconds that one shard took of its worker."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self.wait_seconds = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a block as encoding; what is asked of a GPU in it must be awaited in it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.busy_seconds += time.perf_counter() - started

    def waited(self, seconds: float) -> None:
        """Count a wait for decoded images."""
        self.wait_seconds += seconds


@runtime_checkable
class TimedStage(Protocol):
    """A stage that says what each shard took."""

    def take_timers(self, task: ShardTask) -> StageTimers:
        """Return what a shard took that was just made, and forget it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """What one shard took.

    Attributes:
        worker: names the process.
        begun: when the stage began, seconds since the epoch.
        ended: when it had ended.
        num_rows: rows that came out.
        num_bytes: bytes that were written.
        busy_seconds: inside encoder calls.
        wait_seconds: of the encoder's thread, for decoded images.
    """

    worker: str
    begun: float
    ended: float
    num_rows: int
    num_bytes: int
    busy_seconds: float
    wait_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `Effort(**data)` reads back."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What several shards took: of one worker, or of all.

    Attributes:
        num_shards: shards made.
        num_rows: rows that came out.
        num_bytes: bytes that were written.
        worker_seconds: wall-clock time from the first shard's start to the last one's end, summed over workers.
        busy_seconds: inside encoder calls.
        wait_seconds: of the encoders' threads, for decoded images.
    """

    num_shards: int
    num_rows: int
    num_bytes: int
    worker_seconds: float
    busy_seconds: float
    wait_seconds: float

    @property
    def busy_share(self) -> float:
        """Share of the workers' time in which they encoded."""
        return self.busy_seconds / max(self.worker_seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        """Share of the workers' time that their encoders waited for images."""
        return self.wait_seconds / max(self.worker_seconds, 1e-9)

    @property
    def rows_per_second(self) -> float:
        """Rows of one worker in a second of its time."""
        return self.num_rows / max(self.worker_seconds, 1e-9)


class WorkByWorker:
    """Adds up what shards took, as they become known."""

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}
        self._begun: dict[str, float] = {}
        self._ended: dict[str, float] = {}

    def add(self, effort: Effort) -> None:
        """Count one more shard."""
        name = effort.worker
        begun = self._begun[name] = min(effort.begun, self._begun.get(name, effort.begun))
        ended = self._ended[name] = max(effort.ended, self._ended.get(name, effort.ended))
        before = self._works.get(name, _NOTHING)
        self._works[name] = Work(
            num_shards=before.num_shards + 1,
            num_rows=before.num_rows + effort.num_rows,
            num_bytes=before.num_bytes + effort.num_bytes,
            worker_seconds=ended - begun,
            busy_seconds=before.busy_seconds + effort.busy_seconds,
            wait_seconds=before.wait_seconds + effort.wait_seconds,
        )

    def by_name(self) -> dict[str, Work]:
        """Return what each worker did, in order of names; empty if no stage said what it took."""
        return dict(sorted(self._works.items()))

    def together(self) -> Work:
        """Return what all workers did."""
        works = self._works.values()
        return Work(**{field.name: sum(getattr(work, field.name) for work in works) for field in fields(Work)})


_NOTHING = Work(num_shards=0, num_rows=0, num_bytes=0, worker_seconds=0.0, busy_seconds=0.0, wait_seconds=0.0)


def work_table(works: WorkByWorker, seconds: float) -> Table:
    """Return a table of what each worker did, and all of them in `seconds` of wall-clock time."""
    columns = ("worker", "shards", "rows", "seconds", "images/s", "encoder busy", "data wait", "MB written")
    table = Table(title="what the workers did", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "worker" else "right")
    for name, work in works.by_name().items():
        table.add_row(name, *_cells(work, work.worker_seconds))
    table.add_row("all", *_cells(works.together(), seconds))
    return table


def _cells(work: Work, seconds: float) -> list[str]:
    return [
        f"{work.num_shards:,}",
        f"{work.num_rows:,}",
        f"{seconds:,.1f}",
        f"{work.num_rows / max(seconds, 1e-9):,.1f}",
        f"{100 * work.busy_share:.1f} %",
        f"{100 * work.wait_share:.1f} %",
        f"{work.num_bytes / 1e6:,.1f}",
    ]
