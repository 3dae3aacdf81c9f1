"""Which row stands at a position of the endless training sequence, as a pure function of integers.

Order of one epoch e of N rows, which holds the positions g in [e N, (e + 1) N):
shards permuted by (seed, e) → concatenated → cut into S contiguous chunks, one a stream → chunks shuffled in blocks.
Position g belongs to stream g % S, so a stream's chunk has exactly as many rows as it has positions in the epoch
(counts differ by at most one), and rank r of W, where W divides S, serves the positions with g % W == r.

Nothing of size N is ever made: a look-up costs the epoch's shard list once, and the blocks it touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ldm.randomness import Draw, generator

CACHED_EPOCHS = 4
CACHED_BLOCKS = 256

Positions = Int64[np.ndarray, " n"]


class Rows(NamedTuple):
    """Rows of a sharded dataset: shard and row inside the shard, both int64 of shape (n,)."""

    shards: Int64[np.ndarray, " n"]
    rows: Int64[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """What the sequence is a function of.

    Attributes:
        shard_sizes: rows of each shard, in the manifest's order.
        seed: seed of the shuffle.
        num_streams: canonical streams S; every world size that divides it sees the same global batches.
        block_rows: rows that are shuffled together inside a stream.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    num_streams: int = 8
    block_rows: int = 8192

    def __post_init__(self) -> None:
        if sum(self.shard_sizes) < 1 or min(self.shard_sizes) < 0:
            raise ValueError(f"an order needs at least one row, got {len(self.shard_sizes)} shards of no rows")
        if self.num_streams < 1 or self.block_rows < 1:
            raise ValueError(
                f"num_streams and block_rows must be at least 1, got {self.num_streams} and {self.block_rows}"
            )

    @cached_property
    def num_rows(self) -> int:
        """Rows N of one epoch."""
        return sum(self.shard_sizes)


def check_world(*, world: int, num_streams: int, batch_size: int) -> None:
    """Refuse a world size that would change the order or give ranks unequal batches.

    Raises:
        ValueError: if `world` does not divide the streams and the global batch.
    """
    if world < 1 or num_streams % world:
        raise ValueError(f"the number of ranks must divide num_streams={num_streams}, got {world} ranks")
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"the number of ranks must divide batch_size={batch_size}, got {world} ranks")


def rank_positions(start: int, stop: int, rank: int, world: int) -> Positions:
    """Return the positions in [start, stop) that `rank` of `world` serves, ascending."""
    return np.arange(start + (rank - start) % world, stop, world, dtype=np.int64)


def rows_at(order: Order, positions: Positions) -> Rows:
    """Return the rows that stand at `positions` (any order, any epochs, from 0 on)."""
    rows = Rows(np.empty_like(positions), np.empty_like(positions))
    epochs = positions // order.num_rows
    for epoch in np.unique(epochs):
        here = np.flatnonzero(epochs == epoch)
        found = _rows_of_epoch(order, int(epoch), positions[here])
        rows.shards[here] = found.shards
        rows.rows[here] = found.rows
    return rows


def sequential_rows_at(order: Order, positions: Positions) -> Rows:
    """Return the rows at `positions` of the unshuffled sequence: shard after shard, again and again."""
    ends = np.cumsum(order.shard_sizes)
    return _rows_of_concatenation(positions % order.num_rows, np.arange(len(ends)), ends)


class _Epoch(NamedTuple):
    """Layout of one epoch: shards in permuted order, their ends, and each stream's chunk."""

    shards: Int64[np.ndarray, " shards"]
    ends: Int64[np.ndarray, " shards"]
    first_positions: Int64[np.ndarray, " streams"]
    chunk_starts: Int64[np.ndarray, " streams"]
    chunk_sizes: Int64[np.ndarray, " streams"]


@lru_cache(maxsize=CACHED_EPOCHS)
def _epoch_layout(order: Order, epoch: int) -> _Epoch:
    shards = _permutation(order.seed, epoch, 0, len(order.shard_sizes))
    ends = np.cumsum(np.asarray(order.shard_sizes, np.int64)[shards])
    start = epoch * order.num_rows
    streams = np.arange(order.num_streams, dtype=np.int64)
    first_offsets = (streams - start) % order.num_streams
    # Positions start + offset, start + offset + S, ... below start + N; none if the offset lies beyond the epoch.
    sizes = (order.num_rows - first_offsets + order.num_streams - 1) // order.num_streams
    return _Epoch(shards, ends, start + first_offsets, np.cumsum(sizes) - sizes, sizes)


def _rows_of_epoch(order: Order, epoch: int, positions: Positions) -> Rows:
    layout = _epoch_layout(order, epoch)
    streams = positions % order.num_streams
    ranks_in_chunk = (positions - layout.first_positions[streams]) // order.num_streams
    blocks, ranks_in_block = np.divmod(ranks_in_chunk, order.block_rows)
    # Streams are interleaved, so a block has one number within the epoch: 0 is the shards' own permutation.
    numbers = 1 + blocks * order.num_streams + streams
    shuffled = np.empty_like(positions)
    touched, group_of_row = np.unique(numbers, return_inverse=True)
    for group, number in enumerate(touched):
        here = np.flatnonzero(group_of_row == group)
        block, stream = divmod(int(number) - 1, order.num_streams)
        length = min(order.block_rows, int(layout.chunk_sizes[stream]) - block * order.block_rows)
        permutation = _permutation(order.seed, epoch, int(number), length)
        shuffled[here] = permutation[ranks_in_block[here]] + block * order.block_rows
    return _rows_of_concatenation(layout.chunk_starts[streams] + shuffled, layout.shards, layout.ends)


def _rows_of_concatenation(indices: Positions, shards: Int64[np.ndarray, " k"], ends: Int64[np.ndarray, " k"]) -> Rows:
    """Return shard and row of `indices` into the concatenation of `shards`, the i-th of which stops at `ends[i]`."""
    place = np.searchsorted(ends, indices, side="right")
    starts = np.concatenate([[0], ends[:-1]])
    return Rows(shards[place], indices - starts[place])


@lru_cache(maxsize=CACHED_BLOCKS)
def _permutation(seed: int, epoch: int, number: int, length: int) -> Int64[np.ndarray, " length"]:
    """Return the shuffle of one block (or, number 0, of the shards) of an epoch.

    Raw Philox words are fixed for ever; numpy's own `permutation` may change with a release.
    """
    words = generator(seed, Draw.SHUFFLE, epoch, number).bit_generator.random_raw(length)
    permutation = np.argsort(words, kind="stable")
    permutation.setflags(write=False)
    return permutation
