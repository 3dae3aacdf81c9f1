"""A training goes on under another engine on another number of ranks: same rows, same noise, losses to a tolerance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from ldm.interop.weights import load_weights
from ldm.precision import Precision
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.local_launch import ignore
from ldm.training.world import World
from tests.ranks import alone, run_ranks
from tests.tiny_latents import write_latents
from tests.tiny_training import WEIGHTS, run, series, tiny_config

Leg = tuple[int, int | None, int]
"""Ranks, ZeRO stage (None for the local engine), and the steps to stop after (0: to the end)."""
STEPS_IN_ALL = 8
FURTHER = 8
"""Half-life of a second average, in samples."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic")
    write_latents(path)
    run(with_engine(tiny_config(path, "unbroken"), None, path))
    return path


def with_engine(config: TrainLdmConfig, stage: int | None, folder: Path) -> TrainLdmConfig:
    """Return the training with two averages, in two micro-batches a rank at most, under a ZeRO stage or locally."""
    averages = replace(config.ema, further_half_lives=(FURTHER,))
    config = replace(config, num_streams=4, ema=averages, loop=replace(config.loop, checkpoint_every=8, log_every=8))
    if stage is None:
        return replace(config, engine=EngineConfig(micro_batch_size=2))
    path = folder / f"stage{stage}.json"
    own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    path.write_text(json.dumps({**own, "zero_optimization": {"stage": stage}}))
    return replace(config, engine=EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path), micro_batch_size=2))


def train_in(world: World, config: TrainLdmConfig, num_steps: int) -> None:
    outcome = train_ldm_worker(config, world, ignore, stop_after(num_steps))
    assert outcome["is_finished"] == (num_steps == 0)


def stop_after(num_steps: int) -> Callable[[], bool]:
    calls = iter(range(1_000_000))
    return lambda: bool(num_steps) and next(calls) + 1 >= num_steps


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param([(2, 2, 3), (1, None, 0)], id="two_ranks_of_zero_2_then_one_alone"),
        pytest.param(
            [(1, None, 3), (2, 3, 2), (4, 1, 0)],
            id="one_alone_then_two_of_zero_3_then_four_of_zero_1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_training_goes_on_under_another_engine_on_other_ranks(
    folder: Path, legs: list[Leg], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    for size, stage, num_steps in legs:
        config = with_engine(tiny_config(folder, name), stage, folder)
        if size == 1 and stage is None:
            train_in(alone(), config, num_steps)
        else:
            run_ranks(size, train_in, config, num_steps)
    found, expected = (series(folder, run_name, "loss") for run_name in (name, "unbroken"))
    assert list(found) == list(expected) == [8 * step for step in range(1, STEPS_IN_ALL + 1)]
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    for weights in (WEIGHTS, WEIGHTS.replace("model/", f"model_half_life_{FURTHER}/", 1)):
        one, other = (load_weights(str(folder / run_name / weights)) for run_name in (name, "unbroken"))
        assert max(float((one[key] - other[key]).abs().max()) for key in other) < 1e-4
    metric = f"validation_loss_half_life_{FURTHER}"
    measured, expected = (series(folder, run_name, metric) for run_name in (name, "unbroken"))
    assert list(measured) == list(expected) == [0, 32, 64]
    assert list(measured.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_another_precision_is_another_run(folder: Path) -> None:
    config = with_engine(tiny_config(folder, "unbroken"), None, folder)
    config = replace(config, engine=replace(config.engine, precision=Precision.BF16))
    with pytest.raises(ValueError, match=r"engine.precision: the checkpoint has 'fp32', this run 'bf16'"):
        run(config)
