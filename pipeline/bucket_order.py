"""The order of batches over pictures of several shapes: each global batch holds rows of one shape, a bucket.

Each bucket has an order of rows of its own (`pipeline.order`), cut into batches. Epoch e of the whole holds, of a
bucket of N_b rows and batches of B, its batches [e N_b // B, (e + 1) N_b // B), those of all buckets shuffled together
by (seed, e). So buckets come as often as they have rows, none is ever more than a batch behind or ahead, and no row
comes twice before all others of its bucket came once. With one bucket the order is that of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ldm.randomness import Draw, generator
from pipeline.order import CACHED_EPOCHS, Order, Positions, Rows, rank_positions, rows_at


class BatchPlace(NamedTuple):
    """Where a global batch comes from: its bucket, and the first of its positions in the bucket's own sequence."""

    bucket: int
    first: int


@dataclass(frozen=True, kw_only=True, eq=False)
class BucketOrder:
    """What the sequence of batches is a function of.

    Attributes:
        buckets: the order of rows of each bucket, none empty.
        batch_size: rows B of a global batch.
        seed: seed of the shuffle.
    """

    buckets: tuple[Order, ...]
    batch_size: int
    seed: int

    @cached_property
    def num_rows(self) -> int:
        """Rows of all buckets: one epoch."""
        return sum(order.num_rows for order in self.buckets)

    @cached_property
    def first_shards(self) -> tuple[int, ...]:
        """The first shard of each bucket, counted over all buckets."""
        return tuple(accumulate((len(order.shard_sizes) for order in self.buckets), initial=0))

    def check_start(self, samples_seen: int) -> None:
        """Refuse to begin amid a batch.

        Raises:
            ValueError: if there are several buckets and `samples_seen` is no multiple of the batch.
        """
        if len(self.buckets) > 1 and samples_seen % self.batch_size:
            raise ValueError(
                f"pictures of several shapes come in whole batches: {samples_seen} samples seen are no multiple of "
                f"batch_size {self.batch_size}; go on with the batch size that the run began with"
            )

    def place_of(self, samples_seen: int) -> BatchPlace:
        """Return where the global batch that begins at a position of the whole sequence comes from."""
        if len(self.buckets) == 1:
            return BatchPlace(0, samples_seen)
        number = samples_seen // self.batch_size
        epoch = number * self.batch_size // self.num_rows
        while self._batches_before(epoch + 1) <= number:
            epoch += 1
        layout = _layout(self, epoch)
        place = number - self._batches_before(epoch)
        return BatchPlace(int(layout.buckets[place]), int(layout.batches[place]) * self.batch_size)

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * order.num_rows // self.batch_size for order in self.buckets)


class BucketRows(NamedTuple):
    """Rows of one bucket in some neighbouring global batches.

    Attributes:
        batches: which of the batches they are, counted from the first.
        positions: their positions in the whole sequence, batch after batch, equally many of each.
        rows: where they lie; shards are counted over all buckets.
    """

    batches: list[int]
    positions: Positions
    rows: Rows


def rank_rows(order: BucketOrder, start: int, num_batches: int, rank: int, world: int) -> list[BucketRows]:
    """Return what `rank` of `world` serves of some global batches from position `start` on, bucket by bucket."""
    size = order.batch_size
    starts = range(start, start + num_batches * size, size)
    places = [order.place_of(first) for first in starts]
    found = []
    for bucket in sorted({place.bucket for place in places}):
        here = [number for number, place in enumerate(places) if place.bucket == bucket]
        firsts = [places[number].first for number in here]
        own = [rank_positions(first, first + size, rank, world) for first in firsts]
        shifted = [part + starts[number] - first for number, first, part in zip(here, firsts, own, strict=True)]
        rows = rows_at(order.buckets[bucket], np.concatenate(own))
        rows = Rows(rows.shards + order.first_shards[bucket], rows.rows)
        found.append(BucketRows(here, np.concatenate(shifted), rows))
    return found


class _Layout(NamedTuple):
    """One epoch: the bucket of each of its batches, and the batch's number in that bucket's own sequence."""

    buckets: Int64[np.ndarray, " batches"]
    batches: Int64[np.ndarray, " batches"]


@lru_cache(maxsize=CACHED_EPOCHS)
def _layout(order: BucketOrder, epoch: int) -> _Layout:
    sizes = [bucket.num_rows for bucket in order.buckets]
    starts = [epoch * size // order.batch_size for size in sizes]
    stops = [(epoch + 1) * size // order.batch_size for size in sizes]
    counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
    buckets = np.repeat(np.arange(len(sizes)), counts)
    words = generator(order.seed, Draw.BUCKET, epoch).bit_generator.random_raw(len(buckets))
    buckets = buckets[np.argsort(words, kind="stable")]
    batches = np.empty_like(buckets)
    for bucket, start in enumerate(starts):
        here = buckets == bucket
        batches[here] = start + np.arange(np.count_nonzero(here))
    return _Layout(buckets, batches)
