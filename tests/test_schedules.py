"""Laws of schedules beyond the paper's, of conversions and of samplers under every one of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm.diffusion.process import Prediction, clean_from, corrupt, noise_from, target
from ldm.diffusion.schedule import Schedule, ScheduleConfig, ScheduleKind, betas
from ldm.samplers.gaussian import GaussianData
from ldm.samplers.grids import Grid, time_grid
from ldm.samplers.sample import SamplerConfig, follow, sample
from ldm.samplers.steppers import Step, StepperKind, ddim, ddpm
from tests.noise_schedules import EDM, FLOW, WITHOUT_SIGNAL, ZERO_SNR, scales

DATA = GaussianData(mean=0.7, std=0.4)


# --- schedules


def test_flow_is_a_straight_line_from_the_data_to_pure_noise() -> None:
    at = scales(FLOW, -1.0, 0.0, 249.0, 499.0, 999.0)
    expected = torch.tensor([0.0, 0.001, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(at.sigma.flatten(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(at.alpha.flatten(), 1 - expected, rtol=1e-12, atol=0)
    between = scales(FLOW, *np.linspace(0, 999, 3333))
    torch.testing.assert_close(between.alpha + between.sigma, torch.ones_like(between.alpha), rtol=0, atol=1e-15)


def test_shift_moves_flows_times_towards_noise_as_in_its_paper() -> None:
    plain, moved = scales(FLOW, 99.0, 499.0, 999.0), scales(replace(FLOW, shift=3.0), 99.0, 499.0, 999.0)
    torch.testing.assert_close(moved.sigma, 3 * plain.sigma / (1 + 2 * plain.sigma), rtol=1e-12, atol=0)


def test_edm_runs_through_karras_sigmas_and_preserves_variance() -> None:
    schedule = Schedule(EDM)
    at = schedule.scales(torch.arange(1000, dtype=torch.float64))
    steps = np.arange(1000) / 999
    expected = 2 * (0.002 ** (1 / 7) + steps * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7  # data of twice the deviation
    np.testing.assert_allclose((at.sigma / at.alpha).flatten(), expected, rtol=1e-11)
    torch.testing.assert_close(at.sigma.square() + at.alpha.square(), torch.ones_like(at.alpha), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", [ScheduleKind.SCALED_LINEAR, ScheduleKind.LINEAR, ScheduleKind.COSINE])
def test_schedule_stretched_to_pure_noise_equals_diffusers(kind: ScheduleKind) -> None:
    config = ScheduleConfig(kind=kind, has_zero_terminal_snr=True)
    peer = torch.cumprod(1 - rescale_zero_terminal_snr(betas(config)), dim=0)
    np.testing.assert_allclose(Schedule(config).log_snr.sigmoid(), peer, rtol=1e-6, atol=1e-15)
    assert scales(config, 999.0).alpha.item() == 0.0
    plain, stretched = Schedule(replace(config, has_zero_terminal_snr=False)), Schedule(config)
    assert float(stretched.log_snr[0]) == pytest.approx(float(plain.log_snr[0]), rel=1e-9)


@pytest.mark.parametrize("config", [*WITHOUT_SIGNAL, EDM])
def test_times_between_and_back_are_finite_and_fall(config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    times = torch.linspace(0, 998.9, 4001, dtype=torch.float64)
    log_snr = schedule.log_snr_at(times)
    assert bool(log_snr.isfinite().all())
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(schedule.timestep_at(log_snr), times, rtol=0, atol=1e-7)
    last = schedule.log_snr_at(torch.tensor([999.0], dtype=torch.float64))
    assert schedule.timestep_at(last).item() == 999.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": ScheduleKind.LINEAR, "shift": 2.0}, "shift must be positive and is flow's, got 2.0 for linear"),
        ({"kind": ScheduleKind.FLOW, "shift": 0.0}, "shift must be positive"),
        ({"kind": ScheduleKind.EDM, "has_zero_terminal_snr": True}, "stretches a schedule of betas, got edm"),
    ],
)
def test_options_of_other_schedules_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL)
def test_a_grid_that_leaves_pure_noise_out_is_refused(schedule: ScheduleConfig) -> None:
    with pytest.raises(ValueError, match="grid leading starts below the last timestep"):
        time_grid(Grid.LEADING, Schedule(schedule), 20)


# --- what a network predicts, and samplers, under every schedule


@pytest.mark.parametrize("config", [*WITHOUT_SIGNAL, EDM])
@pytest.mark.parametrize("kind", [Prediction.VELOCITY, Prediction.FLOW, Prediction.CLEAN])
def test_conversions_of_the_target_give_back_clean_and_noise(config: ScheduleConfig, kind: Prediction) -> None:
    clean, noise = torch.randn(2, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = scales(config, 0.0, 250.5, 700.0, 999.0)
    noisy = corrupt(clean, noise, at)
    output = target(kind, clean, noise, at)
    torch.testing.assert_close(clean_from(kind, output, noisy, at), clean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(noise_from(kind, output, noisy, at), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [*WITHOUT_SIGNAL, EDM])
@pytest.mark.parametrize("stepper", [StepperKind.DDIM, StepperKind.HEUN, StepperKind.DPM_SOLVER_PP_2M])
@pytest.mark.parametrize("grid", [Grid.TRAILING, Grid.LOG_SNR])
def test_samplers_carry_pure_noise_to_the_data(config: ScheduleConfig, stepper: StepperKind, grid: Grid) -> None:
    schedule = Schedule(config)
    start = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = DATA.flow(start, schedule.scales_at(999), schedule.scales_at(-1))

    def worst(num_steps: int) -> float:
        settings = SamplerConfig(stepper=stepper, num_steps=num_steps, grid=grid)
        made = sample(DATA.denoiser(schedule), start, schedule, settings, lambda _: torch.zeros_like(start))
        return float((made - exact).abs().max())

    coarse, fine = worst(50), worst(500)
    now = schedule.scales_at(0)  # from where the last step jumps to its estimate of the data, however many steps
    jump = float((DATA.clean_given(DATA.flow(start, schedule.scales_at(999), now), now) - exact).abs().max())
    assert fine < 0.03
    assert fine < max(coarse / 5, 1.5 * jump)


@pytest.mark.parametrize("config", [FLOW, ZERO_SNR, EDM])
@pytest.mark.parametrize(
    "stepper, order", [(StepperKind.DDIM, 1), (StepperKind.HEUN, 2), (StepperKind.DPM_SOLVER_PP_2M, 2)]
)
def test_steppers_keep_their_order_under_every_schedule(
    config: ScheduleConfig, stepper: StepperKind, order: int
) -> None:
    schedule = Schedule(config)
    start = torch.randn(1, 1, 1, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ends = schedule.log_snr[[950, 50]]
    exact = DATA.flow(start, schedule.scales_at(950), schedule.scales_at(50))

    def worst(num_steps: int) -> float:
        times = schedule.timestep_at(torch.linspace(float(ends[0]), float(ends[1]), num_steps + 1, dtype=torch.float64))
        settings = SamplerConfig(stepper=stepper)
        end = follow(DATA.denoiser(schedule), start, schedule, times, settings, lambda _: torch.zeros_like(start))
        return float((end - exact).abs().max())

    errors = [worst(steps) for steps in (200, 400, 800)]
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(errors)] == pytest.approx([order] * 2, abs=0.15)


@pytest.mark.parametrize("config", [FLOW, ZERO_SNR, EDM])
@pytest.mark.parametrize("stepper, eta", [(StepperKind.DDPM, 0.0), (StepperKind.DDIM, 1.0), (StepperKind.DDIM, 0.4)])
def test_ancestral_samplers_draw_the_data_under_every_schedule(
    config: ScheduleConfig, stepper: StepperKind, eta: float
) -> None:
    schedule = Schedule(config)
    shape = (1, 1, 100, 100)
    draws = torch.Generator().manual_seed(5)
    start = torch.randn(shape, generator=draws, dtype=torch.float64)
    settings = SamplerConfig(stepper=stepper, num_steps=250, eta=eta)
    fresh = lambda _: torch.randn(shape, generator=draws, dtype=torch.float64)  # noqa: E731
    made = sample(DATA.denoiser(schedule), start, schedule, settings, fresh)
    assert float(made.mean()) == pytest.approx(DATA.mean, abs=5 * DATA.std / 100)
    assert float(made.std()) == pytest.approx(DATA.std, rel=0.06)


@pytest.mark.parametrize("config", [FLOW, ZERO_SNR, EDM])
def test_ddim_with_all_its_noise_is_ddpm_under_every_schedule(config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    noisy, clean, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = Step(
        noisy=noisy,
        clean=clean,
        now=schedule.scales_at(700),
        then=schedule.scales_at(420),
        past=(),
        denoise_then=lambda _: clean,
        between=lambda _: pytest.fail("a stage inside"),
        draw_noise=lambda: noise,
        eta=1.0,
    )
    torch.testing.assert_close(ddim(step), ddpm(step), rtol=1e-10, atol=1e-10)


def test_velocity_under_edms_schedule_is_the_preconditioning_of_its_paper() -> None:
    """D = c_skip x + c_out F(c_in x) with x = z / alpha, for data of variance 1 (Karras et al. 2022, table 1)."""
    noisy, output = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    at = scales(EDM, 10.0, 500.0, 990.0)
    sigma = at.sigma / at.alpha
    skip, out, into = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()
    edm = skip * (noisy / into) + out * -output
    torch.testing.assert_close(clean_from(Prediction.VELOCITY, output, noisy, at), edm, rtol=1e-10, atol=1e-12)
