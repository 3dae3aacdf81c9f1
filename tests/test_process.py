"""Laws of corruption and of what a network predicts."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion.process import Prediction, clean_from, corrupt, noise_from, target
from ldm.diffusion.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig())
TIMES = torch.tensor([0.0, 1.0, 250.5, 700.0, 999.0], dtype=torch.float64)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.randn(2, 5, 4, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draws[0], draws[1]


@pytest.mark.parametrize("kind", Prediction)
def test_conversions_of_the_target_give_back_clean_and_noise(kind):
    clean, noise = pair()
    at = SCHEDULE.scales(TIMES)
    noisy = corrupt(clean, noise, at)
    output = target(kind, clean, noise, at)
    torch.testing.assert_close(clean_from(kind, output, noisy, at), clean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(noise_from(kind, output, noisy, at), noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind, other", itertools.permutations(Prediction, 2))
def test_conversions_of_any_output_are_inverses(kind, other):
    noisy, output = pair()
    at = SCHEDULE.scales(TIMES)
    clean, noise = clean_from(kind, output, noisy, at), noise_from(kind, output, noisy, at)
    there = target(other, clean, noise, at)
    back = target(kind, clean_from(other, there, noisy, at), noise_from(other, there, noisy, at), at)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)


def test_velocity_is_the_derivative_along_the_circle():
    clean, noise = pair()
    at = SCHEDULE.scales(TIMES)
    angle = torch.atan2(at.sigma, at.alpha)
    step = 1e-6
    ahead = torch.cos(angle + step) * clean + torch.sin(angle + step) * noise
    behind = torch.cos(angle - step) * clean + torch.sin(angle - step) * noise
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(target(Prediction.VELOCITY, clean, noise, at), slope, rtol=1e-8, atol=1e-8)


def test_corrupt_has_the_scheduled_mean_and_variance():
    noise = torch.randn(5, 4, 128, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = SCHEDULE.scales(TIMES)
    noisy = corrupt(torch.full_like(noise, 3.0), noise, at)
    alpha, sigma = at.alpha.flatten(), at.sigma.flatten()
    # 65,536 draws a row: a mean deviates by sigma / 256, a standard deviation by sigma / 362; five of those.
    assert bool(((noisy.mean(dim=(1, 2, 3)) - 3 * alpha).abs() < 5 * sigma / 256).all())
    assert bool(((noisy.std(dim=(1, 2, 3)) - sigma).abs() < 5 * sigma / 362).all())


def test_corrupt_and_velocity_equal_diffusers():
    clean, noise = pair()
    peer = DDPMScheduler(1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    times = torch.tensor([0, 1, 250, 700, 999])
    at = SCHEDULE.scales(times.double())
    torch.testing.assert_close(corrupt(clean, noise, at), peer.add_noise(clean, noise, times), rtol=0, atol=1e-5)
    velocity = target(Prediction.VELOCITY, clean, noise, at)
    torch.testing.assert_close(velocity, peer.get_velocity(clean, noise, times), rtol=0, atol=1e-5)


def test_corrupt_at_the_clean_end_changes_nothing():
    clean, noise = pair()
    at = SCHEDULE.scales(torch.full((5,), -1.0, dtype=torch.float64))
    torch.testing.assert_close(corrupt(clean, noise, at), clean, rtol=0, atol=0)
