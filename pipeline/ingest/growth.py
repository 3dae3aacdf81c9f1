"""How a dataset grows: from its journal and its source, the next generation of shards, or none.

A generation covers rows that no earlier one does, rows that failed, or shards whose filters changed. Everything is
derived from what is on disk, so two runs in the same place plan the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.filters import LEDGER_COLUMNS, FilterChange, FilterConfig, changes
from pipeline.ingest.page import ledger_path
from pipeline.ingest.retrying import Retry, is_retried, latest_counts
from pipeline.plan import ShardTask
from pipeline.sources.source import Source
from pipeline.store.journal import Cause, Generation, Journal, PlannedShard, chains, named, place
from pipeline.store.ledger import read_ledger
from pipeline.store.manifest import NUM_READERS, read_records
from pipeline.store.schema import Split

SUPERSEDES = "supersedes"
"""Detail of a record: lines of earlier shards, by status, in whose place the shard's own stand."""
MAX_LISTED = 10
"""Shards that a refusal names, beyond which they are only counted."""
logger = logging.getLogger(__name__)


class KnownKeys:
    """The keys in a dataset's ledgers; read when the first is asked for, since not every source asks."""

    def __init__(self, root: str, places: Sequence[str]) -> None:
        """Keep which ledgers there are."""
        self.root = root
        self.places = places

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @cached_property
    def _keys(self) -> frozenset[str]:
        def keys_of(shard: str) -> list[str]:
            found: list[str] = read_ledger(ledger_path(self.root, shard), ["key"])["key"].to_pylist()
            return found

        with ThreadPoolExecutor(NUM_READERS) as readers:
            return frozenset(key for keys in readers.map(keys_of, self.places) for key in keys)


@dataclass(frozen=True, slots=True)
class Refiltering:
    """What other filters would do.

    Attributes:
        generation: the shards that would be remade.
        change_of: what happens to each of them, by place.
        num_shards: shards of the whole dataset.
    """

    generation: Generation
    change_of: Mapping[str, FilterChange]
    num_shards: int

    def sentence(self, root: str) -> str:
        """Return what a person is told before anything is changed."""
        total = FilterChange(
            leaving=sum(change.leaving for change in self.change_of.values()),
            maybe_entering=sum(change.maybe_entering for change in self.change_of.values()),
            maybe_leaving=sum(change.maybe_leaving for change in self.change_of.values()),
            maybe_altered=sum(change.maybe_altered for change in self.change_of.values()),
        )
        lines = [f"  {shard}: {_said(change)}" for shard, change in list(self.change_of.items())[:MAX_LISTED]]
        if len(self.change_of) > MAX_LISTED:
            lines.append(f"  and {len(self.change_of) - MAX_LISTED:,} shards more")
        return "\n".join(
            [
                f"{root} was made with other filters; those given here would change "
                f"{len(self.change_of):,} of its {self.num_shards:,} shards:",
                *lines,
                f"  in all {_said(total)}",
                "give --refilter to remake these shards (the others are not touched), or choose another folder",
            ]
        )


def _said(change: FilterChange) -> str:
    said = [f"{change.leaving:,} rows would leave, up to {change.maybe_entering:,} could come in"]
    if change.maybe_leaving:
        said.append(f"{change.maybe_leaving:,} may leave")
    if change.maybe_altered:
        said.append(f"{change.maybe_altered:,} may lose captions")
    return ", ".join(said)


def journal_filters(journal: Journal, default: FilterConfig) -> FilterConfig:
    """Return the filters that the folder's rows are under; the given ones where nothing was planned yet."""
    latest = journal.latest
    return default if latest is None else FilterConfig.from_yaml(json.dumps(dict(latest.filters)))


def new_generation(config: DatasetConfig, journal: Journal, source: Source) -> Generation | None:
    """Return a generation of the rows that no earlier one covers; None where there are none.

    Raises:
        ValueError: if the source has no rows at all.
    """
    if journal.latest is not None and journal.latest.source_digest == source.digest:
        return None
    there = [place(shard.split, shard.name) for _, shard in journal.shards()]
    unseen = source.without(KnownKeys(config.root, there)) if there else source
    shards = named(journal, _uncovered(journal, unseen))
    if not shards:
        if journal.latest is None:
            raise ValueError(f"{type(config.source).__name__} has no rows")
        return None
    return _generation(config, journal, Cause.SOURCE, shards, source_digest=source.digest)


def retry_generation(config: DatasetConfig, journal: Journal, source: Source, retry: Retry) -> Generation | None:
    """Return a generation of the rows that failed and are worth another try; None where there are none."""
    record_of = {place(record.split, record.name): record for record in read_records(config.root)}
    units = _units(source)
    shards: list[PlannedShard] = []
    num_gone = 0
    for chain in chains(journal.shards()).values():
        places = tuple(place(shard.split, shard.name) for shard in chain)
        records = [record_of[name] for name in places]
        superseded = (record.details.get(SUPERSEDES, {}) for record in records)
        counts = latest_counts((record.counts for record in records), superseded)
        if not any(is_retried(status, retry) for status in counts):
            continue
        if source.previous_of(chain[0].source_name) and unit_of(chain[0].source_name) not in units:
            num_gone += 1
            continue
        num_rows = sum(count for status, count in counts.items() if is_retried(status, retry))
        again = replace(chain[0], previous="", retries=places, retry=retry.value, amends="", num_rows=num_rows)
        shards.append(again)
    if num_gone:
        logger.warning("rows of %d shards can't be tried again: their files have changed since", num_gone)
    return _generation(config, journal, Cause.RETRY, named(journal, shards)) if shards else None


def refiltering(config: DatasetConfig, journal: Journal) -> Refiltering:
    """Return what the filters in `config` would do to each shard, from the ledgers alone."""
    before = journal_filters(journal, config.filters)
    there = {(record.split, record.name) for record in read_records(config.root)}
    shards = [shard for _, shard in journal.shards() if (shard.split, shard.name) in there]

    def change(shard: PlannedShard) -> FilterChange:
        table = read_ledger(ledger_path(config.root, place(shard.split, shard.name)), LEDGER_COLUMNS)
        return changes(before, config.filters, table)

    with ThreadPoolExecutor(NUM_READERS) as readers:
        found = list(zip(shards, readers.map(change, shards), strict=True))
    changed = [(shard, each) for shard, each in found if each.is_any]
    amended = [replace(shard, amends=place(shard.split, shard.name)) for shard, _ in changed]
    dropped = tuple(shard.amends for shard in amended)
    generation = _generation(config, journal, Cause.REFILTER, named(journal, amended), dropped=dropped)
    return Refiltering(generation, {place(s.split, s.name): each for s, each in changed}, len(shards))


def dropping(config: DatasetConfig, journal: Journal, source: Source, todo: Sequence[ShardTask]) -> Generation | None:
    """Return a generation that drops planned shards whose file has changed before they were made; None without any."""
    units = _units(source)
    lost = tuple(
        place(task.split, task.name)
        for task in todo
        if source.previous_of(task.source_name) and unit_of(task.source_name) not in units
    )
    return _generation(config, journal, Cause.SOURCE, (), dropped=lost) if lost else None


def unit_of(source_name: str) -> str:
    """Return what a shard's rows are cut from: `train/file@digest` of `train/file@digest:start-stop`."""
    return source_name.rpartition(":")[0]


def _uncovered(journal: Journal, source: Source) -> Iterator[PlannedShard]:
    """Yield the source's shards that hold rows of no earlier generation, still without names."""
    planned = [shard for generation in journal.generations for shard in generation.shards]
    lost = {unit_of(shard.source_name) for shard in planned if place(shard.split, shard.name) in journal.dropped}
    live = [shard for _, shard in journal.shards()]
    covered = {unit_of(shard.source_name) for shard in live} - (lost - {unit_of(shard.source_name) for shard in live})
    files = {source.previous_of(shard.source_name) for shard in live}
    for split in Split:
        for name in source.shard_names(split):
            file = source.previous_of(name)
            if file and unit_of(name) in covered:
                continue
            yield PlannedShard(
                split=split,
                name="",
                source_name=name,
                source_payload=source.shard_payload(name),
                previous=file if file in files else "",
                num_rows=source.shard_num_rows(name) or 0,
            )


def _units(source: Source) -> frozenset[str]:
    return frozenset(unit_of(name) for split in Split for name in source.shard_names(split))


def _generation(
    config: DatasetConfig,
    journal: Journal,
    cause: Cause,
    shards: tuple[PlannedShard, ...],
    *,
    source_digest: str = "",
    dropped: tuple[str, ...] = (),
) -> Generation:
    """Return the journal's next generation; one that did not look at the source keeps what the last one saw there."""
    seen = journal.latest.source_digest if journal.latest else ""
    filters = config.filters if cause is Cause.REFILTER else journal_filters(journal, config.filters)
    return Generation(
        number=len(journal.generations),
        cause=cause,
        source_digest=source_digest or seen,
        filters=filters.to_dict(),
        shards=shards,
        dropped=dropped,
    )
