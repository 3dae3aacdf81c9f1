"""What a source of image-text rows is: named shards, each opened at any row.

A source's shards are cut from a fixed order of its rows, so a name means the same rows in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.store.schema import SourceRow, Split


class Source(Protocol):
    """Image-text rows that can be read shard by shard."""

    @property
    def digest(self) -> str:
        """Digest of what the rows are and how they are cut into shards; holds no path and no time."""
        ...

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        ...

    def open_shard_at_row(self, name: str, row: int) -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on."""
        ...

    def shard_num_rows(self, name: str) -> int | None:
        """Return how many rows a shard holds, or None where only reading it would tell."""
        ...

    def num_rows(self, split: Split) -> int | None:
        """Return how many rows a split holds, or None where only reading them would tell."""
        ...


def is_held_out(identity: str, share: float) -> bool:
    """Say whether what `identity` names falls to validation: its digest, as a fraction of 1, is below `share`."""
    digest = hashlib.sha256(f"hold-out:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_of(identity: str, holdout_share: float) -> Split:
    """Return the split that what `identity` names belongs to."""
    return Split.VALIDATION if is_held_out(identity, holdout_share) else Split.TRAIN


def shard_name(split: Split, position: int) -> str:
    """Return the name of a split's shard number `position`."""
    return f"{split.value}/{position:06d}"


def position_of(name: str) -> tuple[Split, int]:
    """Return what `shard_name` was given.

    Raises:
        ValueError: if it made no such name.
    """
    split, _, position = name.partition("/")
    return Split(split), int(position)


class Keyed(Protocol):
    """Anything that has a row's key."""

    @property
    def key(self) -> str:
        """The row's key."""
        ...


Entry = TypeVar("Entry", bound=Keyed)


@dataclass(frozen=True, slots=True)
class Listing(Generic[Entry]):
    """Rows known in advance, sorted by key and cut into shards of equal length.

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

    def shard_names(self, split: Split) -> list[str]:
        """Return the names of a split's shards, in order."""
        num_shards = -(-len(self.entries_of_split[split]) // self.rows_per_shard)
        return [shard_name(split, position) for position in range(num_shards)]

    def shard(self, name: str) -> Sequence[Entry]:
        """Return the entries of one shard."""
        split, position = position_of(name)
        start = position * self.rows_per_shard
        return self.entries_of_split[split][start : start + self.rows_per_shard]


def check_share(holdout_share: float) -> None:
    """Refuse a share outside [0, 1).

    Raises:
        ValueError: saying what came.
    """
    if not 0 <= holdout_share < 1:
        raise ValueError(f"holdout_share must be at least 0 and below 1, got {holdout_share}")


def check_positive(name: str, number: int) -> None:
    """Refuse a count below one.

    Raises:
        ValueError: saying which and what came.
    """
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
