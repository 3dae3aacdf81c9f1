"""The law of the weights' checksums: equal after synchronised steps under every engine, else refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.training.self_tests import check_weights, weight_sums
from ldm.training.world import World
from tests.ranks import run_ranks
from tests.test_engines import engine_of, train_steps


def sums_of_engines(world: World, folder: Path) -> None:
    for kind in ("local", "zero0", "zero1", "zero2", "zero3"):
        engine = engine_of(kind, world, folder)
        train_steps(engine, world, range(1))  # ZeRO-3 has no whole weight before
        before = weight_sums({"net": engine.raw})
        train_steps(engine, world, range(1, 2))
        after = weight_sums({"net": engine.raw})
        check_weights(world, after, "after a step")
        assert set(before) == {f"net.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
        assert all(before[name] != after[name] for name in before), kind
        with torch.no_grad():
            next(iter(engine.raw.parameters())).add_(1e-6 * world.rank)
        said = r"(?s)^later the ranks have other weights.*net\.0\.weight: -?\d+ on rank 0; -?\d+ on rank 1"
        with pytest.raises(ValueError, match=said):
            check_weights(world, weight_sums({"net": engine.raw}), "later")


def test_weights_that_all_ranks_hold_are_compared_under_every_engine(tmp_path: Path) -> None:
    run_ranks(2, sums_of_engines, tmp_path)
