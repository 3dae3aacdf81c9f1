"""Laws of the samplers: truth on Gaussian data, orders of convergence, equality with diffusers, randomness."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import Scales, Schedule, ScheduleConfig, betas
from ldm.samplers.gaussian import GaussianData
from ldm.samplers.grids import Grid, log_snr_times, time_grid
from ldm.samplers.guidance import conditional_denoiser
from ldm.samplers.sample import SamplerConfig, follow, initial_noise, sample, step_noise
from ldm.samplers.steppers import Between, Step, StepperKind, ddim, ddpm
from ldm.types import Condition

SCHEDULE = Schedule(ScheduleConfig())
DATA = GaussianData(mean=0.7, std=0.5)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise(step: int) -> torch.Tensor:
    raise AssertionError(f"a deterministic sampler asked for the noise of step {step}")


def no_between(half_log_snr: float) -> Between:
    raise AssertionError(f"a stepper without a stage inside asked for {half_log_snr}")


def noise_predictor(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Some smooth function: neither linear nor a denoiser of anything."""
    time = (timestep / 1000).reshape(-1, 1, 1, 1)
    return torch.tanh(noisy * (1.5 - time)) + 0.1 * torch.sin(3 * noisy.roll(1, dims=3)) * time


def as_network(noisy: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
    return noise_predictor(noisy, timestep)


PREDICTOR_DENOISER = conditional_denoiser(as_network, SCHEDULE, Prediction.NOISE, Condition())


# --- time grids


@pytest.mark.parametrize("grid", Grid)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50, 77, 333, 400, 600, 999, 1000])
def test_time_grid_has_exactly_the_steps_asked_for(grid, num_steps):
    times = time_grid(grid, SCHEDULE, num_steps)
    assert times.shape == (num_steps + 1,)
    assert bool((times.diff() < 0).all())
    assert float(times[0]) <= 999
    assert (float(times[-2]) >= 0, float(times[-1])) == (True, -1.0)


@pytest.mark.parametrize("grid", [Grid.TRAILING, Grid.LINSPACE, Grid.LOG_SNR])
@pytest.mark.parametrize("num_steps", [1, 50, 77])
def test_time_grid_starts_at_the_noisiest_timestep(grid, num_steps):
    assert float(time_grid(grid, SCHEDULE, num_steps)[0]) == pytest.approx(999, abs=1e-9)


@pytest.mark.parametrize("grid, spacing", [(Grid.LEADING, "leading"), (Grid.TRAILING, "trailing")])
@pytest.mark.parametrize("num_steps", [10, 50, 250, 1000])
def test_time_grid_equals_diffusers_where_steps_divide(grid, spacing, num_steps):
    peer = DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=0)
    peer.set_timesteps(num_steps)
    assert time_grid(grid, SCHEDULE, num_steps)[:-1].tolist() == peer.timesteps.tolist()


def test_log_snr_grid_is_even_in_log_snr():
    gaps = SCHEDULE.log_snr_at(time_grid(Grid.LOG_SNR, SCHEDULE, 40)[:-1]).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(39), rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_time_grid_of_senseless_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"between 1 and the schedule's 1000 timesteps, got {num_steps}"):
        time_grid(Grid.TRAILING, SCHEDULE, num_steps)


# --- the loop


@pytest.mark.parametrize("stepper", StepperKind)
@pytest.mark.parametrize("grid", Grid)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_sample_calls_the_network_exactly_as_often_as_promised(stepper, grid, num_steps):
    calls: list[float] = []

    def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        calls.append(float(timestep[0]))
        return DATA.denoiser(SCHEDULE)(noisy, timestep)

    config = SamplerConfig(stepper=stepper, num_steps=num_steps, grid=grid)
    seen: list[int] = []
    noise = step_noise(0, [0], (1, 2, 2))
    sample(denoise, randn(1, 1, 2, 2), SCHEDULE, config, noise, lambda index, clean: seen.append(index))
    twice = {StepperKind.HEUN: num_steps - 1, StepperKind.DPM_SOLVER_PP_2S: num_steps - 1, StepperKind.PLMS: 1}
    assert len(calls) == num_steps + min(num_steps - 1, twice.get(stepper, 0))
    assert all(0 <= time < 1000 for time in calls)
    assert seen == list(range(num_steps))


@pytest.mark.parametrize("stepper", [kind for kind in StepperKind if kind is not StepperKind.PLMS])
def test_sample_ends_at_the_last_estimate_of_the_clean_latent(stepper):
    estimates: list[torch.Tensor] = []
    config = SamplerConfig(stepper=stepper, num_steps=9)
    noise = step_noise(0, [0, 1], (4, 3, 3))
    result = sample(
        PREDICTOR_DENOISER, randn(2, 4, 3, 3), SCHEDULE, config, noise, lambda _, clean: estimates.append(clean)
    )
    torch.testing.assert_close(result, estimates[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stepper", StepperKind)
def test_sample_of_a_single_point_is_that_point(stepper):
    def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.full_like(noisy, 0.3)

    config = SamplerConfig(stepper=stepper, num_steps=7)
    result = sample(denoise, randn(2, 4, 3, 3), SCHEDULE, config, step_noise(0, [0, 1], (4, 3, 3)))
    torch.testing.assert_close(result, torch.full_like(result, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sample_keeps_the_dtype_of_the_latents(dtype):
    seen: set[torch.dtype] = set()

    def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.add(noisy.dtype)
        return 0.5 * noisy

    config = SamplerConfig(stepper=StepperKind.DPM_SOLVER_PP_2M, num_steps=4)
    assert sample(denoise, randn(1, 1, 2, 2).to(dtype), SCHEDULE, config, no_noise).dtype is dtype
    assert seen == {dtype}


@pytest.mark.parametrize("fields", [{"num_steps": 0}, {"eta": 1.5}, {"eta": -0.1}])
def test_sampler_config_with_senseless_values_is_refused(fields):
    with pytest.raises(ValueError, match="must"):
        SamplerConfig(**fields)


def test_sampler_config_with_eta_of_another_stepper_is_refused():
    with pytest.raises(ValueError, match="eta is ddim's"):
        SamplerConfig(stepper=StepperKind.HEUN, eta=0.5)


# --- truth on Gaussian data


def test_exact_denoiser_is_the_regression_of_clean_on_noisy():
    # E[z_0 | z_t] of joint Gaussians has slope cov / var; both are measured from draws.
    clean = DATA.mean + DATA.std * randn(1, 1, 1, 400_000)
    at = SCHEDULE.scales_at(400.0)
    noisy = at.alpha * clean + at.sigma * randn(1, 1, 1, 400_000, seed=1)
    pairs = torch.cov(torch.stack([clean.flatten(), noisy.flatten()]))
    slope = float(pairs[0, 1] / pairs[1, 1])
    ours = DATA.clean_given(torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1), at).flatten()
    assert float(ours[1] - ours[0]) == pytest.approx(slope, rel=0.01)
    assert float(ours[0]) == pytest.approx(DATA.mean - slope * float(at.alpha) * DATA.mean, rel=0.01)


def test_exact_flow_keeps_quantiles():
    then = SCHEDULE.scales_at(30.0)
    now = SCHEDULE.scales_at(800.0)
    noisy = now.alpha * DATA.mean + 1.7 * DATA.variance(now).sqrt()
    moved = DATA.flow(noisy.reshape(1, 1, 1, 1), now, then)
    quantile = (moved - then.alpha * DATA.mean) / DATA.variance(then).sqrt()
    assert float(quantile) == pytest.approx(1.7, abs=1e-12)


def sampled_moments(times: torch.Tensor, start_std: float = 1.0) -> tuple[float, float]:
    """Return mean and variance of ancestral sampling on Gaussian data over some times, exactly.

    The exact denoiser is affine, so the output is  bias + sum_i weight_i eps_i  over the initial noise and each step's.
    One row for each eps_i reads its weight off; the last row, without noise, reads the bias.
    """
    sources = torch.eye(len(times) + 1, dtype=torch.float64)

    def draw(step: int) -> torch.Tensor:
        return sources[step + 1].reshape(-1, 1, 1, 1)

    start = start_std * sources[0].reshape(-1, 1, 1, 1)
    config = SamplerConfig(stepper=StepperKind.DDPM)
    output = follow(DATA.denoiser(SCHEDULE), start, SCHEDULE, times, config, draw).flatten()
    bias = output[-1]
    return float(bias), float((output[:-1] - bias).square().sum())


def test_ddpm_sampling_reproduces_the_mean_and_variance_of_the_data():
    mean, variance = sampled_moments(time_grid(Grid.TRAILING, SCHEDULE, 1000))
    assert mean == pytest.approx(DATA.mean, rel=1e-4)
    assert variance == pytest.approx(DATA.std**2, rel=0.03)


def test_ddpm_variance_converges_to_the_exact_one_at_first_order():
    start_std = float(DATA.variance(SCHEDULE.scales_at(999)).sqrt())
    exact = float(DATA.variance(SCHEDULE.scales_at(0)))

    def missing_variance(num_steps: int) -> float:
        return exact - sampled_moments(log_snr_times(SCHEDULE, num_steps + 1), start_std)[1]

    missing = [missing_variance(num_steps) for num_steps in (200, 400, 800)]
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(missing)] == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("stop", [600.0, 123.0, 0.0])
def test_ddpm_steps_on_a_single_point_keep_the_marginal_variance_exactly(stop):
    # Where z_0 is one known point, q(z_s | z_t, z_0) is the true reverse process, whatever the number of steps.
    times = torch.linspace(999, stop, 6, dtype=torch.float64)
    sources = torch.eye(6, dtype=torch.float64).reshape(6, 6, 1, 1)
    start = SCHEDULE.scales_at(999).sigma * sources[0].reshape(-1, 1, 1, 1)
    config = SamplerConfig(stepper=StepperKind.DDPM)
    end = follow(
        lambda noisy, _: torch.zeros_like(noisy),
        start,
        SCHEDULE,
        times,
        config,
        lambda step: sources[step + 1][:, None],
    )
    expected = SCHEDULE.scales_at(stop).sigma.square()
    assert float(end.square().sum()) == pytest.approx(float(expected), rel=1e-12)


def test_ddpm_variance_measured_on_draws_equals_the_computed_one():
    config = SamplerConfig(stepper=StepperKind.DDPM, num_steps=50)
    shape = (1, 200, 200)
    start = initial_noise(3, [0], shape).double()
    drawn = sample(DATA.denoiser(SCHEDULE), start, SCHEDULE, config, step_noise(3, [0], shape))
    mean, variance = sampled_moments(time_grid(config.grid, SCHEDULE, config.num_steps))
    # 40,000 draws: the mean deviates by std / 200, the variance by its sqrt(2 / 40000); four of those.
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance) / 200)
    assert float(drawn.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 40_000))


# --- two derivations, and diffusers


def test_ddpm_step_equals_ddim_with_eta_one():
    noisy, clean, noise = randn(3, 2, 4, 3, 3)
    for now, then in [(999.0, 980.0), (500.0, 2.0), (1.0, 0.0), (20.0, -1.0)]:
        scales = (SCHEDULE.scales_at(now), SCHEDULE.scales_at(then))
        step = step_of(noisy, clean, *scales, noise, eta=1.0)
        torch.testing.assert_close(ddpm(step), ddim(step), rtol=1e-9, atol=1e-9)


def step_of(
    noisy: torch.Tensor, clean: torch.Tensor, now: Scales, then: Scales, noise: torch.Tensor, eta: float
) -> Step:
    return Step(
        noisy=noisy,
        clean=clean,
        now=now,
        then=then,
        past=(),
        denoise_then=lambda latent: latent,
        between=no_between,
        draw_noise=lambda: noise,
        eta=eta,
    )


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("grid, spacing", [(Grid.LEADING, "leading"), (Grid.TRAILING, "trailing")])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_ddim_path_equals_diffusers(eta, grid, spacing, num_steps):
    peer = DDIMScheduler(
        1000,
        trained_betas=betas(SCHEDULE.config).numpy(),
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing=spacing,
        steps_offset=0,
    )
    peer.alphas_cumprod = SCHEDULE.log_snr.sigmoid()  # diffusers rounds its table to float32; the law is about the path
    peer.set_timesteps(num_steps)
    noises = randn(num_steps, 2, 4, 5, 5, seed=1)
    theirs = randn(2, 4, 5, 5)
    path: list[torch.Tensor] = []
    for index, time in enumerate(peer.timesteps):
        output = noise_predictor(theirs, time.double().expand(2))
        stepped = peer.step(output, time, theirs, eta=eta, variance_noise=noises[index] if eta else None)
        theirs = stepped.prev_sample
        path.append(stepped.pred_original_sample)
    ours_path: list[torch.Tensor] = []
    config = SamplerConfig(num_steps=num_steps, eta=eta, grid=grid)
    ours = sample(
        PREDICTOR_DENOISER,
        randn(2, 4, 5, 5),
        SCHEDULE,
        config,
        lambda step: noises[step],
        lambda _, clean: ours_path.append(clean),
    )
    torch.testing.assert_close(torch.stack(ours_path), torch.stack(path), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours, path[-1], rtol=1e-8, atol=1e-8)


# --- randomness


@pytest.mark.parametrize("stepper", StepperKind)
def test_image_depends_on_its_index_and_not_on_its_batch(stepper):
    config = SamplerConfig(stepper=stepper, num_steps=6)
    shape = (4, 3, 5)

    def images(samples: list[int]) -> torch.Tensor:
        noise = step_noise(7, samples, shape)
        return sample(PREDICTOR_DENOISER, initial_noise(7, samples, shape), SCHEDULE, config, noise)

    together = images([4, 9, 2])
    for row, index in enumerate([4, 9, 2]):
        torch.testing.assert_close(images([index])[0], together[row], rtol=0, atol=0)
    torch.testing.assert_close(images([2, 4]), together[[2, 0]], rtol=0, atol=0)


def test_noise_of_steps_rows_and_seeds_differ():
    shape = (4, 8, 8)
    first = step_noise(0, [0, 1], shape)
    draws = [*first(0), *first(1), *step_noise(1, [0, 1], shape)(0), *initial_noise(0, [0, 1], shape)]
    correlation = torch.corrcoef(torch.stack([draw.flatten() for draw in draws])) - torch.eye(len(draws))
    # 256 draws: a correlation deviates by 1 / 16; 4.5 of those.
    assert float(correlation.abs().max()) < 4.5 / 16
