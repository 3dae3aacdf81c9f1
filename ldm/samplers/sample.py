"""The one sampling loop: pure noise → clean latent, over a time grid, with any stepper.

    z_T ~ N(0, 1)        z_{t_{i+1}} = step(z_{t_i}, D(z_{t_i}, t_i))        the last t is the clean end

Noise comes from the caller, step by step, so that an image depends on its own seed and index and not on its batch.

Letters: b batch, c latent channel, h row, w column, k number of steps + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import Config
from ldm.diffusion.schedule import Schedule
from ldm.randomness import Draw, normal
from ldm.samplers.grids import Grid, time_grid
from ldm.samplers.steppers import LONGEST_PAST, STEPPERS, Between, Past, Step, StepperKind
from ldm.types import Latent

Denoiser = Callable[[Latent, Float[Tensor, " b"]], Latent]
"""(noisy latent, timestep of each row) → estimate of the clean latent, both scaled."""
DrawNoise = Callable[[int], Latent]
"""Index of a step → its standard normal noise, shape (b, c, h, w)."""
OnStep = Callable[[int, Latent], None]
"""(index of a step, its estimate of the clean latent), called after the step: for progress and previews."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig(Config):
    """How latents are sampled."""

    stepper: StepperKind = StepperKind.DDIM
    """Which formula takes a step."""
    num_steps: int = 50
    """Number of steps; heun and dpm_solver_pp_2s call the network twice a step but the last, plms twice at the first,
    the others once."""
    eta: float = 0.0
    """Noise added by ddim: 0 is deterministic, 1 is ancestral. The other steppers have their own or none."""
    grid: Grid = Grid.TRAILING
    """How timesteps are spread."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        if self.eta and self.stepper is not StepperKind.DDIM:
            raise ValueError(f"eta is ddim's, the {self.stepper} stepper takes none; got eta={self.eta}")


def sample(
    denoise: Denoiser,
    initial: Latent,
    schedule: Schedule,
    config: SamplerConfig,
    draw_noise: DrawNoise,
    on_step: OnStep | None = None,
) -> Latent:
    """Return clean latents.

    Args:
        denoise: the denoiser, guidance included.
        initial: standard normal noise, shape (b, c, h, w), on the denoiser's device.
        schedule: the schedule the network was trained with.
        config: stepper, number of steps and grid.
        draw_noise: noise of each step; not called by deterministic steppers.
        on_step: called after each step.
    """
    times = time_grid(config.grid, schedule, config.num_steps)
    return follow(denoise, initial, schedule, times, config, draw_noise, on_step)


@torch.no_grad()
def follow(
    denoise: Denoiser,
    noisy: Latent,
    schedule: Schedule,
    times: Float[Tensor, " k"],
    config: SamplerConfig,
    draw_noise: DrawNoise,
    on_step: OnStep | None = None,
) -> Latent:
    """Return the latents at the last of `times`, starting from `noisy` at the first of them.

    Args:
        denoise: the denoiser, guidance included.
        noisy: latents at the first time.
        schedule: the schedule the network was trained with.
        times: falling timesteps, a negative one only at the end.
        config: the stepper and its eta; `num_steps` and `grid` are not looked at.
        draw_noise: noise of each step.
        on_step: called after each step.
    """
    stepper = STEPPERS[config.stepper]
    marks = [float(time) for time in times]
    # Scales as numbers in float64 are exact, and what the steps need is on the device before the first of them.
    scales, rows = schedule.scales_along(marks), schedule.rows_along(marks, noisy)
    past: tuple[Past, ...] = ()
    for index in range(len(marks) - 1):
        clean = denoise(noisy, rows[index])
        step = Step(
            noisy=noisy,
            clean=clean,
            now=scales[index],
            then=scales[index + 1],
            past=past,
            denoise_then=partial(_denoise_at, denoise, rows[index + 1]),
            between=partial(_between, denoise, schedule, noisy),
            draw_noise=partial(_noise_like, draw_noise, index, noisy),
            eta=config.eta,
        )
        past = (Past(at=scales[index], noisy=noisy, clean=clean), *past)[:LONGEST_PAST]
        noisy = stepper(step)
        if on_step is not None:
            on_step(index, clean)
    return noisy


def initial_noise(seed: int, samples: Sequence[int], shape: tuple[int, int, int]) -> Latent:
    """Return the noise that sampling starts from: a function of the seed and each row's own index.

    Args:
        seed: the seed of all images.
        samples: the index of each row's image, whatever batch it is in.
        shape: (c, h, w).
    """
    return normal(seed, Draw.INITIAL, samples, shape)


def step_noise(seed: int, samples: Sequence[int], shape: tuple[int, int, int]) -> DrawNoise:
    """Return the noise of every step as a function of its index, drawn from the seed and each row's own index."""

    def draw(step: int) -> Latent:
        return normal(seed, Draw.STEP, samples, shape, sub=step)

    return draw


def _denoise_at(denoise: Denoiser, timestep: Float[Tensor, " b"], noisy: Latent) -> Latent:
    return denoise(noisy, timestep)


def _between(denoise: Denoiser, schedule: Schedule, like: Latent, half_log_snr: float) -> Between:
    """Return the time at which log(alpha / sigma) has a value."""
    time = float(schedule.timestep_at(torch.tensor([2 * half_log_snr], dtype=torch.float64)))
    (rows,) = schedule.rows_along([time], like)
    return Between(at=schedule.scales_at(time), denoise=partial(_denoise_at, denoise, rows))


def _noise_like(draw_noise: DrawNoise, step: int, like: Latent) -> Latent:
    return draw_noise(step).to(like.device, like.dtype)
