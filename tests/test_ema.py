"""Laws of the moving averages: each half-life's closed form, whatever the others are, and the ramp that all share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.training.ema import Ema, EmaConfig, averages_of
from ldm.training.engine import EngineConfig, LocalEngine
from ldm.training.optim import OptimConfig
from tests.ranks import alone

BATCH = 8
LATE = 10**6
"""Samples after which no half-life of these tests is on its ramp any more."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_of_weights_that_grow_by_one_a_step_are_the_geometric_sums(dtype: torch.dtype) -> None:
    weights = {"first": torch.zeros(3, dtype=dtype), "second": torch.zeros(2, 2, dtype=dtype)}
    ema = Ema(weights, EmaConfig(half_life_samples=1_000, further_half_lives=(10, 40)))
    num_steps = 60
    for step in range(1, num_steps + 1):
        for weight in weights.values():
            weight.fill_(step)
        ema.update(weights, LATE + step * BATCH, BATCH)
    for half_life in (1_000, 10, 40):
        beta = 0.5 ** (BATCH / half_life)
        expected = num_steps - beta * (1 - beta**num_steps) / (1 - beta)
        for name, average in averages_of(ema, half_life).items():
            assert average.dtype is torch.float32
            torch.testing.assert_close(average, torch.full(weights[name].shape, expected), rtol=1e-5, atol=0)


def test_half_lives_ramp_up_alike_until_each_reaches_its_length() -> None:
    """On a ramp with share 1 step k halves what is left 1 / k times: 0.5 to the harmonic number, until h is reached."""
    weights = {"weight": torch.ones(1)}
    ema = Ema(weights, EmaConfig(half_life_samples=10**9, further_half_lives=(10**8, 4 * BATCH), rampup_share=1.0))
    weights["weight"].zero_()
    for step in range(1, 11):
        ema.update(weights, step * BATCH, BATCH)
    harmonic = [sum(1 / k for k in range(1, n + 1)) for n in (4, 10)]
    left = {half_life: float(averages_of(ema, half_life)["weight"]) for half_life in (0, 10**8, 4 * BATCH)}
    assert left[0] == left[10**8] == pytest.approx(0.5 ** harmonic[1], rel=1e-6)
    assert left[4 * BATCH] == pytest.approx(0.5 ** (harmonic[0] + 6 / 4), rel=1e-6)


@pytest.mark.parametrize(
    "main, further, message",
    [
        (0, (8,), r"beside a main one: ema.half_life_samples must be positive, got \(8,\) beside 0"),
        (64, (8, 0), r"ema.further_half_lives must be positive, .* got \(8, 0\) beside 64"),
        (64, (8, 8), r"differ from each other and from ema.half_life_samples, got \(8, 8\) beside 64"),
        (64, (8, 64), r"differ from each other and from ema.half_life_samples, got \(8, 64\) beside 64"),
    ],
)
def test_half_lives_that_are_none_or_are_there_twice_are_refused_with_all_of_them(
    main: int, further: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EmaConfig(half_life_samples=main, further_half_lives=further)


def test_no_further_half_life_leaves_what_was_kept_before_as_it_was() -> None:
    config = EmaConfig(half_life_samples=64)
    assert config.to_dict() == {"type": "EmaConfig", "half_life_samples": 64, "rampup_share": 0.05}
    assert list(Ema({"weight": torch.ones(1)}, config).parts()) == ["average"]


def engine_of(config: EmaConfig) -> LocalEngine:
    torch.manual_seed(0)
    return LocalEngine(torch.nn.Linear(2, 2), OptimConfig(), config, EngineConfig(), alone())


def test_an_average_that_is_not_kept_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"half-life 9 is kept; half-lives of those that are: \[64, 8\]"):
        engine_of(EmaConfig(half_life_samples=64, further_half_lives=(8,))).weights(9)
    with pytest.raises(ValueError, match=r"half-life 64 is kept; half-lives of those that are: \[\]"):
        engine_of(EmaConfig(half_life_samples=0)).averaged(64)


def test_a_checkpoint_without_a_further_average_is_refused_naming_it(tmp_path: Path) -> None:
    engine_of(EmaConfig(half_life_samples=64)).save(tmp_path)
    with pytest.raises(ValueError, match="does not hold all of the average_8 of 'weight'"):
        engine_of(EmaConfig(half_life_samples=64, further_half_lives=(8,))).load(tmp_path)
