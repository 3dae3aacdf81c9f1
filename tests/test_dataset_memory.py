"""Law of a worker's memory: it grows with what is in flight, not with the rows of a shard."""

from __future__ import annotations

import pytest

from tests.benchmarks.memory import GOAL_GIB, MemoryBenchmark, measured


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_worker_with_ten_thousand_rows_a_shard_stays_below_its_memory(tmp_path):
    assert measured(MemoryBenchmark(rows=10_000), tmp_path)["peak_gib"] <= GOAL_GIB
