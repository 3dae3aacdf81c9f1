"""Laws of training timesteps, loss weights and norms, what is refused, and what a validation tells."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.wiring.train_ldm import TrainLdmConfig
from ldm.diffusion.process import Prediction, corrupt, target
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.timesteps import TimestepConfig, TimestepLaw, timesteps
from ldm.losses.diffusion import ErrorNorm, Weighting, loss_weight, per_sample_loss
from ldm.randomness import Draw, normal, uniform
from ldm.training.diffusion_task import ObjectiveConfig, training_noise
from tests.noise_schedules import EDM, FLOW, WITHOUT_SIGNAL, ZERO_SNR, scales
from tests.tiny_latents import write_latents
from tests.tiny_training import run, same_weights, series, stopping_after, tiny_config

# --- configs


@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL)
def test_noise_is_not_predicted_where_it_tells_nothing(schedule: ScheduleConfig) -> None:
    with pytest.raises(ValueError, match="goes with prediction velocity, flow or clean"):
        ObjectiveConfig(schedule=schedule)
    ObjectiveConfig(schedule=schedule, prediction=Prediction.FLOW)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weighting": Weighting.MIN_SNR}, "weighting min_snr would leave a last timestep"),
        ({"weighting": Weighting.P2}, "weighting p2 would leave a last timestep"),
        ({"timesteps": TimestepConfig(law=TimestepLaw.LOG_NORMAL)}, "timesteps.law log_normal would leave"),
        ({"offset_noise": 0.1}, "offset_noise 0.1 would leave"),
    ],
)
@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL)
def test_what_would_not_train_pure_noise_is_refused(
    schedule: ScheduleConfig, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(schedule=schedule, prediction=Prediction.VELOCITY, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weighting": Weighting.MIN_SNR, "min_snr_gamma": 0.0}, "min_snr_gamma must be positive"),
        ({"min_snr_gamma": 3.0}, "belongs to min_snr, got 3.0"),
        ({"weighting": Weighting.MIN_SNR, "p2_gamma": 0.5}, "belongs to p2, got 0.5"),
        ({"offset_noise": -0.1}, "offset_noise can't be negative"),
    ],
)
def test_numbers_of_other_weightings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**fields)  # type: ignore[arg-type]


def test_configs_and_their_digests_from_before_stay_what_they_were() -> None:
    assert set(ScheduleConfig().to_dict()) == {"type", "kind", "start", "end", "num_timesteps"}
    assert ObjectiveConfig().digest() == "a2d506966de912a32a2f7f1cb5fc13ae51838a4b56bc900e76179c2044a1a723"


def test_measuring_more_does_not_make_another_run() -> None:
    more = ObjectiveConfig(validation_bands=8, has_raw_validation=True)
    assert more.of_training() == ObjectiveConfig().of_training()
    assert more.to_dict() != ObjectiveConfig().to_dict()


# --- timesteps


def drawn(config: TimestepConfig, positions: range, schedule: ScheduleConfig = FLOW) -> np.ndarray:
    return timesteps(config, Schedule(schedule), 7, positions).numpy()


def test_uniform_timesteps_are_what_they_always_were() -> None:
    expected = (uniform(7, Draw.TIMESTEP, range(500)) * 1000).floor().float().numpy()
    np.testing.assert_array_equal(drawn(TimestepConfig(), range(500)), expected)


@pytest.mark.parametrize("is_stratified", [False, True])
def test_timestep_laws_have_the_quantiles_of_their_papers(is_stratified: bool) -> None:
    standard = {0.05: -1.6449, 0.25: -0.6745, 0.5: 0.0, 0.75: 0.6745, 0.95: 1.6449}
    logit = TimestepConfig(law=TimestepLaw.LOGIT_NORMAL, mean=0.5, std=0.8, is_stratified=is_stratified)
    found = drawn(logit, range(20_000))
    assert found.min() >= 0
    assert found.max() <= 999
    for share, quantile in standard.items():
        expected = 1000 / (1 + math.exp(-(0.5 + 0.8 * quantile)))
        assert np.quantile(found, share) == pytest.approx(expected, abs=15)
    log = TimestepConfig(law=TimestepLaw.LOG_NORMAL, mean=-0.507, std=1.2, is_stratified=is_stratified)
    at = scales(EDM, *drawn(log, range(20_000), EDM))
    found = (at.sigma / at.alpha).log().flatten().numpy()
    for share, quantile in standard.items():
        assert np.quantile(found, share) == pytest.approx(-0.507 + 1.2 * quantile, abs=0.06)


@pytest.mark.parametrize("size", [16, 64, 333])
@pytest.mark.parametrize("start", [0, 12_345, 10**12 + 7])
def test_stratified_timesteps_fill_every_batch_evenly_wherever_it_starts(size: int, start: int) -> None:
    config = TimestepConfig(is_stratified=True)
    found = np.sort(drawn(config, range(start, start + size))) / 1000
    even = (np.arange(size) + 0.5) / size
    assert np.abs(found - even).max() < 2.5 / size + 0.001  # drawn apart it would be about 1 / sqrt(size)
    assert (drawn(config, range(start + 3, start + 9)) == drawn(config, range(start, start + 9))[3:]).all()
    assert (drawn(config, range(size)) != timesteps(config, Schedule(FLOW), 8, range(size)).numpy()).any()


def test_impossible_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        TimestepConfig(law=TimestepLaw.LOG_NORMAL, std=0.0)
    with pytest.raises(ValueError, match="uniform has none"):
        TimestepConfig(mean=1.0)


# --- loss


@pytest.mark.parametrize("weighting, gamma", [(Weighting.MIN_SNR, 5.0), (Weighting.P2, 1.0), (Weighting.EDM, None)])
@pytest.mark.parametrize("config", [ScheduleConfig(), FLOW])
def test_weighted_loss_of_one_estimate_is_the_same_for_every_prediction(
    weighting: Weighting, gamma: float | None, config: ScheduleConfig
) -> None:
    clean, noise, estimate = torch.randn(3, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = scales(config, 1.0, 120.0, 400.0, 990.0)
    noisy = corrupt(clean, noise, at)
    implied = (noisy - at.alpha * estimate) / at.sigma
    losses = [
        per_sample_loss(kind, target(kind, estimate, implied, at), clean, noise, at, weighting, gamma=gamma)
        for kind in Prediction
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=0)


def test_weights_equal_their_papers() -> None:
    at = scales(ScheduleConfig(), 0.0, 120.0, 400.0, 999.0)
    snr, sigma = at.snr, at.sigma / at.alpha
    torch.testing.assert_close(loss_weight(Weighting.P2, Prediction.NOISE, at, 0.7), (1 + snr) ** -0.7)
    edm = (sigma**2 + 1) / sigma**2  # (sigma^2 + sigma_data^2) / (sigma sigma_data)^2
    torch.testing.assert_close(loss_weight(Weighting.EDM, Prediction.CLEAN, at), edm)
    uniform_velocity = loss_weight(Weighting.EDM, Prediction.VELOCITY, at)
    torch.testing.assert_close(uniform_velocity, torch.ones_like(snr))


def test_a_weighting_without_its_number_is_refused() -> None:
    for weighting in (Weighting.MIN_SNR, Weighting.P2):
        with pytest.raises(ValueError, match=f"weighting {weighting.value} needs a positive gamma, got None"):
            loss_weight(weighting, Prediction.NOISE, scales(ScheduleConfig(), 5.0))


def test_huber_equals_torch_and_goes_with_uniform_weights_only() -> None:
    output, clean, noise = 3 * torch.randn(3, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    loss = per_sample_loss(
        Prediction.NOISE, output, clean, noise, scales(ScheduleConfig(), 1, 2, 3, 4), norm=ErrorNorm.HUBER
    )
    expected = [torch.nn.functional.huber_loss(output[row], noise[row]) for row in range(4)]
    torch.testing.assert_close(loss, torch.stack(expected).double(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="weighting p2 is made for squares: norm huber goes with uniform"):
        ObjectiveConfig(norm=ErrorNorm.HUBER, weighting=Weighting.P2)


# --- in a training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("objectives")
    write_latents(path)
    return path


OBJECTIVES = {
    "flow": ObjectiveConfig(
        schedule=FLOW,
        prediction=Prediction.FLOW,
        timesteps=TimestepConfig(law=TimestepLaw.LOGIT_NORMAL, is_stratified=True),
        has_raw_validation=True,
    ),
    "edm": ObjectiveConfig(
        schedule=EDM,
        prediction=Prediction.VELOCITY,
        timesteps=TimestepConfig(law=TimestepLaw.LOG_NORMAL, mean=-0.507, std=1.2),
    ),
    "zero": ObjectiveConfig(schedule=ZERO_SNR, prediction=Prediction.VELOCITY, weighting=Weighting.EDM),
    "offset": ObjectiveConfig(weighting=Weighting.P2, p2_gamma=0.5, offset_noise=0.1),
    "huber": ObjectiveConfig(norm=ErrorNorm.HUBER, validation_bands=0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_tells_its_bands(folder: Path, name: str) -> None:
    objective = OBJECTIVES[name]
    plain = tiny_config(folder, name, total_samples=192)
    config = replace(plain, objective=objective, optim=replace(plain.optim, lr=2e-3))
    outcome = run(config)
    first, last = outcome["first_validation"], outcome["last_validation"]
    assert last["validation_loss"] < first["validation_loss"]
    bands = [last[f"validation_loss_band_{band}"] for band in range(objective.validation_bands)]
    if bands:
        assert len(set(bands)) == 4
        assert sum(bands) / 4 == pytest.approx(last["validation_loss"], rel=1e-6)  # of four rows, one a band
    else:
        assert set(last) == {"validation_loss"}
    if objective.has_raw_validation:
        assert first["validation_loss_raw"] == first["validation_loss"]  # the average starts as the weights
        assert last["validation_loss_raw"] != last["validation_loss"]
    assert all(math.isfinite(loss) for loss in series(folder, name, "loss").values())


def test_a_resumed_training_of_another_objective_is_the_unbroken_one(folder: Path) -> None:
    def config(name: str) -> TrainLdmConfig:
        return replace(tiny_config(folder, name), objective=OBJECTIVES["flow"])

    run(config("whole"))
    stopping_after(config("resumed"), 3)
    run(config("resumed"))
    assert same_weights(folder, "whole", "resumed")
    assert series(folder, "whole", "loss") == series(folder, "resumed", "loss")


def test_offset_noise_is_alike_over_a_channel_and_hangs_on_the_row_alone() -> None:
    plain = training_noise(0, range(400), (3, 8, 8), 0.0)
    torch.testing.assert_close(plain, normal(0, Draw.NOISE, range(400), (3, 8, 8)), rtol=0, atol=0)
    added = training_noise(0, range(400), (3, 8, 8), 0.5) - plain
    assert float(added.std(dim=(2, 3)).max()) < 1e-6
    assert float(added[:, :, 0, 0].std()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2 * 1200))
    alone = training_noise(0, [17], (3, 8, 8), 0.5)
    torch.testing.assert_close(alone[0], (plain + added)[17], rtol=0, atol=1e-6)
