"""Laws of the steppers: orders of convergence to an exact flow, and the whole path of diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion.process import Prediction, clean_from
from ldm.diffusion.schedule import Schedule, ScheduleConfig, ScheduleKind
from ldm.samplers.gaussian import GaussianData
from ldm.samplers.grids import Grid, karras_times, log_snr_times, time_grid
from ldm.samplers.sample import SamplerConfig, follow, sample
from ldm.samplers.steppers import StepperKind
from tests.noise_schedules import EDM, FLOW, ZERO_SNR

DATA = GaussianData(mean=0.7, std=0.5)
PLAIN = ScheduleConfig()
ORDERS = {
    StepperKind.DDIM: 1,
    StepperKind.EULER: 1,
    StepperKind.PLMS: 2,
    StepperKind.HEUN: 2,
    StepperKind.DPM_SOLVER_PP_2S: 2,
    StepperKind.DPM_SOLVER_PP_2M: 2,
    StepperKind.UNIPC: 3,
}
NOISY = (StepperKind.DDPM, StepperKind.EULER_ANCESTRAL, StepperKind.DPM_SOLVER_PP_2M_SDE)
TRAINED = {Prediction.NOISE: "epsilon", Prediction.VELOCITY: "v_prediction", Prediction.CLEAN: "sample"}
SHAPE = (2, 4, 5, 5)
NUM_STEPS = 20


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise(step: int) -> Tensor:
    raise AssertionError(f"a deterministic sampler asked for the noise of step {step}")


# --- convergence


@pytest.mark.parametrize("kind", [ScheduleKind.SCALED_LINEAR, ScheduleKind.LINEAR])
@pytest.mark.parametrize("stepper", ORDERS)
def test_stepper_converges_to_the_exact_flow_at_its_order(stepper: StepperKind, kind: ScheduleKind) -> None:
    schedule = Schedule(ScheduleConfig(kind=kind))
    start = randn(1, 1, 1, 32)
    exact = DATA.flow(start, schedule.scales_at(999), schedule.scales_at(0))

    def worst_error(num_steps: int) -> float:
        times = log_snr_times(schedule, num_steps + 1)
        config = SamplerConfig(stepper=stepper)
        end = follow(DATA.denoiser(schedule), start, schedule, times, config, no_noise)
        return float((end - exact).abs().max())

    slopes = [math.log2(one / other) for one, other in pairwise(map(worst_error, (100, 200, 400)))]
    assert slopes == pytest.approx([ORDERS[stepper]] * 2, abs=0.2)


@pytest.mark.parametrize("stepper", NOISY)
def test_noisy_stepper_reproduces_mean_and_variance_of_the_data(stepper: StepperKind) -> None:
    schedule = Schedule(PLAIN)

    def moments(num_steps: int) -> tuple[float, float]:
        """Return mean and variance of what it gives, exactly: one row for each noise reads off its weight."""
        times = time_grid(Grid.LOG_SNR, schedule, num_steps)
        sources = torch.eye(num_steps + 2, dtype=torch.float64)
        output = follow(
            DATA.denoiser(schedule),
            sources[0].reshape(-1, 1, 1, 1),
            schedule,
            times,
            SamplerConfig(stepper=stepper),
            lambda step: sources[step + 1].reshape(-1, 1, 1, 1),
        ).flatten()
        return float(output[-1]), float((output[:-1] - output[-1]).square().sum())

    (_, coarse), (_, fine), (mean, variance) = (moments(num_steps) for num_steps in (25, 100, 400))
    assert abs(coarse - variance) > 4 * abs(fine - variance)
    assert mean == pytest.approx(DATA.mean, rel=2e-3)
    assert variance == pytest.approx(DATA.std**2, rel=0.03)


# --- grids


def test_karras_times_are_even_in_the_seventh_root_of_sigma() -> None:
    schedule = Schedule(PLAIN)
    sigmas = torch.exp(-0.5 * schedule.log_snr_at(karras_times(schedule, 30)))
    torch.testing.assert_close(sigmas[0].log(), -0.5 * schedule.log_snr[-1])
    gaps = sigmas.pow(1 / 7).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(29), rtol=1e-9, atol=0)


def test_quadratic_times_are_even_in_their_roots() -> None:
    gaps = time_grid(Grid.QUADRATIC, Schedule(PLAIN), 40)[:-1].sqrt().diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(39), rtol=1e-9, atol=1e-9)


# --- the paths of diffusers


def output_of(noisy: Tensor, timestep: Tensor) -> Tensor:
    """Some smooth function of latent and timestep: no denoiser of anything."""
    time = (timestep / 1000).reshape(-1, 1, 1, 1)
    return torch.tanh(noisy * (1.5 - time)) + 0.1 * torch.sin(3 * noisy.roll(1, dims=3)) * time


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A scheduler of diffusers.

    Attributes:
        name: its class.
        settings: of it, beside the schedule.
        predictions: what it can be told that a network puts out.
        grid: our name for its spacing.
    """

    name: str
    settings: dict[str, Any]
    predictions: tuple[Prediction, ...] = tuple(TRAINED)
    grid: Grid = Grid.TRAILING


LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
TRAILING = {"timestep_spacing": "trailing"}
SOLVER = {**TRAILING, "solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
MULTISTEP = {**SOLVER, "lower_order_final": False, "solver_type": "midpoint", "algorithm_type": "dpmsolver++"}
WITHOUT_CLEAN = (Prediction.NOISE, Prediction.VELOCITY)
WHOLE = {"clip_sample": False, "set_alpha_to_one": True}
PEERS = {
    StepperKind.DDPM: Peer(name="DDPMScheduler", settings={**TRAILING, "clip_sample": False}),
    StepperKind.DDIM: Peer(name="DDIMScheduler", settings={**TRAILING, **WHOLE}),
    StepperKind.PLMS: Peer(
        name="PNDMScheduler",
        settings={**LEADING, "skip_prk_steps": True, "set_alpha_to_one": True},
        predictions=(Prediction.NOISE,),  # of velocities it adds up those, of different times, in place of noises
        grid=Grid.LEADING,
    ),
    StepperKind.EULER: Peer(name="EulerDiscreteScheduler", settings=TRAILING),
    StepperKind.EULER_ANCESTRAL: Peer(
        name="EulerAncestralDiscreteScheduler", settings=TRAILING, predictions=WITHOUT_CLEAN
    ),
    StepperKind.HEUN: Peer(name="HeunDiscreteScheduler", settings=TRAILING, predictions=WITHOUT_CLEAN),
    StepperKind.DPM_SOLVER_PP_2M: Peer(name="DPMSolverMultistepScheduler", settings=MULTISTEP),
    StepperKind.DPM_SOLVER_PP_2M_SDE: Peer(
        name="DPMSolverMultistepScheduler", settings={**MULTISTEP, "algorithm_type": "sde-dpmsolver++"}
    ),
    StepperKind.UNIPC: Peer(name="UniPCMultistepScheduler", settings={**SOLVER, "solver_type": "bh2"}),
}
PAIRS = [(stepper, prediction) for stepper, peer in PEERS.items() for prediction in peer.predictions]


def our_path(stepper: StepperKind, grid: Grid, prediction: Prediction, schedule: Schedule, steps: int) -> list[Tensor]:
    """Return every latent that the network sees, and the last."""
    seen: list[Tensor] = []

    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        seen.append(noisy)
        return clean_from(prediction, output_of(noisy, timestep), noisy, schedule.scales(timestep))

    config = SamplerConfig(stepper=stepper, num_steps=steps, grid=grid)
    draw: Callable[[int], Tensor] = (lambda step: randn(*SHAPE, seed=100 + step)) if stepper in NOISY else no_noise
    last = sample(denoise, randn(*SHAPE), schedule, config, draw)
    return [*seen, last]


def their_path(peer: Peer, prediction: Prediction, schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the same of a scheduler of diffusers."""
    scheduler: Any = getattr(diffusers, peer.name)(
        1000,
        beta_start=PLAIN.start,
        beta_end=PLAIN.end,
        beta_schedule="scaled_linear",
        prediction_type=TRAINED[prediction],
        **peer.settings,
    )
    scheduler.alphas_cumprod = schedule.log_snr.sigmoid()  # diffusers rounds its table to float32
    scheduler.set_timesteps(NUM_STEPS)
    draws: Iterator[Tensor] = (randn(*SHAPE, seed=100 + step) for step in range(NUM_STEPS))
    module = type(scheduler).__module__
    if hasattr(__import__(module, fromlist=["randn_tensor"]), "randn_tensor"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(draws))
    is_scaled = hasattr(scheduler, "init_noise_sigma") and float(scheduler.init_noise_sigma) != 1.0
    latent = randn(*SHAPE)
    if is_scaled:  # theirs is z / alpha
        latent = latent / schedule.scales_at(float(scheduler.timesteps[0])).alpha
    seen: list[Tensor] = []
    for time in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latent, time)
        seen.append(noisy)
        latent = scheduler.step(output_of(noisy, time.double().expand(SHAPE[0])), time, latent).prev_sample
    return [*seen, latent]


@pytest.mark.parametrize("stepper, prediction", PAIRS)
def test_whole_path_equals_diffusers(
    stepper: StepperKind, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, peer = Schedule(PLAIN), PEERS[stepper]
    theirs = their_path(peer, prediction, schedule, monkeypatch)
    ours = our_path(stepper, peer.grid, prediction, schedule, NUM_STEPS)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype is torch.float64
        assert float((mine - other).norm() / other.norm()) < 1e-4


def test_euler_on_a_flow_schedule_is_diffusers_flow_matching() -> None:
    schedule, num_steps = Schedule(FLOW), 28  # 27 even steps of 37 timesteps
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(num_steps)
    latent = randn(*SHAPE)
    theirs = []
    for time in scheduler.timesteps:
        theirs.append(latent)
        latent = scheduler.step(output_of(latent, time.double().expand(SHAPE[0]) - 1), time, latent).prev_sample
    ours = our_path(StepperKind.EULER, Grid.LINSPACE, Prediction.FLOW, schedule, num_steps)
    for mine, other in zip(ours, [*theirs, latent], strict=True):
        assert float((mine - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("config", [FLOW, EDM, ZERO_SNR, replace(FLOW, shift=3.0)])
@pytest.mark.parametrize("stepper", StepperKind)
@pytest.mark.parametrize("grid", [Grid.TRAILING, Grid.KARRAS, Grid.QUADRATIC])
def test_every_stepper_carries_the_noise_of_every_schedule_near_the_data(
    config: ScheduleConfig, stepper: StepperKind, grid: Grid
) -> None:
    schedule = Schedule(config)
    shape = (1, 1, 64, 64)
    sampler = SamplerConfig(stepper=stepper, num_steps=60, grid=grid)
    made = sample(
        DATA.denoiser(schedule), randn(*shape), schedule, sampler, lambda step: randn(*shape, seed=100 + step)
    )
    assert bool(made.isfinite().all())
    assert float(made.mean()) == pytest.approx(DATA.mean, abs=0.05)
    assert float(made.std()) == pytest.approx(DATA.std, rel=0.2)
