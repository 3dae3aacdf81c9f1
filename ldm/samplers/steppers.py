"""Steppers: one step of a sampler from time t to a less noisy time s, each a function of a `Step`.

    z_t → z_s        given D(z_t) = E[z_0 | z_t], with  eps = (z_t - alpha_t D) / sigma_t

At the clean end (alpha_s 1, sigma_s 0) every stepper returns its last estimate of the clean latent.

Letters: b batch, c latent channel, h row, w column; in formulas t is `now`, s is `then`, r is `before`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ldm.diffusion.schedule import Scales
from ldm.types import Latent


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """All that a stepper may look at.

    Attributes:
        noisy: the latent at time t.
        clean: the denoiser's estimate from it.
        now: scales at t.
        then: scales at s; sigma 0 at the last step.
        before: scales at the time before t, None at the first step.
        clean_before: the denoiser's estimate there, None at the first step.
        denoise_then: the denoiser at time s, for steppers with a second stage.
        draw_noise: standard normal noise for this step, for stochastic steppers.
        eta: share of the ancestral noise that DDIM adds.
    """

    noisy: Latent
    clean: Latent
    now: Scales
    then: Scales
    before: Scales | None
    clean_before: Latent | None
    denoise_then: Callable[[Latent], Latent]
    draw_noise: Callable[[], Latent]
    eta: float

    @property
    def is_last(self) -> bool:
        """Whether the step goes to the clean end."""
        return not bool(self.then.sigma.any())


Stepper = Callable[[Step], Latent]


def ddpm(step: Step) -> Latent:
    """Return a draw from q(z_s | z_t, z_0 = D(z_t)) (Ho et al. 2020, eq. 6 and 7, for any pair of times)."""
    now, then = step.now, step.then
    ratio = now.alpha / then.alpha
    variance = now.sigma.square() - ratio.square() * then.sigma.square()
    weight_noisy = ratio * then.sigma.square() / now.sigma.square()
    weight_clean = then.alpha * variance / now.sigma.square()
    mean = weight_noisy * step.noisy + weight_clean * step.clean
    if step.is_last:
        return mean
    return mean + variance.sqrt() * then.sigma / now.sigma * step.draw_noise()


def ddim(step: Step) -> Latent:
    """Return the implicit step (Song et al. 2021, eq. 12 and 16): eta 0 is deterministic, eta 1 is `ddpm`."""
    now, then = step.now, step.then
    noise = (step.noisy - now.alpha * step.clean) / now.sigma
    if step.eta == 0 or step.is_last:
        return then.alpha * step.clean + then.sigma * noise
    ancestral = then.sigma / now.sigma * (now.sigma.square() - (now.alpha / then.alpha * then.sigma).square()).sqrt()
    fresh = step.eta * ancestral
    kept = (then.sigma.square() - fresh.square()).sqrt()
    return then.alpha * step.clean + kept * noise + fresh * step.draw_noise()


def heun(step: Step) -> Latent:
    """Return a second-order step of the probability flow (Karras et al. 2022, algorithm 1).

    It calls the network twice, but once at the last step, and at a first one without signal, where it is `ddim`'s. In
    x = z / alpha and rho = sigma / alpha the flow is dx / drho = (x - D) / rho.
    """
    now, then = step.now, step.then
    if step.is_last:
        return step.clean
    if not bool(now.alpha):
        return ddim(step)
    rho_now = now.sigma / now.alpha
    rho_then = then.sigma / then.alpha
    start = step.noisy / now.alpha
    slope = (start - step.clean) / rho_now
    guess = start + (rho_then - rho_now) * slope
    slope_then = (guess - step.denoise_then(then.alpha * guess)) / rho_then
    return then.alpha * (start + (rho_then - rho_now) * 0.5 * (slope + slope_then))


def dpm_solver_pp_2m(step: Step) -> Latent:
    """Return a multistep step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); first-order at both ends."""
    now, then = step.now, step.then
    estimate = step.clean
    if step.before is not None and step.clean_before is not None and not step.is_last:
        width_before = _half_log_snr(now) - _half_log_snr(step.before)
        width = _half_log_snr(then) - _half_log_snr(now)
        # Linear extrapolation of D to the middle of the step: 1 / (2 r) with r = width_before / width.
        estimate = step.clean + 0.5 * width / width_before * (step.clean - step.clean_before)
    shrink = then.sigma / now.sigma
    return shrink * step.noisy + (then.alpha - shrink * now.alpha) * estimate


class StepperKind(StrEnum):
    """Which stepper a sampler takes."""

    DDPM = "ddpm"
    DDIM = "ddim"
    HEUN = "heun"
    DPM_SOLVER_PP_2M = "dpm_solver_pp_2m"


STEPPERS: dict[StepperKind, Stepper] = {
    StepperKind.DDPM: ddpm,
    StepperKind.DDIM: ddim,
    StepperKind.HEUN: heun,
    StepperKind.DPM_SOLVER_PP_2M: dpm_solver_pp_2m,
}


def _half_log_snr(at: Scales) -> Tensor:
    """Return lambda = log(alpha / sigma)."""
    return torch.log(at.alpha) - torch.log(at.sigma)
