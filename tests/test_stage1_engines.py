"""The law of stage 1's engines: two networks under DeepSpeed on two ranks train as local ones do in one process.

Perceptual term, discriminator, adaptive weight, batch norm, R1, LeCAM, guard and codebook are all at work.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.wiring.autoencoder_memory import LEAST_FILE, advice, needed
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig, check_sharding
from ldm.autoencoder.codebook import CodebookConfig
from ldm.precision import Precision
from ldm.training.autoencoder_task import AutoencoderTask
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.memory import Sharding, read_sharding
from ldm.training.world import World
from tests.ranks import alone, run_ranks
from tests.test_autoencoder_memory import reconstructing
from tests.tiny_stage1 import EVERYTHING, KL, LOSS, VQ, stage1_config, stage1_task, state_of, train_steps

CASES = {"kl": (KL, LOSS), "vq": (VQ, replace(LOSS, perceptual_weight=0.0)), "everything": (VQ, EVERYTHING)}
STAGES: dict[str, dict[str, object]] = {"zero0": {"stage": 0}, "zero1": {"stage": 1}, "zero2": {"stage": 2}}
STAGES["offload"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
STEPS, HALFWAY = 4, 2


def config_of(case: str, stage: str, folder: Path) -> TrainAutoencoderConfig:
    """Return a training under one of DeepSpeed's stages, or under the local engine where that is empty."""
    config = stage1_config(folder, *CASES[case])
    # A large eps, for without it the first steps' size is one for the smallest gradient, whose sign rounding decides.
    config = replace(config, optim=replace(config.optim, lr=2e-2, eps=1e-2))
    if not stage:
        return config
    return replace(config, engine=EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(folder / f"{stage}.json")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("engines")
    own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    for name, zero in STAGES.items():
        (place / f"{name}.json").write_text(json.dumps({**own, "zero_optimization": zero}))
    return place


def save(task: AutoencoderTask, place: Path) -> None:
    for name, part in task.engines.items():
        (place / name).mkdir(parents=True, exist_ok=True)
        part.snapshot().write(place / name)


def load(task: AutoencoderTask, place: Path) -> None:
    for name, part in task.engines.items():
        part.load(place / name)


def train_as_rank(world: World, folder: Path) -> None:
    for case in CASES:
        for stage in STAGES:
            task = stage1_task(config_of(case, stage, folder), world)
            metrics = train_steps(task, world, range(HALFWAY))
            save(task, folder / f"{case}-{stage}-half")
            metrics += train_steps(task, world, range(HALFWAY, STEPS))
            found = metrics, task.validate(), state_of(task)
            torch.save(found, folder / f"{case}-{stage}-{world.rank}.pt")
            resumed = stage1_task(config_of(case, stage, folder), world)
            world.barrier()
            load(resumed, folder / f"{case}-{stage}-half")
            train_steps(resumed, world, range(HALFWAY, STEPS))
            assert same(state_of(resumed), found[2]) == [], f"{case} under {stage} goes on otherwise"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of what differs."""
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    run_ranks(2, train_as_rank, folder)
    return folder


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_ranks_train_as_one_process_with_the_joined_batch(ranks: Path, case: str) -> None:
    task = stage1_task(config_of(case, "", ranks), alone())
    expected = train_steps(task, alone(), range(STEPS)), task.validate(), state_of(task)
    for stage in STAGES:
        left, right = (torch.load(ranks / f"{case}-{stage}-{rank}.pt") for rank in range(2))
        for found, metrics in zip(left[0], expected[0], strict=True):
            assert found == pytest.approx(metrics, rel=1e-4, abs=1e-6), stage
        assert left[1] == pytest.approx(expected[1], rel=1e-4), stage
        close(left[2], expected[2])
        assert left[:2] == right[:2]
        assert same(left[2], right[2]) == []


@pytest.mark.parametrize("case", CASES)
def test_one_local_process_goes_on_from_what_sharded_ranks_saved(ranks: Path, case: str) -> None:
    unbroken: AutoencoderTask = stage1_task(config_of(case, "", ranks), alone())
    train_steps(unbroken, alone(), range(STEPS))
    for stage in STAGES:
        task = stage1_task(config_of(case, "", ranks), alone())
        load(task, ranks / f"{case}-{stage}-half")
        train_steps(task, alone(), range(HALFWAY, STEPS))
        close(state_of(task), state_of(unbroken))


def test_what_does_not_go_with_slices_is_refused_by_its_name(folder: Path) -> None:
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    sharded = config_of("vq", "zero2", folder)
    check_sharding(sharded)
    with pytest.raises(ValueError, match="zero3.json is stage 3"):
        check_sharding(replace(sharded, engine=replace(sharded.engine, zero_config=str(folder / "zero3.json"))))
    with pytest.raises(ValueError, match="stage 1 computes in fp32: for bf16 take stage 0"):
        check_sharding(replace(sharded, engine=replace(sharded.engine, precision=Precision.BF16)))
    reviving = replace(sharded.loss, codebook=CodebookConfig(revive_after_samples=8))
    with pytest.raises(ValueError, match="codebook.revive_after_samples"):
        check_sharding(replace(sharded, loss=reviving))
    check_sharding(replace(sharded, loss=reviving, engine=EngineConfig()))


def test_forecast_counts_both_networks_and_their_shares(folder: Path) -> None:
    one = replace(reconstructing(KL, LOSS), num_ranks=2)
    local = needed(one)
    second = needed(replace(one, sharding=read_sharding(str(folder / "zero2.json"))))
    first = needed(replace(one, sharding=read_sharding(str(folder / "zero1.json"))))
    # Moments and averages are shared by two, and a copy of the weights comes to the moments: (8 + 4) / 2 for 8.
    assert second.optimizer == pytest.approx(local.optimizer * 6 / 8, rel=1e-3)
    assert second.averages == pytest.approx(local.averages / 2, rel=1e-3)
    assert second.weights == local.weights
    assert second.total <= first.total
    whole = needed(replace(one, sharding=Sharding(name="zero0", stage=0)))
    assert (whole.weights, whole.optimizer, whole.averages) == (local.weights, local.optimizer, local.averages)


def test_the_stage_that_needs_less_is_advised_where_the_training_goes_with_it() -> None:
    one = replace(reconstructing(KL, LOSS), num_ranks=2, num_rows=1)
    less = needed(replace(one, sharding=read_sharding(LEAST_FILE))).device
    assert less < needed(one).device
    assert f"--engine.kind deepspeed --engine.zero-config {LEAST_FILE}: {less / 1e9:.1f} GB" in advice(one)
    reviving = replace(LOSS, codebook=CodebookConfig(revive_after_samples=8))
    for other in (
        replace(one, num_ranks=1),
        replace(one, is_bf16=True),
        replace(one, loss=reviving),
        replace(one, sharding=read_sharding(LEAST_FILE)),
    ):
        assert not [way for way in advice(other) if LEAST_FILE in way]
