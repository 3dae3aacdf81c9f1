"""What a source of image-text rows is: named shards, each opened at any row.

A shard's name holds a digest of what it was cut from, so it means the same rows in every process and for ever: after
rows were added to the source a name either still means those rows or is no longer there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Sequence
from enum import StrEnum
from typing import Protocol

from pipeline.store.schema import SourceRow, Split

DIGEST_LENGTH = 12
"""Hex digits of the digest in a shard's name: 48 bits."""

BROKEN = "broken"
"""Attribute of a row that stands for something unreadable; its value says what is wrong, for a person."""


class Source(Protocol):
    """Image-text rows that can be read shard by shard."""

    @property
    def digest(self) -> str:
        """Digest of what the rows are and how they are cut into shards; holds no path and no time."""
        ...

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        ...

    def open_shard_at_row(self, name: str, row: int, payload: str = "") -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on.

        Args:
            name: one of `shard_names`, of this source or of an equal one in another process.
            row: the first row wanted.
            payload: what `shard_payload` said of the shard when it was planned; needed where the source has grown.

        Raises:
            ValueError: if the shard's rows are no longer those that the name stands for.
        """
        ...

    def shard_num_rows(self, name: str) -> int | None:
        """Return how many rows a shard holds, or None where only reading it would tell."""
        ...

    def num_rows(self, split: Split) -> int | None:
        """Return how many rows a split holds, or None where only reading them would tell."""
        ...

    def without(self, known: Container[str]) -> Source:
        """Return a source that lists no row whose key is in `known`.

        Sources that are cut by file return themselves: their names stay, and `previous_of` says whose rows they are.
        """
        ...

    def previous_of(self, name: str) -> str:
        """Return the unit a shard belongs to: a file's relative name, or "" where rows are listed one by one.

        Shards of one unit but of another content digest may hold rows that are already there.
        """
        ...

    def shard_payload(self, name: str) -> str:
        """Return compact JSON with which any process can open the shard, or "" where the name is enough."""
        ...


class Holdout(StrEnum):
    """What falls to validation as a whole."""

    ROWS = "rows"
    """Single rows: the share is met closely, and every file is read once for each split."""
    FILES = "files"
    """Whole files, by the digest of their names: each is read once; right where there are hundreds of files."""


def is_held_out(identity: str, share: float) -> bool:
    """Say whether what `identity` names falls to validation: its digest, as a fraction of 1, is below `share`."""
    return fraction_of(f"hold-out:{identity}") < share


def fraction_of(identity: str) -> float:
    """Return a number in [0, 1) that depends on nothing but `identity`."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64


def split_of(identity: str, holdout_share: float) -> Split:
    """Return the split that what `identity` names belongs to."""
    return Split.VALIDATION if is_held_out(identity, holdout_share) else Split.TRAIN


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
