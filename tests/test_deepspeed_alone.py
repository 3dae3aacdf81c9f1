"""DeepSpeed in one process: what it does without there, the precision it computes in, and losses that raise."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.wiring.train_ldm import train_ldm_worker
from ldm.interop.weights import load_weights
from ldm.precision import Precision
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.local_launch import ignore, run_here
from ldm.training.memory import read_sharding
from ldm.training.world import World
from ldm.training.zero_config import SINGLE_RANK_OVERRIDES, zero_settings
from tests.ranks import run_ranks
from tests.test_engines import BATCH, OPTIM, STEPS, all_weights, engine_of, rows_of_step, train_steps
from tests.tiny_latents import write_latents
from tests.tiny_training import WEIGHTS, tiny_config


def train_with_and_without_overrides(world: World, folder: Path) -> None:
    overrides = dict(SINGLE_RANK_OVERRIDES)
    for kind in ("zero1", "zero2"):
        found = []
        for chosen in (overrides, {}):
            SINGLE_RANK_OVERRIDES.clear()
            SINGLE_RANK_OVERRIDES.update(chosen)
            engine = engine_of(kind, world, folder)
            zero = engine._engine.optimizer  # type: ignore[attr-defined]
            assert zero.contiguous_gradients is (not chosen)
            found.append((train_steps(engine, world, range(STEPS)), all_weights(engine)))
        (norms, weights), (other_norms, other_weights) = found
        assert norms == other_norms, kind
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights), kind


def test_what_a_single_rank_does_without_changes_no_bit(tmp_path: Path) -> None:
    run_ranks(1, train_with_and_without_overrides, tmp_path)


def test_an_optimizer_that_a_file_leaves_on_the_device_is_no_offload(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    config = EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path))
    for offload, overlaps in (({"device": "none"}, False), ({"device": "cpu"}, True)):
        content = {"stage": 2, "overlap_comm": True, "offload_optimizer": offload}
        path.write_text(json.dumps({"zero_optimization": content}))
        found = zero_settings(config, OPTIM, rows=8, world_size=1)["zero_optimization"]
        assert found["overlap_comm"] is overlaps
        assert read_sharding(str(path)).has_optimizer_on_host is overlaps


def train_under_stage_0_as_if_a_gpu_were_in_autocast(world: World, folder: Path) -> None:
    # DeepSpeed asks so; it then computes in float32, unless its own configuration says otherwise.
    torch.is_autocast_enabled = lambda *_: True
    engine = engine_of("zero0", world, folder, Precision.BF16)
    dtypes = []

    def loss() -> Tensor:
        output = engine.wrapped(rows_of_step(0)[0][:BATCH])
        dtypes.append(output.dtype)
        value: Tensor = output.float().square().mean()
        return value

    engine.update([loss], OPTIM.lr, (BATCH, BATCH))
    assert dtypes == [torch.bfloat16]


def test_stage_0_computes_in_the_precision_asked_for(tmp_path: Path) -> None:
    run_ranks(1, train_under_stage_0_as_if_a_gpu_were_in_autocast, tmp_path)


def fail_in_a_loss_and_go_on(world: World, folder: Path) -> None:
    for kind in ("zero0", "zero2"):
        engine = engine_of(kind, world, folder)

        def no_loss() -> Tensor:
            raise ArithmeticError("of the task's")

        with pytest.raises(ArithmeticError):
            engine.update([no_loss], OPTIM.lr, (BATCH, BATCH))
        (engine.wrapped(rows_of_step(0)[0]) ** 2).mean()
        other = engine_of(kind, world, folder)
        norms = [train_steps(each, world, range(2)) for each in (engine, other)]
        assert norms[0] == norms[1], kind


def test_a_loss_that_raises_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    run_ranks(1, fail_in_a_loss_and_go_on, tmp_path)


def train_without_a_launcher(world: World, folder: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    for kind in EngineKind:
        config = replace(tiny_config(folder, kind), engine=EngineConfig(kind=kind))
        outcome = run_here(train_ldm_worker, config, ignore, lambda: False)
        assert outcome["is_finished"]
        assert not torch.distributed.is_initialized()


def test_a_training_in_this_very_process_needs_no_launcher(tmp_path: Path) -> None:
    write_latents(tmp_path)
    run_ranks(1, train_without_a_launcher, tmp_path)
    local, sharded = (load_weights(str(tmp_path / kind / WEIGHTS)) for kind in EngineKind)
    for name, weight in local.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-4, atol=1e-6)
