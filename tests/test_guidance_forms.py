"""Laws of what guidance may be beside a scale: rescaling, an interval, thresholding, a weaker network, a classifier."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import Scales, Schedule, ScheduleConfig
from ldm.samplers.gaussian import GaussianData
from ldm.samplers.guidance import (
    PLAIN,
    GuidanceForm,
    autoguided_denoiser,
    conditional_denoiser,
    guided_denoiser,
    steered_denoiser,
    thresholded,
)
from ldm.samplers.sample import SamplerConfig, sample, step_noise
from ldm.samplers.steppers import StepperKind
from ldm.types import Condition, Latent
from tests.test_guidance import SCHEDULE, TIMES, conditions, randn, weighted_network


def noise_level(time: float) -> float:
    at = SCHEDULE.scales_at(time)
    return float(at.sigma / at.alpha)


def test_rescaled_guidance_is_the_formula_of_diffusers_on_outputs() -> None:
    network = weighted_network([])
    condition, null = conditions()
    noisy = randn(3, 4, 2, 2)
    conditional = network(noisy, TIMES, condition)
    away = network(noisy, TIMES, null)
    expected = rescale_noise_cfg(away + 7.5 * (conditional - away), conditional, guidance_rescale=0.7)
    form = GuidanceForm(rescale=0.7)
    # Where the network's output is the clean latent, the denoiser returns it as it is.
    found = guided_denoiser(network, SCHEDULE, Prediction.CLEAN, condition, null, 7.5, form)(noisy, TIMES)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    whole = replace(form, rescale=1.0)
    found = guided_denoiser(network, SCHEDULE, Prediction.CLEAN, condition, null, 7.5, whole)(noisy, TIMES)
    torch.testing.assert_close(found.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))


def test_guidance_in_an_interval_guides_the_rows_within_and_spares_the_calls_without() -> None:
    calls: list[int] = []
    network = weighted_network(calls)
    condition, null = conditions()
    noisy = randn(3, 4, 2, 2)
    lowest, highest = noise_level(200.0), noise_level(600.0)
    form = GuidanceForm(lowest_noise=lowest, highest_noise=highest)
    guided = guided_denoiser(network, SCHEDULE, Prediction.NOISE, condition, null, 3.0)
    plain = conditional_denoiser(network, SCHEDULE, Prediction.NOISE, condition)
    within = guided_denoiser(network, SCHEDULE, Prediction.NOISE, condition, null, 3.0, form)
    expected = torch.stack([plain(noisy, TIMES)[0], guided(noisy, TIMES)[1], plain(noisy, TIMES)[2]])
    torch.testing.assert_close(within(noisy, TIMES), expected, rtol=1e-12, atol=1e-12)
    for time, size in ((100.0, 3), (199.0, 3), (201.0, 6), (599.0, 6), (601.0, 3)):
        calls.clear()
        within(noisy, torch.full((3,), time, dtype=torch.float64))
        assert calls == [size], time


def test_a_highest_noise_of_0_is_no_bound() -> None:
    form = GuidanceForm(lowest_noise=1.0)
    at = Scales(alpha=torch.tensor([1.0, 1.0, 0.0]), sigma=torch.tensor([0.5, 2.0, 1.0]))
    assert form.is_guided(at).tolist() == [False, True, True]


@pytest.mark.parametrize("quantile", [0.9, 0.995])
def test_dynamic_thresholding_equals_that_of_diffusers(quantile: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e9
    )
    clean = 3 * randn(4, 4, 8, 8).float() * torch.tensor([0.1, 0.5, 1.0, 2.0]).reshape(-1, 1, 1, 1)
    found = thresholded(GuidanceForm(threshold_quantile=quantile), clean)
    torch.testing.assert_close(found, scheduler._threshold_sample(clean), rtol=1e-6, atol=1e-6)
    assert float(found.abs().max()) <= 1 + 1e-6
    assert torch.equal(found[0].abs().max() < 1, torch.tensor(True)), "what lies below the floor stays"
    higher = thresholded(GuidanceForm(threshold_quantile=quantile, threshold_floor=3.0), clean)
    torch.testing.assert_close(higher, 3 * scheduler._threshold_sample(clean / 3), rtol=1e-5, atol=1e-6)


def test_thresholding_holds_without_guidance_too_and_each_row_has_its_own() -> None:
    network = weighted_network([])
    condition, null = conditions()
    form = GuidanceForm(threshold_quantile=0.8, threshold_floor=0.5)
    noisy = 5 * randn(3, 4, 2, 2)
    for scale in (1.0, 4.0):
        plain = guided_denoiser(network, SCHEDULE, Prediction.NOISE, condition, null, scale)(noisy, TIMES)
        found = guided_denoiser(network, SCHEDULE, Prediction.NOISE, condition, null, scale, form)(noisy, TIMES)
        torch.testing.assert_close(found, thresholded(form, plain), rtol=1e-12, atol=1e-12)
        for row in range(3):
            torch.testing.assert_close(found[row], thresholded(form, plain[row : row + 1])[0])


@pytest.mark.parametrize("prediction", Prediction)
def test_autoguidance_leads_away_from_the_weaker_network_under_the_same_condition(prediction: Prediction) -> None:
    strong_calls: list[int] = []
    weak_calls: list[int] = []
    strong, of_weak = weighted_network(strong_calls), weighted_network(weak_calls)

    def weak(noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        blurred: Tensor = 0.7 * of_weak(noisy, timestep, condition)
        return blurred

    condition, _ = conditions()
    noisy = randn(3, 4, 2, 2)
    scales = torch.tensor([1.0, 2.0, 0.5])
    found = autoguided_denoiser(strong, weak, SCHEDULE, prediction, condition, scales)(noisy, TIMES)
    strongs, weaks = (
        conditional_denoiser(network, SCHEDULE, prediction, condition)(noisy, TIMES) for network in (strong, weak)
    )
    expected = weaks + scales.double().reshape(-1, 1, 1, 1) * (strongs - weaks)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    strong_calls.clear(), weak_calls.clear()
    autoguided_denoiser(strong, weak, SCHEDULE, prediction, condition, 1.0)(noisy, TIMES)
    assert (strong_calls, weak_calls) == ([3], [])


DATA = GaussianData(mean=0.3, std=1.4)
SPREAD, SEEN = 0.6, 2.0
"""What is wanted: the clean latent plus noise of this standard deviation was seen at this value."""


def posterior() -> GaussianData:
    """Return the exact distribution of clean latents, given what was seen (conditioning of Gaussians)."""
    precision = DATA.std**-2 + SPREAD**-2
    return GaussianData(mean=(DATA.mean / DATA.std**2 + SEEN / SPREAD**2) / precision, std=precision**-0.5)


def exact_guider(schedule: Schedule):
    """Return log p(seen | noisy latent) up to a constant: the clean latent given the noisy one is Gaussian."""

    def guider(noisy: Latent, timestep: Tensor) -> Tensor:
        at = schedule.scales(timestep)
        variance = DATA.std**2 * at.sigma.square() / DATA.variance(at) + SPREAD**2
        return (-0.5 * (SEEN - DATA.clean_given(noisy, at)).square() / variance).sum(dim=(1, 2, 3))

    return guider


@pytest.mark.parametrize("ends_without_signal", [False, True])
def test_a_steered_denoiser_is_the_exact_one_of_what_is_wanted(ends_without_signal: bool) -> None:
    schedule = Schedule(ScheduleConfig(has_zero_terminal_snr=ends_without_signal))
    times = torch.tensor([0.0, 30.0, 400.0, 990.0], dtype=torch.float64)
    noisy = randn(4, 2, 3, 3)
    steered = steered_denoiser(DATA.denoiser(schedule), schedule, exact_guider(schedule), 1.0)
    expected = posterior().denoiser(schedule)(noisy, times)
    torch.testing.assert_close(steered(noisy, times), expected, rtol=1e-9, atol=1e-9)
    last = torch.full((4,), 999.0, dtype=torch.float64)
    found = steered(noisy, last)
    assert found.isfinite().all()
    if ends_without_signal:
        torch.testing.assert_close(found, torch.full_like(found, DATA.mean))


def test_steered_samples_have_the_moments_of_what_is_wanted() -> None:
    schedule = Schedule(ScheduleConfig())
    steered = steered_denoiser(DATA.denoiser(schedule), schedule, exact_guider(schedule), 1.0)
    config = SamplerConfig(stepper=StepperKind.DPM_SOLVER_PP_2M, num_steps=60)
    found = sample(steered, randn(2000, 1, 1, 1), schedule, config, step_noise(0, range(2000), (1, 1, 1)))
    wanted = posterior()
    assert float(found.mean()) == pytest.approx(wanted.mean, abs=4 * wanted.std / math.sqrt(2000))
    assert float(found.std()) == pytest.approx(wanted.std, rel=0.08)


@pytest.mark.parametrize("scale", [0.5, torch.tensor([0.0, 1.0, 2.0])])
def test_a_guider_of_clean_latents_is_asked_through_the_network(scale: float | Tensor) -> None:
    network = weighted_network([])
    condition, _ = conditions()
    plain = conditional_denoiser(network, SCHEDULE, Prediction.VELOCITY, condition)
    noisy, wanted = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=9)

    def guider(clean: Latent, timestep: Tensor) -> Tensor:
        return -0.5 * (clean - wanted).square().sum(dim=(1, 2, 3))

    with torch.no_grad():  # as the sampling loop is
        found = steered_denoiser(plain, SCHEDULE, guider, scale, sees_clean=True)(noisy, TIMES)
    told = noisy.clone().requires_grad_()
    clean = plain(told, TIMES)
    (slope,) = torch.autograd.grad(guider(clean, TIMES).sum(), told)
    at = SCHEDULE.scales(TIMES)
    factor = torch.as_tensor(scale).double().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, clean.detach() + factor * at.sigma**2 / at.alpha * slope, rtol=1e-9, atol=1e-9)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rescale": 1.5}, r"rescale must lie in \[0, 1\], got 1.5"),
        ({"threshold_quantile": -0.1}, r"threshold_quantile must lie in \[0, 1\]"),
        ({"lowest_noise": 2.0, "highest_noise": 1.0}, "between 0 and highest_noise, got 2.0 and 1.0"),
        ({"threshold_floor": 0.0}, "must be positive"),
    ],
)
def test_a_form_that_is_none_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **wrong)
