"""Taking copies out of shards: staged shards → which of their rows are copies, over all shards → the shards themselves.

Order: the shards of a generation are first made under `<root>/staging/` → rows whose key is there twice, then rows
whose fingerprints say that they are copies (`duplicates`), are found by a shuffle over all ledgers → a table of the
rows that fall → each shard is copied from its staged form without them. Bytes of the rows that stay are not touched.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm.storage import join, read_bytes, read_text, write_bytes
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.duplicates import FINGERPRINTS, Gather, Shuffle, Spread, find_duplicates
from pipeline.ingest.page import Page, ledger_path
from pipeline.ingest.rows import rejected, thumbnail_of
from pipeline.ingest.transforms import ImageFormat
from pipeline.plan import ShardTask
from pipeline.store.journal import place
from pipeline.store.ledger import DUPLICATE_KEY, LEDGER_SUFFIX, OK, LedgerLine, lines_of, read_ledger
from pipeline.store.manifest import RECORD_SUFFIX, ShardRecord, shard_path
from pipeline.store.schema import Reject, Row
from pipeline.store.shards import read_rows, write_shard

FALLEN_NAME = "fallen.parquet"
ROWS_PER_GROUP = 200_000
"""Rows that come together in one group of a shuffle, about."""
KEY_DIGITS = 8
"""Hex digits of a key that choose its group."""

_IMAGES = frozenset(ImageFormat)
_FALLEN = pa.schema([(name, pa.string()) for name in ("key", "place", "survivor", "reason", "detail")])


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerPlace:
    """Where a ledger lies and how its rows stand among all others.

    Attributes:
        root: the folder of the shard: the dataset's or its staging.
        place: the shard, as "train/000003".
        generation: the generation of its rows.
        amends: the shard whose kept rows are of an earlier generation; empty where none are.
        amended_generation: that generation.
        amended_root: the folder of that shard.
    """

    root: str
    place: str
    generation: int
    amends: str = ""
    amended_generation: int = 0
    amended_root: str = ""


@dataclass(frozen=True, slots=True)
class LedgerTables(Sequence[pa.Table]):
    """Fingerprints of the rows that are in tars, one table a ledger, read when it is asked for.

    Attributes:
        places: the ledgers.
        fallen: path of the rows that are no part of it any more; empty where all are.
    """

    places: tuple[LedgerPlace, ...]
    fallen: str = ""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> pa.Table: ...

    @overload
    def __getitem__(self, number: slice) -> LedgerTables: ...

    def __getitem__(self, number: int | slice) -> pa.Table | LedgerTables:
        """Return the fingerprints of one ledger's rows with the column `place`."""
        if isinstance(number, slice):
            return LedgerTables(self.places[number], self.fallen)
        ledger = self.places[number]
        names = ["key", "status", "payload_sha256", "pixel_sha256", "perceptual_hash"]
        table = read_ledger(ledger_path(ledger.root, ledger.place), names)
        table = table.filter(pc.equal(table["status"], OK))
        if self.fallen:
            fallen = [line["key"] for line in fallen_of(self.fallen, ledger.place)]
            table = table.filter(pc.invert(pc.is_in(table["key"], pa.array(fallen, pa.string()))))
        columns = {name: table[name] for name in FINGERPRINTS.names if name != "generation"}
        generations = pa.array(_generations(ledger, table["key"].to_pylist()), pa.int32())
        places = pa.array([ledger.place] * len(table), pa.string())
        return pa.table({"generation": generations, **columns, "place": places})


def find_fallen(
    config: DatasetConfig, staging: str, places: Sequence[LedgerPlace], num_rows: int, shuffle: Shuffle
) -> str:
    """Write the table of staged rows that are copies and return its path.

    Args:
        config: the dataset's configuration.
        staging: the folder of staged shards, where the table goes.
        places: all ledgers, those of finished shards and of staged ones.
        num_rows: rows in all their tars, about.
        shuffle: brings rows of one group together; few rows come together here.
    """
    path = join(staging, FALLEN_NAME)
    ledgers = tuple(places)
    if num_rows <= ROWS_PER_GROUP:
        shuffle = together
    repeated = _repeated_keys(LedgerTables(ledgers), shuffle, 1 + num_rows // ROWS_PER_GROUP)
    _write_fallen(path, repeated)
    copies_of_row = (config.duplicates.near_distance or 0) + 3
    num_groups = 1 + num_rows * copies_of_row // ROWS_PER_GROUP
    found = find_duplicates(LedgerTables(ledgers, path), config.duplicates, shuffle, num_groups)
    copies = [(key, "", copy.of, copy.reason, _apart(copy.distance)) for key, copy in found.items()]
    _write_fallen(path, sorted([*repeated, *copies]))
    return path


def together(tables: Sequence[pa.Table], spread: Spread, gather: Gather, num_groups: int) -> Iterator[pa.Table]:
    """Yield what `gather` makes of all rows as one group: a `Shuffle` for what one process holds."""
    if tables:
        yield gather(pa.concat_tables([spread(table, 1) for table in tables]))


class SettledStage:
    """Copies staged shards without the rows that fell."""

    def __init__(self, config: DatasetConfig, staging: str) -> None:
        """Keep where staged shards and the table of fallen rows lie."""
        self.config = config
        self.staging = staging

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tar, index and ledger and return their record."""
        here = place(task.split, task.name)
        record = ShardRecord.from_dict(json.loads(read_text(join(self.staging, f"{here}.{RECORD_SUFFIX}"))))
        lines = lines_of(read_ledger(ledger_path(self.staging, here)))
        in_tar = {line.key for line in lines if line.status == OK}
        reasons = {line["key"]: line for line in fallen_of(join(self.staging, FALLEN_NAME), here, in_tar)}
        page = Page()
        for line in lines:
            if line.status != OK:
                page.add(line)
        kept = (line for line in lines if line.status == OK)
        rows = self._rows(task, kept, reasons, page)
        files = write_shard(self.config.root, task.split, task.name, rows)
        files[LEDGER_SUFFIX] = page.write(self.config.root, task.split, task.name)
        return replace(record, num_rows=page.num_ok, files=files, counts=page.counts)

    def _rows(
        self, task: ShardTask, lines: Iterator[LedgerLine], reasons: dict[str, dict[str, str]], page: Page
    ) -> Iterator[Row]:
        staged = read_rows(shard_path(self.staging, task.split, task.name, "tar"))
        for line, row in zip(lines, staged, strict=True):
            fallen = reasons.get(line.key)
            if fallen is None:
                page.add(line)
                yield row
                continue
            image = next(content for suffix, content in row.items() if suffix in _IMAGES)
            line = rejected(line, Reject(fallen["reason"], fallen["detail"]))
            line = replace(line, duplicate_of=fallen["survivor"])
            page.add(line, partial(thumbnail_of, image, self.config))


def fallen_of(path: str, here: str, keys: set[str] | None = None) -> list[dict[str, str]]:
    """Return the fallen rows of one shard: those that name it, and those with its keys that name no shard.

    The table is read in pieces, so memory holds one shard's rows of it.
    """
    found: list[dict[str, str]] = []
    wanted = pa.array(sorted(keys or ()), pa.string())
    for batch in pq.ParquetFile(io.BytesIO(read_bytes(path))).iter_batches():
        is_here = pc.equal(batch["place"], here)
        is_named = pc.and_(pc.equal(batch["place"], ""), pc.is_in(batch["key"], wanted))
        found += batch.filter(pc.or_(is_here, is_named)).to_pylist()
    return found


def spread_by_key(table: pa.Table, num_groups: int) -> pa.Table:
    """Return rows with the group of their key."""
    digits = pc.utf8_slice_codeunits(table["key"], 0, KEY_DIGITS).to_pylist()
    groups = pa.array([int(digit, 16) % num_groups for digit in digits], pa.int32())
    return pa.table({"group": groups, **{name: table[name] for name in ("generation", "place", "key")}})


def gather_repeated(group: pa.Table) -> pa.Table:
    """Return the rows whose key another row of an earlier generation, or of an earlier shard, has already."""
    ordered = group.sort_by([("key", "ascending"), ("generation", "ascending"), ("place", "ascending")])
    keys = ordered["key"].to_pylist()
    is_repeated = pa.array([number > 0 and key == keys[number - 1] for number, key in enumerate(keys)], pa.bool_())
    return ordered.filter(is_repeated).select(["key", "place"])


def _repeated_keys(tables: LedgerTables, shuffle: Shuffle, num_groups: int) -> list[tuple[str, str, str, str, str]]:
    found: list[tuple[str, str]] = []
    for part in shuffle(tables, spread_by_key, gather_repeated, num_groups):
        found += zip(part["key"].to_pylist(), part["place"].to_pylist(), strict=True)
    return [(key, here, key, DUPLICATE_KEY, "") for key, here in sorted(found)]


def _apart(distance: int) -> str:
    return f"{distance} bits apart" if distance else ""


def _generations(ledger: LedgerPlace, keys: Sequence[str]) -> list[int]:
    """Return each row's generation: rows that a filter let in later are younger than those that were there."""
    if not ledger.amends:
        return [ledger.generation] * len(keys)
    older = read_ledger(ledger_path(ledger.amended_root, ledger.amends), ["key", "status"])
    there = set(older.filter(pc.equal(older["status"], OK))["key"].to_pylist())
    return [ledger.amended_generation if key in there else ledger.generation for key in keys]


def _write_fallen(path: str, rows: Sequence[tuple[str, str, str, str, str]]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in _FALLEN]
    table = pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=_FALLEN)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    write_bytes(path, stream.getvalue())
