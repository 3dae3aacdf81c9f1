"""Steps over more rows than one process holds: read tables → spread rows to groups → gather each group → write files.

A step reads files and writes files, so what passes through the driver are their names. Which files a step writes, and
every byte in them, follows from its input: a killed step is done again from the start.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ldm.storage import join, read_bytes, write_bytes

ROWS_PER_GROUP = 200_000
"""Rows that come together in one group of a step, about."""

_WRITTEN = pa.schema([("name", pa.string()), ("num_rows", pa.int64())])

Spread: TypeAlias = Callable[[pa.Table, int], pa.Table]
"""Adds the column `group`, below the given number of groups, to rows made of a table."""
Gather: TypeAlias = Callable[[pa.Table], pa.Table]
GatherNamed: TypeAlias = Callable[[pa.Table], Mapping[str, pa.Table]]
"""Makes tables of all rows of a group; no two groups give one name."""
Shuffle: TypeAlias = Callable[[Sequence[pa.Table], Spread, Gather, int], Iterator[pa.Table]]
"""Runs spread over tables, brings each of so many groups together, and yields what gather makes of each."""


def together(tables: Sequence[pa.Table], spread: Spread, gather: Gather, num_groups: int) -> Iterator[pa.Table]:
    """Yield what `gather` makes of all rows as one group: a `Shuffle` for what one process holds."""
    rows = pa.concat_tables([spread(table, 1) for table in tables]) if tables else None
    if rows:
        yield gather(rows)


def shuffle_here(tables: Sequence[pa.Table], spread: Spread, gather: Gather, num_groups: int) -> Iterator[pa.Table]:
    """Bring the groups together in this process, one after the other: the reference for every other `Shuffle`."""
    if not tables:
        return
    ordered = pa.concat_tables([spread(table, num_groups) for table in tables]).sort_by("group")
    bounds = np.searchsorted(ordered["group"].to_numpy(), np.arange(num_groups + 1))
    for low, high in zip(bounds, bounds[1:], strict=False):
        if high > low:
            yield gather(ordered.slice(low, high - low))


@dataclass(frozen=True, slots=True)
class Files(Sequence[pa.Table]):
    """Tables in Parquet files, each read when it is asked for.

    Attributes:
        paths: the files.
        num_rows: rows in all of them.
    """

    paths: tuple[str, ...] = ()
    num_rows: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __add__(self, other: Files) -> Files:
        return Files(self.paths + other.paths, self.num_rows + other.num_rows)

    @overload
    def __getitem__(self, number: int) -> pa.Table: ...

    @overload
    def __getitem__(self, number: slice) -> Files: ...

    def __getitem__(self, number: int | slice) -> pa.Table | Files:
        """Return one table; a slice is not cut from them."""
        if isinstance(number, slice):
            raise TypeError("Files are read one at a time")
        return read_table(self.paths[number])


@dataclass(frozen=True, slots=True)
class Exchange:
    """Carries steps out and keeps what they write.

    Attributes:
        folder: where their files go.
        shuffle: brings rows together when there are more than one process should hold.
        rows_per_group: how many one process should hold, about.
    """

    folder: str
    shuffle: Shuffle
    rows_per_group: int = ROWS_PER_GROUP

    def run(
        self, step: str, tables: Sequence[pa.Table], num_rows: int, spread: Spread, gather: GatherNamed
    ) -> dict[str, Files]:
        """Carry out one step and return the files of each kind, a name's part before its first "/".

        Args:
            step: the step's name, of which there is no other in the folder.
            tables: what is read.
            num_rows: rows that `spread` makes of them all, about.
            spread: deals rows to groups.
            gather: what becomes of a group, by name; empty tables are not written.
        """
        num_groups = 1 + num_rows // self.rows_per_group
        carry = self.shuffle if num_groups > 1 else together
        folder = join(self.folder, step)
        found: dict[str, list[tuple[str, int]]] = {}
        for written in carry(tables, spread, partial(_write, gather=gather, folder=folder), num_groups):
            for line in sorted(written.to_pylist(), key=lambda line: str(line["name"])):
                kind = line["name"].partition("/")[0]
                found.setdefault(kind, []).append((table_path(folder, line["name"]), line["num_rows"]))
        return {
            kind: Files(tuple(path for path, _ in lines), sum(num_rows for _, num_rows in lines))
            for kind, lines in found.items()
        }


def group_name(kind: str, group: pa.Table) -> str:
    """Return a name that no other group gives its table of one kind."""
    return f"{kind}/{group['group'][0].as_py():06d}"


def read_table(path: str) -> pa.Table:
    """Return the table in a Parquet file."""
    return pq.read_table(io.BytesIO(read_bytes(path)))


def _write(group: pa.Table, gather: GatherNamed, folder: str) -> pa.Table:
    lines = []
    for name, table in gather(group).items():
        if table.num_rows:
            stream = io.BytesIO()
            pq.write_table(table, stream, compression="zstd")
            write_bytes(table_path(folder, name), stream.getvalue())
            lines.append({"name": name, "num_rows": table.num_rows})
    return pa.Table.from_pylist(lines, schema=_WRITTEN)


def table_path(folder: str, name: str) -> str:
    """Return where a step with this folder writes the table of a name, if there are any rows for it."""
    return join(folder, f"{name}.parquet")
