"""Files cut into slices of rows, and the names of the shards that are made of them: `SPLIT/FILE@DIGEST:START-STOP`.

A training shard is one slice without its held-out rows; a validation shard is the held-out rows of several slices of
the same file, so that it is about as long. Every row is in exactly one of them. START and STOP are row numbers or byte
offsets, as the file's format has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.sources.source import Holdout, is_held_out
from pipeline.store.schema import Split

_NAME = re.compile(r"([^/]+)/(.+)@([0-9a-f]{12}):(\d+)-(\d+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicedFile:
    """One file of a source, cut.

    Attributes:
        name: its name at the source.
        digest: 12 hex digits that change with its content.
        num_rows: its rows; 0 where only reading would tell.
        bounds: where slices begin, and where the last one ends; empty for a file without rows.
    """

    name: str
    digest: str
    num_rows: int
    bounds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Places [start, stop) of one file, as one split sees them."""

    split: Split
    file: str
    digest: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The shard's name."""
        return f"{self.split.value}/{self.file}@{self.digest}:{self.start}-{self.stop}"

    def check(self, digest: str) -> None:
        """Refuse a file whose digest is another by now; only as much as `digest` holds is compared.

        Raises:
            ValueError: naming the shard.
        """
        if not self.digest.startswith(digest):
            raise ValueError(f"{self.file} is no longer the file that shard {self.name} was cut from")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How files are shared out to splits.

    Attributes:
        holdout_share: share of what is kept for validation.
        holdout: what is held out as a whole.
    """

    holdout_share: float
    holdout: Holdout = Holdout.ROWS

    def shard_names(self, files: Iterable[SlicedFile], split: Split) -> list[str]:
        """Return the names of a split's shards, in the order of the files."""
        return [piece.name for file in files for piece in self._slices(file, split)]

    def takes(self, identity: str, piece: Slice) -> bool:
        """Say whether the row that `identity` names belongs to the slice's split."""
        if self.holdout is Holdout.FILES:
            return True
        return is_held_out(identity, self.holdout_share) == (piece.split is Split.VALIDATION)

    def num_rows(self, files: Iterable[SlicedFile], split: Split) -> int | None:
        """Return about how many rows a split holds; None where no file says."""
        there = list(files)
        total = sum(file.num_rows for file in there)
        if not total:
            return None
        if self.holdout is Holdout.FILES:
            return sum(file.num_rows for file in there if self._slices(file, split))
        held_out = round(total * self.holdout_share)
        return held_out if split is Split.VALIDATION else total - held_out

    def _slices(self, file: SlicedFile, split: Split) -> list[Slice]:
        bounds, width = file.bounds, 1
        if self.holdout is Holdout.FILES and is_held_out(file.name, self.holdout_share) != (split is Split.VALIDATION):
            return []
        if self.holdout is Holdout.ROWS and split is Split.VALIDATION:
            if not self.holdout_share:
                return []
            width = max(1, round(1 / self.holdout_share))
        return [
            Slice(
                split=split,
                file=file.name,
                digest=file.digest,
                start=bounds[first],
                stop=bounds[min(first + width, len(bounds) - 1)],
            )
            for first in range(0, len(bounds) - 1, width)
        ]


def slice_of(name: str) -> Slice:
    """Return the slice that a shard's name stands for.

    Raises:
        ValueError: if it is no such name.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in [*Split]:
        raise ValueError(f"{name!r} is no shard of a cut file; those are named SPLIT/FILE@DIGEST:START-STOP")
    return Slice(split=Split(match[1]), file=match[2], digest=match[3], start=int(match[4]), stop=int(match[5]))


def bounds_of(num_rows: int, rows_per_slice: int) -> tuple[int, ...]:
    """Return the row numbers at which slices of equal length begin, and the end."""
    return (*range(0, num_rows, rows_per_slice), num_rows) if num_rows else ()
