"""All pairs of 64-bit hashes that differ in at most k bits, without comparing each with each.

Pigeonhole: cut the bits into k + 1 bands; k flipped bits leave one band whole, so only hashes that share a band's bits
are compared. Where very many share one (a bucket), the bits outside it are cut into k + 1 bands once more, and so on;
what is still crowded is compared in blocks. A pair is reported once, from the first band in which it agrees.

Letters: n hash, p pair. Hashes of one bucket stand side by side; positions are the caller's numbers for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Hashes: TypeAlias = NDArray[np.uint64]
Positions: TypeAlias = NDArray[np.int64]
Pairs: TypeAlias = tuple[Positions, Positions]

SMALL_BUCKET = 32
"""Buckets up to this size are compared all at once, each hash with the next, the next but one, ..."""
CROWDED_BUCKET = 2048
"""Beyond this size one more cut into bands costs less than comparing each with each."""
MIN_BAND_BITS = 3
"""Narrower bands would hand nearly all pairs on to the next cut."""
_BLOCK_ROWS, _BLOCK_COLUMNS = 512, 4096


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a pair may still differ, and where it must.

    Attributes:
        free: bits outside the bands that brought the bucket together.
        unlike: bands in which a pair of this bucket must differ; where it agrees, it was reported from there.
    """

    free: int
    unlike: tuple[int, ...]

    def bands(self, distance: int) -> list[tuple[int, Cut]]:
        """Return k + 1 bands of the free bits, as masks, each with the cut of the buckets that it makes."""
        masks = band_masks(self.free, distance + 1)
        return [(mask, Cut(self.free & ~mask, self.unlike + tuple(masks[:i]))) for i, mask in enumerate(masks)]


def band_masks(bits: int, num_bands: int) -> list[int]:
    """Return masks of `num_bands` nearly equal parts of the set bits of `bits`, from the highest down."""
    places = [place for place in range(bits.bit_length() - 1, -1, -1) if bits >> place & 1]
    bounds = [len(places) * i // num_bands for i in range(num_bands + 1)]
    return [sum(1 << place for place in places[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]


def close_pairs(hashes: Hashes, positions: Positions, buckets: NDArray[np.int64], cut: Cut, distance: int) -> Pairs:
    """Return the pairs of equal bucket within `distance` bits by their positions, in each pair the one given first.

    Args:
        hashes: n, distinct within a bucket.
        positions: n, what to call each hash.
        buckets: n, in which equal numbers stand side by side.
        cut: which bits the hashes of a bucket share, and which pairs of it are found elsewhere.
        distance: bits that a pair may differ in.
    """
    if not len(hashes):
        return _none()
    starts = np.flatnonzero(np.r_[True, buckets[1:] != buckets[:-1]])
    sizes = np.diff(np.r_[starts, len(buckets)])
    found = [_small_buckets(hashes, positions, starts, sizes, cut, distance)]
    for start, size in zip(starts[sizes > SMALL_BUCKET], sizes[sizes > SMALL_BUCKET], strict=True):
        bucket = slice(start, start + size)
        compare = _cut_again if _is_worth_a_cut(size, cut, distance) else _in_blocks
        found.append(compare(hashes[bucket], positions[bucket], cut, distance))
    return _joined(found)


def _is_worth_a_cut(size: int, cut: Cut, distance: int) -> bool:
    return size > CROWDED_BUCKET and cut.free.bit_count() >= MIN_BAND_BITS * (distance + 1)


def _cut_again(hashes: Hashes, positions: Positions, cut: Cut, distance: int) -> Pairs:
    """Compare one crowded bucket through the bands of the bits that its hashes do not share."""
    found = []
    for mask, finer in cut.bands(distance):
        shared = hashes & np.uint64(mask)
        order = np.argsort(shared, kind="stable")
        _, buckets = np.unique(shared[order], return_inverse=True)
        found.append(close_pairs(hashes[order], positions[order], buckets, finer, distance))
    return _joined(found)


def _small_buckets(
    hashes: Hashes,
    positions: Positions,
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    cut: Cut,
    distance: int,
) -> Pairs:
    ends = np.repeat(starts + np.where(sizes <= SMALL_BUCKET, sizes, 0), sizes)
    here = np.arange(len(hashes))
    found = [_none()]
    for step in range(1, SMALL_BUCKET):
        here = here[here + step < ends[here]]
        if not len(here):
            break
        close = here[np.bitwise_count(hashes[here] ^ hashes[here + step]) <= distance]
        found.append(_first_met(hashes, positions, (close, close + step), cut))
    return _joined(found)


def _in_blocks(hashes: Hashes, positions: Positions, cut: Cut, distance: int) -> Pairs:
    """Compare each hash of one bucket with each later one."""
    found = [_none()]
    for top in range(0, len(hashes), _BLOCK_ROWS):
        rows = hashes[top : top + _BLOCK_ROWS, None]
        for left in range(top, len(hashes), _BLOCK_COLUMNS):
            differing = rows ^ hashes[None, left : left + _BLOCK_COLUMNS]
            row, column = np.nonzero(np.bitwise_count(differing) <= distance)
            row, column = row + top, column + left
            found.append(_first_met(hashes, positions, (row[row < column], column[row < column]), cut))
    return _joined(found)


def _first_met(hashes: Hashes, positions: Positions, pairs: Pairs, cut: Cut) -> Pairs:
    """Return the positions of those close pairs that no earlier band has reported."""
    first, second = pairs
    differing = hashes[first] ^ hashes[second]
    is_new = np.ones(len(first), bool)
    for band in cut.unlike:
        is_new &= (differing & np.uint64(band)) != 0
    return positions[first[is_new]], positions[second[is_new]]


def _none() -> Pairs:
    return np.empty(0, np.int64), np.empty(0, np.int64)


def _joined(found: Sequence[Pairs]) -> Pairs:
    return np.concatenate([first for first, _ in found]), np.concatenate([second for _, second in found])
