"""Taking copies out of shards: staged shards → which of their rows are copies, over all shards → the shards themselves.

Order: the shards of a generation are first made under `<root>/staging/` → rows whose key is there twice, then rows
whose fingerprints say that they are copies (`fates`), are found by steps over all ledgers → for each shard a table of
its rows that fall → each shard is copied from its staged form without them. Bytes of rows that stay are not touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc

from ldm.storage import exists, join, list_names, read_text, remove_file, remove_folder, write_bytes
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.duplicates import FINGERPRINTS
from pipeline.ingest.exchange import ROWS_PER_GROUP, Exchange, Files, Shuffle, group_name, read_table, table_path
from pipeline.ingest.fates import FALLEN, find_duplicates, group_of_key
from pipeline.ingest.page import Page, ledger_path
from pipeline.ingest.rows import rejected, thumbnail_of
from pipeline.ingest.transforms import ImageFormat
from pipeline.plan import ShardTask
from pipeline.store.journal import place
from pipeline.store.ledger import DUPLICATE_KEY, LEDGER_SUFFIX, OK, LedgerLine, lines_of, read_ledger
from pipeline.store.manifest import RECORD_SUFFIX, ShardRecord, shard_path
from pipeline.store.schema import Reject, Row
from pipeline.store.shards import read_rows, write_shard

STEPS = "steps"
"""Folder below the staging of what the search for copies writes."""
_REPEATED = "repeated"
_FALLEN = "fallen"
_DONE = "done"
"""Written last, removed first: without it an absent table does not mean that no row falls."""

_IMAGES = frozenset(ImageFormat)


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
        steps: folder of the steps, one of which found rows that are no part of it any more; empty where all are.
    """

    places: tuple[LedgerPlace, ...]
    steps: str = ""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> pa.Table: ...

    @overload
    def __getitem__(self, number: slice) -> LedgerTables: ...

    def __getitem__(self, number: int | slice) -> pa.Table | LedgerTables:
        """Return the fingerprints of one ledger's rows with the column `place`."""
        if isinstance(number, slice):
            return LedgerTables(self.places[number], self.steps)
        ledger = self.places[number]
        names = ["key", "status", "payload_sha256", "pixel_sha256", "perceptual_hash"]
        table = read_ledger(ledger_path(ledger.root, ledger.place), names)
        table = table.filter(pc.equal(table["status"], OK))
        if self.steps:
            fallen = pa.array([line["key"] for line in fallen_of(self.steps, _REPEATED, ledger.place)], pa.string())
            table = table.filter(pc.invert(pc.is_in(table["key"], fallen)))
        generations = pa.array(_generations(ledger, table["key"].to_pylist()), pa.int32())
        places = pa.array([ledger.place] * len(table), pa.string())
        named = {"generation": generations, "place": places}
        return pa.table({name: named[name] if name in named else table[name] for name in FINGERPRINTS.names})


def find_fallen(
    config: DatasetConfig,
    staging: str,
    places: Sequence[LedgerPlace],
    num_rows: int,
    shuffle: Shuffle,
    rows_per_group: int = ROWS_PER_GROUP,
) -> None:
    """Write, for each shard that has any, the table of its staged rows that are copies.

    Args:
        config: the dataset's configuration.
        staging: the folder of staged shards, where the tables go.
        places: all ledgers, those of finished shards and of staged ones.
        num_rows: rows in all their tars, about.
        shuffle: brings rows of one group together; few rows come together here.
        rows_per_group: rows that one process may hold, about.
    """
    folder = join(staging, STEPS)
    remove_file(join(folder, _DONE))
    if list_names(folder):
        remove_folder(folder)
    exchange = Exchange(folder, shuffle, rows_per_group)
    ledgers = tuple(places)
    found = exchange.run("keys", LedgerTables(ledgers), num_rows, spread_by_key, gather_repeated)
    repeated = found.get("repeated", Files())
    _sort_by_place(exchange, _REPEATED, repeated)
    copies = find_duplicates(LedgerTables(ledgers, folder), num_rows, config.duplicates, exchange)
    _sort_by_place(exchange, _FALLEN, repeated + copies)
    write_bytes(join(folder, _DONE), b"")


def _sort_by_place(exchange: Exchange, step: str, rows: Files) -> None:
    """Write one table a shard, under the step's name."""
    if rows.num_rows:
        exchange.run(step, rows, rows.num_rows, spread_by_place, gather_by_place)


class SettledStage:
    """Copies staged shards without the rows that fell."""

    def __init__(self, config: DatasetConfig, staging: str) -> None:
        """Keep where staged shards and the tables of fallen rows lie."""
        self.config = config
        self.staging = staging

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tar, index and ledger and return their record."""
        here = place(task.split, task.name)
        record = ShardRecord.from_dict(json.loads(read_text(join(self.staging, f"{here}.{RECORD_SUFFIX}"))))
        lines = lines_of(read_ledger(ledger_path(self.staging, here)))
        steps = join(self.staging, STEPS)
        reasons = {line["key"]: line for line in fallen_of(steps, _FALLEN, here)}
        if not exists(join(steps, _DONE)):
            raise RuntimeError(f"the search for copies in {steps} has not ended, or another run began it anew")
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


def fallen_of(steps: str, step: str, here: str) -> list[dict[str, str]]:
    """Return the rows of one shard that a step found to fall."""
    path = table_path(join(steps, step), here)
    return read_table(path).to_pylist() if exists(path) else []


def spread_by_key(table: pa.Table, num_groups: int) -> pa.Table:
    """Return rows with the group of their key."""
    named = table.select(["generation", "place", "key"])
    return named.append_column("group", group_of_key(named["key"], num_groups))


def gather_repeated(group: pa.Table) -> Mapping[str, pa.Table]:
    """Return the rows whose key another row of an earlier generation, or of an earlier shard, has already."""
    ordered = group.sort_by([("key", "ascending"), ("generation", "ascending"), ("place", "ascending")])
    keys = ordered["key"].to_pylist()
    is_repeated = pa.array([number > 0 and key == keys[number - 1] for number, key in enumerate(keys)], pa.bool_())
    again = ordered.filter(is_repeated)
    reasons, details = (pa.array([text] * len(again), pa.string()) for text in (DUPLICATE_KEY, ""))
    columns = [again["key"], again["place"], again["key"], reasons, details]
    return {group_name("repeated", group): pa.table(columns, schema=FALLEN)}


def spread_by_place(table: pa.Table, num_groups: int) -> pa.Table:
    """Return rows with the group of their shard."""
    numbers = [int(here.rpartition("/")[2]) % num_groups for here in table["place"].to_pylist()]
    return table.append_column("group", pa.array(numbers, pa.int32()))


def gather_by_place(group: pa.Table) -> Mapping[str, pa.Table]:
    """Return each shard's rows, sorted, under the shard's name."""
    rows = group.select(FALLEN.names).sort_by([("place", "ascending"), ("key", "ascending")])
    places = rows["place"]
    return {here: rows.filter(pc.equal(places, here)) for here in places.unique().to_pylist()}


def _generations(ledger: LedgerPlace, keys: Sequence[str]) -> list[int]:
    """Return each row's generation: rows that a filter let in later are younger than those that were there."""
    if not ledger.amends:
        return [ledger.generation] * len(keys)
    older = read_ledger(ledger_path(ledger.amended_root, ledger.amends), ["key", "status"])
    there = set(older.filter(pc.equal(older["status"], OK))["key"].to_pylist())
    return [ledger.amended_generation if key in there else ledger.generation for key in keys]
