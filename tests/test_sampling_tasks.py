"""Laws of what sampling begins with and must keep, on data for which everything is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.diffusion.process import corrupt
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.samplers.gaussian import GaussianData
from ldm.samplers.grids import Grid, time_grid
from ldm.samplers.sample import SamplerConfig, sample, step_noise
from ldm.samplers.steppers import StepperKind
from ldm.samplers.tasks import Start, last_part, latent_mask, sample_from, slerp
from ldm.types import Latent

SCHEDULE = Schedule(ScheduleConfig())
DATA = GaussianData(mean=0.5, std=0.8)
DENOISE = DATA.denoiser(SCHEDULE)
SHAPE = (3, 2, 4, 4)
NO_NOISE = step_noise(0, range(3), SHAPE[1:])


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(calls: list[float]) -> Callable[[Latent, Tensor], Latent]:
    def denoise(noisy: Latent, timestep: Tensor) -> Latent:
        calls.append(float(timestep[0]))
        return DENOISE(noisy, timestep)

    return denoise


@pytest.mark.parametrize("strength", [0.02, 0.3, 0.75, 0.98])
def test_image_to_image_follows_the_exact_flow_from_the_noised_picture(strength: float) -> None:
    calls: list[float] = []
    config = SamplerConfig(stepper=StepperKind.DPM_SOLVER_PP_2M, num_steps=200, grid=Grid.LOG_SNR)
    clean, noise = DATA.mean + DATA.std * randn(0), randn(1)
    found = sample_from(counted(calls), Start(clean), noise, SCHEDULE, config, strength, NO_NOISE)
    assert len(calls) == round(strength * 200)
    first = SCHEDULE.scales_at(calls[0])
    expected = DATA.flow(corrupt(clean, noise, first), first, SCHEDULE.scales_at(-1.0))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_strength_of_1_begins_with_noise_alone_and_makes_every_step() -> None:
    config = SamplerConfig(num_steps=7)
    found = sample_from(DENOISE, Start(randn(0)), randn(1), SCHEDULE, config, 1.0, NO_NOISE)
    assert torch.equal(found, sample(DENOISE, randn(1), SCHEDULE, config, NO_NOISE))


@pytest.mark.parametrize("strength, num_steps", [(1.0, 10), (0.95, 10), (0.94, 9), (0.5, 5), (0.04, 1), (0.001, 1)])
def test_a_share_of_the_steps_is_made_and_one_at_least(strength: float, num_steps: int) -> None:
    times = time_grid(Grid.TRAILING, SCHEDULE, 10)
    found = last_part(times, strength)
    assert len(found) - 1 == num_steps
    assert torch.equal(found, times[-num_steps - 1 :])


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01])
def test_a_strength_that_is_no_share_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\]"):
        last_part(time_grid(Grid.TRAILING, SCHEDULE, 10), strength)


@pytest.mark.parametrize("stepper", [kind for kind in StepperKind if kind is not StepperKind.PLMS])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_what_is_known_comes_out_as_it_is_and_the_rest_as_without_it(stepper: StepperKind, strength: float) -> None:
    clean, noise = randn(0), randn(1)
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[0, :, :2], mask[1, :, :, 1:], mask[2] = True, True, True
    config = SamplerConfig(stepper=stepper, num_steps=12)
    arguments = (noise, SCHEDULE, config, strength, step_noise(3, range(3), SHAPE[1:]))
    found = sample_from(DENOISE, Start(clean, mask), *arguments)
    whole = sample_from(DENOISE, Start(clean), *arguments)
    known = ~mask.expand(SHAPE)
    torch.testing.assert_close(found[known], clean[known], rtol=1e-9, atol=1e-9)
    # This denoiser looks at one element at a time: what is known next to it says nothing.
    torch.testing.assert_close(found[~known], whole[~known], rtol=1e-12, atol=1e-12)


def test_a_latent_is_drawn_anew_if_one_of_its_pixels_is() -> None:
    pixels = torch.zeros(1, 8, 12, dtype=torch.bool)
    pixels[0, 3, 4] = pixels[0, 7, 11] = True
    expected = torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(latent_mask(pixels, 4)[0, 0], expected)


def test_a_blend_of_two_noises_runs_along_the_sphere_from_one_to_the_other() -> None:
    one, other = randn(4), randn(5)
    torch.testing.assert_close(slerp(one, other, 0.0), one)
    torch.testing.assert_close(slerp(one, other, 1.0), other)
    flat = [part.flatten(1) for part in (one, other)]
    angles = torch.arccos(torch.nn.functional.cosine_similarity(*flat))
    for share in (0.25, 0.5, 0.8):
        found = slerp(one, other, share).flatten(1)
        # The angle to the first grows evenly, where both are equally long.
        alike = [part / part.norm(dim=1, keepdim=True) for part in flat]
        blend = slerp(*(part.reshape(SHAPE) for part in alike), share).flatten(1)
        torch.testing.assert_close(blend.norm(dim=1), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(torch.arccos((blend * alike[0]).sum(dim=1)), share * angles)
        assert (found.norm(dim=1) > 0.9 * min(part.norm(dim=1).min() for part in flat)).all()
    torch.testing.assert_close(slerp(one, one, 0.3), one)


def test_the_middle_of_two_independent_noises_is_as_long_as_they_are() -> None:
    shape = (1, 4, 64, 64)
    one, other = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    length = math.sqrt(one.numel())
    assert float(slerp(one, other, 0.5).norm()) == pytest.approx(length, rel=0.02)
    assert float((0.5 * (one + other)).norm()) == pytest.approx(length / math.sqrt(2), rel=0.02)
