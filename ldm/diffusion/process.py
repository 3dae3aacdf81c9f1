"""Gaussian corruption  z_t = alpha_t z_0 + sigma_t eps  and what a network may predict.

    noise      eps
    clean      z_0
    velocity   v = alpha_t eps - sigma_t z_0        (Salimans and Ho 2022, appendix D)
    flow       u = eps - z_0                        (Lipman et al. 2023; Liu et al. 2023)

Any one of them and z_t give the others under any schedule. Where alpha + sigma = 1, flow is dz / dsigma; where
alpha^2 + sigma^2 = 1, velocity is dz / d(angle). All functions are pure.

Letters: b batch, c latent channel, h row, w column.
"""

from __future__ import annotations

from enum import StrEnum

from ldm.diffusion.schedule import Scales
from ldm.types import Latent


class Prediction(StrEnum):
    """What the output of a network means."""

    NOISE = "noise"
    CLEAN = "clean"
    VELOCITY = "velocity"
    FLOW = "flow"


def corrupt(clean: Latent, noise: Latent, at: Scales) -> Latent:
    """Return z_t (Ho et al. 2020, eq. 4)."""
    return at.alpha * clean + at.sigma * noise


def target(kind: Prediction, clean: Latent, noise: Latent, at: Scales) -> Latent:
    """Return what a network of this kind should put out."""
    match kind:
        case Prediction.NOISE:
            return noise
        case Prediction.CLEAN:
            return clean
        case Prediction.VELOCITY:
            return at.alpha * noise - at.sigma * clean
        case Prediction.FLOW:
            return noise - clean


def clean_from(kind: Prediction, output: Latent, noisy: Latent, at: Scales) -> Latent:
    """Return the clean latent that a network's output implies; for NOISE, alpha must not be 0."""
    match kind:
        case Prediction.NOISE:
            return (noisy - at.sigma * output) / at.alpha
        case Prediction.CLEAN:
            return output
        case Prediction.VELOCITY:
            return (at.alpha * noisy - at.sigma * output) / (at.alpha.square() + at.sigma.square())
        case Prediction.FLOW:
            return (noisy - at.sigma * output) / (at.alpha + at.sigma)


def noise_from(kind: Prediction, output: Latent, noisy: Latent, at: Scales) -> Latent:
    """Return the noise that a network's output implies; for CLEAN, sigma must not be 0."""
    match kind:
        case Prediction.NOISE:
            return output
        case Prediction.CLEAN:
            return (noisy - at.alpha * output) / at.sigma
        case Prediction.VELOCITY:
            return (at.sigma * noisy + at.alpha * output) / (at.alpha.square() + at.sigma.square())
        case Prediction.FLOW:
            return (noisy + at.alpha * output) / (at.alpha + at.sigma)
