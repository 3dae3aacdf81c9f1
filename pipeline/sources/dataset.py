"""A finished dataset of ours as a source: all rows or those of a list, in key order, for other shards or a subset.

Rows keep their keys, their splits and their members byte for byte; the shards' indexes say where each lies, so only
the bytes of the wanted rows are read.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from ldm.config import Config, digest_of
from ldm.storage import read_bytes
from pipeline.sources.files import NUM_READERS, read_range
from pipeline.sources.listing import Both, Listing, unpacked
from pipeline.sources.source import check_positive
from pipeline.sources.values import captions_of
from pipeline.store.manifest import Manifest, load_manifest, shard_path
from pipeline.store.schema import JSON, SourceRow, Split
from pipeline.store.shards import ShardIndex, read_index

MAX_NAMED = 3
"""Unknown keys that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedDatasetConfig(Config):
    """A dataset that jobs.shard_dataset finished."""

    folder: str
    """Where its manifest.json lies: a folder or a URL."""
    keys: str = ""
    """Text file or URL with the keys of the rows to take, one a line; empty takes all."""
    rows_per_shard: int = 1024
    """Rows in one shard."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("rows_per_shard", self.rows_per_shard)

    def build(self) -> FinishedDatasetSource:
        """Return the source."""
        return FinishedDatasetSource(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a row lies."""

    key: str
    split: Split
    shard: str
    row: int


class FinishedDatasetSource:
    """The rows of a `FinishedDatasetConfig`, sorted by key in each split."""

    def __init__(self, config: FinishedDatasetConfig, known: Container[str] = frozenset()) -> None:
        """Keep the configuration, and the keys that are not to be listed; indexes are read at the first use."""
        self.config = config
        self._known = known
        self._index_of_shard: dict[tuple[Split, str], ShardIndex] = {}

    @cached_property
    def digest(self) -> str:
        """Digest of the dataset's manifest, of the shard size and of the keys taken."""
        facts = {"manifest": self._manifest.digest, "rows_per_shard": self.config.rows_per_shard}
        return digest_of(facts | {"keys": self._listing.keys_of_split})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        return self._listing.shard_names(split)

    def open_shard_at_row(self, name: str, row: int, payload: str = "") -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on; their members come as they are, with no payload."""
        split = Split(name.partition("/")[0])
        places = unpacked(name, payload, lambda item: self._unpack(split, item)) if payload else self._shard(name)
        wanted = iter(places[row:])
        # Some rows are read ahead, since on an object store most of the time is waiting; never more than these.
        with ThreadPoolExecutor(NUM_READERS) as readers:
            while some := list(islice(wanted, NUM_READERS)):
                yield from readers.map(self._row, some)

    def shard_num_rows(self, name: str) -> int:
        """Return how many rows a shard holds."""
        return len(self._shard(name))

    def num_rows(self, split: Split) -> int:
        """Return how many rows a split holds."""
        return len(self._listing.entries_of_split[split])

    def without(self, known: Container[str]) -> FinishedDatasetSource:
        """Return the source of the rows whose keys are not in `known`."""
        return FinishedDatasetSource(self.config, Both(self._known, known))

    def previous_of(self, name: str) -> str:
        """Return "": rows are listed one by one."""
        return ""

    def shard_payload(self, name: str) -> str:
        """Return where the shard's rows lie, as shard and row number each."""
        return self._listing.payload(name, lambda place: [place.shard, place.row])

    @cached_property
    def _manifest(self) -> Manifest:
        return load_manifest(self.config.folder)

    @cached_property
    def _listing(self) -> Listing[_Place]:
        wanted = self._wanted_keys()
        found: dict[str, _Place] = {}
        for record in self._manifest.shards:
            for row, key in enumerate(self._index(record.split, record.name).keys):
                if wanted is None or key in wanted:
                    found.setdefault(key, _Place(key=key, split=record.split, shard=record.name, row=row))
            self._index_of_shard.clear()  # only workers come back to one
        if unknown := sorted((wanted or set()) - found.keys()):
            some = ", ".join(unknown[:MAX_NAMED])
            raise ValueError(f"{self.config.folder} lacks {len(unknown)} of the keys in {self.config.keys}: {some}")
        listing = Listing.of(((place.split, place) for place in found.values()), self.config.rows_per_shard)
        return listing.without(self._known)

    def _wanted_keys(self) -> set[str] | None:
        if not self.config.keys:
            return None
        lines = read_bytes(self.config.keys).decode("utf-8-sig", errors="replace").splitlines()
        return {line.strip() for line in lines if line.strip()}

    def _shard(self, name: str) -> Sequence[_Place]:
        return self._listing.shard(name)

    def _unpack(self, split: Split, item: JSON) -> _Place:
        shard, row = item
        return _Place(key=self._index(split, shard).keys[row], split=split, shard=shard, row=row)

    def _index(self, split: Split, shard: str) -> ShardIndex:
        if (split, shard) not in self._index_of_shard:
            self._index_of_shard[split, shard] = read_index(shard_path(self.config.folder, split, shard, "index"))
        return self._index_of_shard[split, shard]

    def _row(self, place: _Place) -> SourceRow:
        index = self._index(place.split, place.shard)
        offsets, sizes = index.offsets[place.row], index.sizes[place.row]
        first, stop = int(offsets[0]), int(offsets[-1] + sizes[-1])
        content = read_range(shard_path(self.config.folder, place.split, place.shard, "tar"), first, stop)
        spans = zip(index.suffixes, offsets - first, sizes, strict=True)
        members = {suffix: content[offset : offset + size] for suffix, offset, size in spans}
        facts = _facts(members)
        texts = facts.get("captions") or [members.get("txt")]
        return SourceRow(
            key=place.key,
            captions=captions_of(texts),
            url=facts.get("url"),
            attributes=facts.get("attributes") or {},
            members=members,
        )


def _facts(members: Mapping[str, bytes]) -> dict[str, JSON]:
    facts: dict[str, JSON] = json.loads(members["json"]) if "json" in members else {}
    return facts
