"""Laws of the noise schedule."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion.schedule import CLEAN_TIMESTEP, Schedule, ScheduleConfig, ScheduleKind, betas

PEERS = {
    ScheduleKind.SCALED_LINEAR: "scaled_linear",
    ScheduleKind.LINEAR: "linear",
    ScheduleKind.COSINE: "squaredcos_cap_v2",
}


def schedule_of(kind: ScheduleKind = ScheduleKind.SCALED_LINEAR) -> Schedule:
    return Schedule(ScheduleConfig(kind=kind))


@pytest.mark.parametrize("kind", PEERS)
def test_betas_equal_diffusers(kind):
    peer = DDPMScheduler(1000, beta_start=0.0015, beta_end=0.0195, beta_schedule=PEERS[kind])
    np.testing.assert_allclose(betas(ScheduleConfig(kind=kind)), peer.betas.double(), rtol=0, atol=1e-7)


def test_betas_of_stable_diffusion_equal_diffusers():
    ours = Schedule(ScheduleConfig(start=0.00085, end=0.012))
    peer = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    np.testing.assert_allclose(betas(ours.config), peer.betas.double(), rtol=0, atol=1e-7)
    np.testing.assert_allclose(ours.log_snr.sigmoid(), peer.alphas_cumprod.double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", PEERS)
def test_scales_at_any_time_preserve_variance(kind):
    scales = schedule_of(kind).scales(torch.linspace(-1, 999.999, 5003, dtype=torch.float64))
    total = scales.alpha.square() + scales.sigma.square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", PEERS)
def test_scales_at_whole_timesteps_equal_the_product_of_betas(kind):
    schedule = schedule_of(kind)
    expected = np.cumprod(1 - betas(schedule.config).numpy())
    alpha = schedule.scales(torch.arange(1000, dtype=torch.float64)).alpha.flatten()
    np.testing.assert_allclose(alpha.square(), expected, rtol=1e-11)


@pytest.mark.parametrize("kind", PEERS)
def test_log_snr_falls_strictly(kind):
    times = torch.linspace(0, 999.9, 3001, dtype=torch.float64)
    assert bool((schedule_of(kind).log_snr_at(times).diff() < 0).all())


def test_scales_between_timesteps_have_the_mean_log_snr():
    schedule = schedule_of()
    between = schedule.scales(torch.tensor([417.5], dtype=torch.float64)).snr.log().item()
    assert between == pytest.approx(float(schedule.log_snr[417] + schedule.log_snr[418]) / 2, abs=1e-12)


def test_scales_at_the_clean_end_are_one_and_zero():
    scales = schedule_of().scales(torch.tensor([-1.0, 0.0]))
    assert (scales.alpha[0].item(), scales.sigma[0].item()) == (1.0, 0.0)
    assert scales.sigma[1].item() == pytest.approx(math.sqrt(0.0015), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_keep_shape_and_dtype_of_the_timesteps(dtype):
    scales = schedule_of().scales(torch.tensor([3.0, 700.25], dtype=dtype))
    assert scales.alpha.shape == scales.sigma.shape == (2, 1, 1, 1)
    assert scales.alpha.dtype is scales.sigma.dtype is dtype


@pytest.mark.parametrize("time", [-1.0, 0.0, 0.3, 500.0, 999.0, 999.5])
def test_scales_at_one_time_equal_scales_of_a_row(time):
    schedule = schedule_of()
    row, one = schedule.scales(torch.tensor([time], dtype=torch.float64)), schedule.scales_at(time)
    assert one.alpha.shape == ()
    assert (one.alpha.item(), one.sigma.item()) == (row.alpha.item(), row.sigma.item())


@pytest.mark.parametrize("kind", PEERS)
def test_timestep_at_inverts_log_snr(kind):
    schedule = schedule_of(kind)
    times = torch.linspace(0, 999, 1777, dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep_at(schedule.log_snr_at(times)), times, rtol=0, atol=1e-8)


@pytest.mark.parametrize("fields", [{"start": 0.0}, {"start": 0.02}, {"end": 1.0}, {"num_timesteps": 1}])
def test_schedule_config_with_senseless_values_is_refused(fields):
    with pytest.raises(ValueError, match="must"):
        ScheduleConfig(**fields)


def test_scales_of_half_precision_timesteps_are_refused():
    with pytest.raises(ValueError, match="float32 or float64, got torch.bfloat16"):
        schedule_of().scales(torch.tensor([999.0], dtype=torch.bfloat16))


def test_scales_at_beyond_the_schedule_is_refused():
    with pytest.raises(ValueError, match="1000"):
        schedule_of().scales_at(1000.0)


@pytest.mark.parametrize("kind", [ScheduleKind.SCALED_LINEAR, ScheduleKind.FLOW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_of_a_whole_path_have_the_scales_that_each_has_alone(kind: ScheduleKind, dtype: torch.dtype) -> None:
    schedule = Schedule(ScheduleConfig(kind=kind))
    times = [999.0, 500.25, 3.0, CLEAN_TIMESTEP]
    rows = schedule.rows_along(times, torch.zeros(3, 4, 2, 2, dtype=dtype))
    for time, row in zip(times, rows, strict=True):
        assert row.tolist() == [time] * 3
        assert row.dtype is dtype
        found, alone = schedule.scales(row), schedule.scales(row.clone())
        assert found is schedule.scales(row)
        assert torch.equal(found.alpha, alone.alpha)
        assert torch.equal(found.sigma, alone.sigma)
    del row, rows
    assert len(schedule._known) == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda schedule: pickle.loads(pickle.dumps(schedule))])
def test_a_copy_and_a_pickle_that_knew_a_path_are_the_same_schedule(again: Callable[[Schedule], Schedule]) -> None:
    schedule = schedule_of()
    rows = schedule.rows_along([900.0, 400.0], torch.empty(2, 1, 1, 1))
    found = again(schedule)
    assert found.config == schedule.config
    assert torch.equal(found.log_snr, schedule.log_snr)
    assert torch.equal(found.scales(rows[1]).alpha, schedule.scales(rows[1]).alpha)
