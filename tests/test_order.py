"""Laws of the order of rows: exactly once an epoch, equal batches, the same batches on every number of ranks."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from pipeline.order import Order, Rows, check_world, rank_positions, rows_at, sequential_rows_at

GOLDEN = [(0, 1), (2, 2), (0, 0), (2, 1), (0, 2), (2, 0), (1, 1), (2, 3), (1, 0)]
RAGGED = Order(shard_sizes=(7, 1, 12, 0, 5, 9, 3), seed=3, num_streams=4, block_rows=3)


def pairs(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.shards.tolist(), rows.rows.tolist(), strict=True))


def every_row(order: Order) -> list[tuple[int, int]]:
    return [(shard, row) for shard, size in enumerate(order.shard_sizes) for row in range(size)]


def epoch_rows(order: Order, epoch: int) -> list[tuple[int, int]]:
    return pairs(rows_at(order, np.arange(epoch * order.num_rows, (epoch + 1) * order.num_rows)))


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("sizes", [(37,), (7, 1, 12, 0, 5, 9, 3), (1, 1, 1), (16,) * 8])
@pytest.mark.parametrize("block_rows", [1, 3, 1000])
def test_order_every_epoch_holds_every_row_once(num_streams: int, sizes: tuple[int, ...], block_rows: int) -> None:
    order = Order(shard_sizes=sizes, seed=1, num_streams=num_streams, block_rows=block_rows)
    for epoch in (0, 1, 2, 1000):
        assert sorted(epoch_rows(order, epoch)) == every_row(order)


def test_order_epochs_and_seeds_differ() -> None:
    other_seed = Order(shard_sizes=RAGGED.shard_sizes, seed=4, num_streams=4, block_rows=3)
    orders = [epoch_rows(RAGGED, 0), epoch_rows(RAGGED, 1), epoch_rows(RAGGED, 2), epoch_rows(other_seed, 0)]
    assert len({tuple(rows) for rows in orders}) == 4


def test_order_look_up_does_not_depend_on_what_was_asked_before_or_beside() -> None:
    positions = np.arange(3 * RAGGED.num_rows)
    together = pairs(rows_at(RAGGED, positions))
    fresh = Order(shard_sizes=RAGGED.shard_sizes, seed=3, num_streams=4, block_rows=3)
    backwards = [pairs(rows_at(fresh, np.array([position])))[0] for position in positions[::-1]]
    assert backwards[::-1] == together


def test_order_is_the_recorded_one() -> None:
    order = Order(shard_sizes=(3, 2, 4), seed=7, num_streams=2, block_rows=3)
    assert pairs(rows_at(order, np.arange(9))) == GOLDEN


def test_order_global_batch_is_the_same_set_on_every_world_size() -> None:
    batch_size = 16
    sizes = tuple(np.random.default_rng(0).integers(0, 9, 40).tolist())
    order = Order(shard_sizes=sizes, seed=1, num_streams=16, block_rows=8)
    for start in (0, batch_size, 7 * batch_size, 100 * batch_size):
        whole = Counter(pairs(rows_at(order, rank_positions(start, start + batch_size, 0, 1))))
        for world in (2, 4, 8, 16):
            parts = [rank_positions(start, start + batch_size, rank, world) for rank in range(world)]
            assert {len(part) for part in parts} == {batch_size // world}
            assert sum((Counter(pairs(rows_at(order, part))) for part in parts), Counter()) == whole


def test_order_on_one_hundred_cluster_shapes_serves_every_row_once() -> None:
    # How long that takes is measured by tests.benchmarks.loader: milliseconds.
    shapes = 0
    for world in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
        for num_rows in (97, 480, 1000, 1001, 48, 49, 3, 211, 960, 777):
            order = Order(shard_sizes=(num_rows // 3, num_rows - num_rows // 3), seed=0, num_streams=48, block_rows=16)
            served = [rank_positions(0, num_rows, rank, world) for rank in range(world)]
            assert max(map(len, served)) - min(map(len, served)) <= 1
            assert Counter(pairs(rows_at(order, np.concatenate(served)))) == Counter(every_row(order))
            shapes += 1
    assert shapes == 100


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_order_stream_owns_whole_shards_but_for_its_ends(epoch: int) -> None:
    order = Order(shard_sizes=(11, 8, 9, 10, 7, 12, 9, 8), seed=2, num_streams=4, block_rows=5)
    positions = np.arange(epoch * order.num_rows, (epoch + 1) * order.num_rows)
    counts = []
    for stream in range(4):
        rows = rows_at(order, positions[positions % 4 == stream])
        taken = Counter(rows.shards.tolist())
        partial = [shard for shard, count in taken.items() if count < order.shard_sizes[shard]]
        assert len(partial) <= 2
        counts.append(len(rows.shards))
    assert max(counts) - min(counts) <= 1


def test_order_shuffle_stays_within_its_block() -> None:
    order = Order(shard_sizes=(4,) * 32, seed=0, num_streams=2, block_rows=16)
    for stream in range(2):
        shards = rows_at(order, np.arange(stream, 128, 2)).shards.reshape(4, 16)  # block, rank in block
        assert [len(set(block.tolist())) for block in shards] == [4, 4, 4, 4]
        assert any((np.diff(block) != 0).sum() > 4 for block in shards)


def test_order_starts_anywhere_in_ten_million_rows_in_under_a_second() -> None:
    order = Order(shard_sizes=(100,) * 100_000, seed=0, num_streams=64)
    start_seconds = time.perf_counter()
    rows = rows_at(order, np.arange(123_456_789_012, 123_456_789_012 + 256))
    assert time.perf_counter() - start_seconds < 1.0
    assert len(set(pairs(rows))) == 256


def test_order_sequential_form_is_the_manifest_order_repeated() -> None:
    positions = np.arange(2 * RAGGED.num_rows)
    assert pairs(sequential_rows_at(RAGGED, positions)) == every_row(RAGGED) * 2


@pytest.mark.parametrize("world, batch_size, named", [(3, 12, "num_streams=8"), (4, 6, "batch_size=6")])
def test_order_world_that_does_not_divide_is_refused(world: int, batch_size: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}, got {world} ranks"):
        check_world(world=world, num_streams=8, batch_size=batch_size)


def test_order_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Order(shard_sizes=(0, 0), seed=0)
