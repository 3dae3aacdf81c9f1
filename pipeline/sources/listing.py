"""Rows known in advance, one by one: sorted by key, and cut into shards named by the digest of their keys.

A shard's payload is the entries themselves, packed, so that a worker opens it without listing the source again, and
even after rows were added.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.sources.source import DIGEST_LENGTH
from pipeline.store.schema import JSON, Split

_NAME = re.compile(r"([^/]+)/[0-9a-f]{12}:(\d+)")


class Keyed(Protocol):
    """Anything that has a row's key."""

    @property
    def key(self) -> str:
        """The row's key."""
        ...


Entry = TypeVar("Entry", bound=Keyed)


@dataclass(frozen=True, slots=True)
class Both:
    """The keys of two collections, however large, without a copy of either."""

    first: Container[str]
    second: Container[str]

    def __contains__(self, key: object) -> bool:
        return key in self.first or key in self.second


@dataclass(frozen=True, slots=True)
class Listing(Generic[Entry]):
    """Entries of each split, sorted by key and cut into shards of equal length.

    Keys are digests, so sorting by them scatters neighbours over all shards.
    """

    entries_of_split: Mapping[Split, Sequence[Entry]]
    rows_per_shard: int

    @classmethod
    def of(cls, entries: Iterable[tuple[Split, Entry]], rows_per_shard: int) -> Listing[Entry]:
        """Return the listing of entries given with their splits, in any order."""
        entries_of_split: dict[Split, list[Entry]] = {split: [] for split in Split}
        for split, entry in entries:
            entries_of_split[split].append(entry)
        ordered = {split: sorted(found, key=lambda entry: entry.key) for split, found in entries_of_split.items()}
        return cls(ordered, rows_per_shard)

    def without(self, known: Container[str]) -> Listing[Entry]:
        """Return the listing of the entries whose key is not in `known`."""
        left = {
            split: [entry for entry in entries if entry.key not in known]
            for split, entries in self.entries_of_split.items()
        }
        return Listing(left, self.rows_per_shard)

    @property
    def keys_of_split(self) -> dict[str, list[str]]:
        """The keys of each split, in order."""
        return {split.value: [entry.key for entry in entries] for split, entries in self.entries_of_split.items()}

    def shard_names(self, split: Split) -> list[str]:
        """Return the names of a split's shards, in order."""
        entries, step = self.entries_of_split[split], self.rows_per_shard
        pieces = (entries[start : start + step] for start in range(0, len(entries), step))
        return [f"{split.value}/{_digest_of_keys(piece)}:{position}" for position, piece in enumerate(pieces)]

    def shard(self, name: str) -> Sequence[Entry]:
        """Return the entries of one shard.

        Raises:
            ValueError: if the entries at the shard's place are others by now, or the name is none of a listing's.
        """
        split, position = _place_of(name)
        start = position * self.rows_per_shard
        entries = self.entries_of_split[split][start : start + self.rows_per_shard]
        check_shard(name, entries)
        return entries

    def payload(self, name: str, pack: Callable[[Entry], JSON]) -> str:
        """Return a shard's entries as compact JSON."""
        return json.dumps([pack(entry) for entry in self.shard(name)], separators=(",", ":"))


def unpacked(name: str, payload: str, unpack: Callable[[JSON], Entry]) -> Sequence[Entry]:
    """Return the entries that `Listing.payload` packed.

    Raises:
        ValueError: if they are not those that the shard's name stands for.
    """
    entries = [unpack(item) for item in json.loads(payload)]
    check_shard(name, entries)
    return entries


def check_shard(name: str, entries: Sequence[Keyed]) -> None:
    """Refuse entries that are not those that a shard's name stands for.

    Raises:
        ValueError: naming the shard.
    """
    digest = name.partition("/")[2].partition(":")[0]
    if _digest_of_keys(entries) != digest:
        raise ValueError(f"the source no longer has the rows of shard {name}; open it with the payload of its plan")


def _digest_of_keys(entries: Iterable[Keyed]) -> str:
    return hashlib.sha256("\n".join(entry.key for entry in entries).encode()).hexdigest()[:DIGEST_LENGTH]


def _place_of(name: str) -> tuple[Split, int]:
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in [*Split]:
        raise ValueError(f"{name!r} is no shard of a listing; those are named SPLIT/DIGEST:NUMBER")
    return Split(match[1]), int(match[2])
