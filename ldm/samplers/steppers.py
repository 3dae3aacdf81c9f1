"""Steppers: one step of a sampler from time t to a less noisy time s, each a function of a `Step`.

    z_t → z_s        given D(z_t) = E[z_0 | z_t], with  eps = (z_t - alpha_t D) / sigma_t

At the clean end (alpha_s 1, sigma_s 0) every stepper returns its last estimate of the clean latent: D, or for `plms`
what follows from the noises of several steps.

Steps that people know by other names are here already. In x = z / alpha and rho = sigma / alpha the probability flow is
dx / drho = (x - D) / rho, and Euler's step of it is `ddim`; its ancestral form (of k-diffusion) is `ddpm`. On a flow
schedule (alpha = 1 - sigma) Euler's step along the velocity eps - D is `ddim` once more.

Letters: b batch, c latent channel, h row, w column; in formulas t is `now`, s is `then`, r the time before t; lambda is
log(alpha / sigma), D_t the estimate at t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ldm.diffusion.schedule import Scales
from ldm.types import Latent

LONGEST_PAST = 3
"""Steps that a stepper may look back to."""
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the latest slopes, the latest first, by how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """A step that was made.

    Attributes:
        at: scales at its start.
        noisy: the latent there.
        clean: the denoiser's estimate from it.
    """

    at: Scales
    noisy: Latent
    clean: Latent

    @property
    def noise(self) -> Latent:
        """The noise that goes with the estimate."""
        return (self.noisy - self.at.alpha * self.clean) / self.at.sigma


@dataclass(frozen=True, kw_only=True, slots=True)
class Between:
    """A time between t and s.

    Attributes:
        at: scales there.
        denoise: the denoiser there.
    """

    at: Scales
    denoise: Callable[[Latent], Latent]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """All that a stepper may look at.

    Attributes:
        noisy: the latent at time t.
        clean: the denoiser's estimate from it.
        now: scales at t.
        then: scales at s; sigma 0 at the last step.
        past: the steps before, the latest first, at most `LONGEST_PAST`.
        denoise_then: the denoiser at time s, for steppers with a second stage.
        between: lambda → the time where log(alpha / sigma) is that, for steppers with a stage inside of the step.
        draw_noise: standard normal noise for this step, for stochastic steppers.
        eta: share of the ancestral noise that DDIM adds.
    """

    noisy: Latent
    clean: Latent
    now: Scales
    then: Scales
    past: tuple[Past, ...]
    denoise_then: Callable[[Latent], Latent]
    between: Callable[[float], Between]
    draw_noise: Callable[[], Latent]
    eta: float

    @property
    def is_last(self) -> bool:
        """Whether the step goes to the clean end."""
        return not bool(self.then.sigma.any())

    @property
    def is_from_pure_noise(self) -> bool:
        """Whether there is no signal at t, where lambda is -infinity."""
        return not bool(self.now.alpha.any())

    @property
    def noise(self) -> Latent:
        """The noise that goes with the estimate."""
        return (self.noisy - self.now.alpha * self.clean) / self.now.sigma


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
    noise = step.noise
    if step.eta == 0 or step.is_last:
        return then.alpha * step.clean + then.sigma * noise
    ancestral = then.sigma / now.sigma * (now.sigma.square() - (now.alpha / then.alpha * then.sigma).square()).sqrt()
    fresh = step.eta * ancestral
    kept = (then.sigma.square() - fresh.square()).sqrt()
    return then.alpha * step.clean + kept * noise + fresh * step.draw_noise()


def plms(step: Step) -> Latent:
    """Return `ddim`'s step along a slope of up to four estimates of the noise (Liu et al. 2022, eq. 9 and 12).

    The first step calls the network twice, unless it is the last too, and takes the mean of both noises.
    """
    now, then = step.now, step.then
    if step.past:
        noises = [step.noise, *(past.noise for past in step.past)]
        noise = _weighed(noises, ADAMS_BASHFORTH[len(noises) - 1])
    elif step.is_last or step.is_from_pure_noise:
        return ddim(step)
    else:
        guess = then.alpha * step.clean + then.sigma * step.noise
        noise = 0.5 * (step.noise + (guess - then.alpha * step.denoise_then(guess)) / then.sigma)
    return then.alpha * (step.noisy - now.sigma * noise) / now.alpha + then.sigma * noise


def heun(step: Step) -> Latent:
    """Return a second-order step of the probability flow (Karras et al. 2022, algorithm 1).

    It calls the network twice, but once at the last step, and at a first one without signal, where it is `ddim`'s.
    """
    now, then = step.now, step.then
    if step.is_last:
        return step.clean
    if step.is_from_pure_noise:
        return ddim(step)
    rho_now = now.sigma / now.alpha
    rho_then = then.sigma / then.alpha
    start = step.noisy / now.alpha
    slope = (start - step.clean) / rho_now
    guess = start + (rho_then - rho_now) * slope
    slope_then = (guess - step.denoise_then(then.alpha * guess)) / rho_then
    return then.alpha * (start + (rho_then - rho_now) * 0.5 * (slope + slope_then))


def dpm_solver_pp_2s(step: Step) -> Latent:
    """Return a single step of DPM-Solver++(2S) (Lu et al. 2022, algorithm 1), with its stage in the middle of lambda.

    It calls the network twice, but once at the last step, and at a first one without signal.
    """
    if step.is_last or step.is_from_pure_noise:
        return _exponential(step, step.clean)
    middle = step.between(0.5 * float(_half_log_snr(step.now) + _half_log_snr(step.then)))
    shrink = middle.at.sigma / step.now.sigma
    inner = shrink * step.noisy + (middle.at.alpha - shrink * step.now.alpha) * step.clean
    return _exponential(step, middle.denoise(inner))


def dpm_solver_pp_2m(step: Step) -> Latent:
    """Return a multistep step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); first-order at both ends."""
    return _exponential(step, _extrapolated(step))


def dpm_solver_pp_2m_sde(step: Step) -> Latent:
    """Return a multistep step of SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix); first-order at both ends.

    With h the width of the step in lambda, it solves the reverse stochastic equation, whose noise is fresh.
    """
    now, then = step.now, step.then
    if step.is_last:
        return step.clean
    shrink = now.alpha * then.sigma / (now.sigma * then.alpha)  # e^-h; 0 where there is no signal at t
    fresh = 1 - shrink.square()
    kept = then.sigma / now.sigma * shrink
    estimate = then.alpha * fresh * _extrapolated(step)
    return kept * step.noisy + estimate + then.sigma * fresh.sqrt() * step.draw_noise()


def unipc(step: Step) -> Latent:
    """Return a step of UniPC-2 with B2(h) on D (Zhao et al. 2023, algorithms 1 and 2); first-order at both ends.

    The latent that the step before predicted is corrected first, by the estimate made from it, at no further call. The
    predictor is that of DPM-Solver++(2M).
    """
    if step.is_last:
        return step.clean
    return _exponential(step, _extrapolated(step), start=step.noisy + _correction(step))


def _correction(step: Step) -> float | Latent:
    """Return what UniPC's corrector adds to the latent at t, which was predicted from r.

    Both reach t by the exponential step from r with an estimate D_r + sum_k rho_k (D_k - D_r) / r_k of the clean latent
    on the way, r_k being where D_k lies if r is 0 and t is 1: the predictor with rho 1/2 for the step before, the
    corrector with D_t too. Its rho make the sum exact where D is a parabola in lambda (ibid., eq. 5 to 7).
    """
    if not step.past or not bool(step.past[0].at.alpha.any()):  # from pure noise the step was one to the estimate alone
        return 0.0
    last, older = step.past[0], _before(step.past)
    start = _half_log_snr(last.at)
    width = float(_half_log_snr(step.now) - start)
    growth = -math.expm1(-width)
    newest = step.clean - last.clean
    if older is None:
        return step.now.alpha * growth * 0.5 * newest
    place = float(_half_log_snr(older.at) - start) / width
    slope = (older.clean - last.clean) / place
    # Moments of the exponential step's weight over B, of first and second power.
    first = (width - growth) / (width * growth)
    second = (width - 2 * (width - growth) / width) / (width * growth)
    of_older = (first - second) / (1 - place)
    corrected = of_older * slope + (first - of_older) * newest
    return step.now.alpha * growth * (corrected - 0.5 * slope)


def _exponential(step: Step, estimate: Latent, start: Latent | None = None) -> Latent:
    """Return the step that is exact where the denoiser's estimate does not change on the way (Lu et al. 2022, eq. 9).

    Args:
        step: from where to where.
        estimate: of the clean latent.
        start: the latent at t; the step's own where not given.
    """
    shrink = step.then.sigma / step.now.sigma
    return shrink * (step.noisy if start is None else start) + (step.then.alpha - shrink * step.now.alpha) * estimate


def _extrapolated(step: Step) -> Latent:
    """Return the estimate of the clean latent in the middle of the step, on a line in lambda through the latest two."""
    if not step.past or step.is_last:
        return step.clean
    last = step.past[0]
    width_before = _half_log_snr(step.now) - _half_log_snr(last.at)
    width = _half_log_snr(step.then) - _half_log_snr(step.now)
    return step.clean + 0.5 * width / width_before * (step.clean - last.clean)


def _before(past: tuple[Past, ...]) -> Past | None:
    """Return the step before the latest, if there is one that began with some signal."""
    return past[1] if len(past) > 1 and bool(past[1].at.alpha.any()) else None


def _weighed(latents: list[Latent], weights: tuple[float, ...]) -> Latent:
    total = weights[0] * latents[0]
    for latent, weight in zip(latents[1:], weights[1:], strict=True):
        total = total + weight * latent
    return total


class StepperKind(StrEnum):
    """Which stepper a sampler takes."""

    DDPM = "ddpm"
    """A draw from the posterior: noise at every step."""
    DDIM = "ddim"
    """Deterministic, or with a share `eta` of `ddpm`'s noise."""
    PLMS = "plms"
    """`ddim` along a slope of the latest four steps (Liu et al. 2022); calls the network once more in all."""
    EULER = "euler"
    """The same step as `ddim` with eta 0, by the name it has elsewhere; on a flow schedule the usual one."""
    EULER_ANCESTRAL = "euler_ancestral"
    """The same step as `ddpm`, by the name it has elsewhere."""
    HEUN = "heun"
    """Second order, two calls a step."""
    DPM_SOLVER_PP_2S = "dpm_solver_pp_2s"
    """Second order, two calls a step."""
    DPM_SOLVER_PP_2M = "dpm_solver_pp_2m"
    """Second order from the step before, one call a step."""
    DPM_SOLVER_PP_2M_SDE = "dpm_solver_pp_2m_sde"
    """The same with noise at every step."""
    UNIPC = "unipc"
    """`dpm_solver_pp_2m` whose latents are corrected by the next step's call."""


STEPPERS: dict[StepperKind, Stepper] = {
    StepperKind.DDPM: ddpm,
    StepperKind.DDIM: ddim,
    StepperKind.PLMS: plms,
    StepperKind.EULER: ddim,
    StepperKind.EULER_ANCESTRAL: ddpm,
    StepperKind.HEUN: heun,
    StepperKind.DPM_SOLVER_PP_2S: dpm_solver_pp_2s,
    StepperKind.DPM_SOLVER_PP_2M: dpm_solver_pp_2m,
    StepperKind.DPM_SOLVER_PP_2M_SDE: dpm_solver_pp_2m_sde,
    StepperKind.UNIPC: unipc,
}


def _half_log_snr(at: Scales) -> Tensor:
    """Return lambda = log(alpha / sigma)."""
    return torch.log(at.alpha) - torch.log(at.sigma)
