"""Loss of a diffusion network: mean error against its target, weighted by the signal-to-noise ratio.

    loss_b = w(snr_b) mean_{c,h,w} (output - target)^2, or of another norm of the difference

Letters: b batch, c latent channel, h row, w column.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.process import Prediction, target
from ldm.diffusion.schedule import Scales
from ldm.types import Latent


class Weighting(StrEnum):
    """How much a row counts, by its noise level."""

    UNIFORM = "uniform"
    """Every row counts the same in the space of the prediction (Ho et al. 2020, eq. 14, for noise)."""
    MIN_SNR = "min_snr"
    """min(snr, gamma) in the space of the clean latent (Hang et al. 2023); gamma 5 is theirs."""
    P2 = "p2"
    """1 / (1 + snr)^gamma in the space of the noise (Choi et al. 2022, eq. 9); gamma 1 is theirs."""
    EDM = "edm"
    """1 + snr in the space of the clean latent, its variance being 1 (Karras et al. 2022, section 5)."""


class ErrorNorm(StrEnum):
    """How far an output is from its target."""

    L2 = "l2"
    """The square of the difference (Ho et al. 2020, eq. 14)."""
    L1 = "l1"
    """Its absolute value, as the paper's models of layouts, maps and masks were trained."""
    HUBER = "huber"
    """Half the square of what is below 1, its absolute value less a half above (Huber 1964)."""


def loss_weight(weighting: Weighting, kind: Prediction, at: Scales, gamma: float | None = None) -> Float[Tensor, "..."]:
    """Return the weight of each row in the space of the prediction, in the shape of `at`.

    Squared errors of the same estimate relate as clean : noise : velocity : flow = 1 : snr : (alpha^2 + sigma^2)^2 /
    sigma^2 : (sqrt(snr) + 1)^2, so a weight on the clean error is divided by these (Hang et al. 2023, eq. 8 and
    appendix, where the third is snr + 1).

    Raises:
        ValueError: if min_snr or p2 has no positive gamma.
    """
    if weighting in (Weighting.MIN_SNR, Weighting.P2) and not (gamma and gamma > 0):
        raise ValueError(f"weighting {weighting.value} needs a positive gamma, got {gamma}")
    gamma = gamma or 0.0
    snr = at.snr
    match weighting:
        case Weighting.UNIFORM:
            return torch.ones_like(at.alpha)
        case Weighting.MIN_SNR:
            clean, of_noise = snr.clamp(max=gamma), (gamma / snr).clamp(max=1.0)
        case Weighting.P2:
            of_noise = (1 + snr) ** -gamma
            clean = snr * of_noise
        case Weighting.EDM:
            clean, of_noise = 1 + snr, 1 + 1 / snr
    match kind:
        case Prediction.CLEAN:
            return clean
        case Prediction.NOISE:
            return of_noise
        case Prediction.VELOCITY:
            return clean * (at.sigma / (at.alpha.square() + at.sigma.square())).square()
        case Prediction.FLOW:
            return clean / (snr.sqrt() + 1).square()


def per_sample_loss(
    kind: Prediction,
    output: Latent,
    clean: Latent,
    noise: Latent,
    at: Scales,
    weighting: Weighting = Weighting.UNIFORM,
    norm: ErrorNorm = ErrorNorm.L2,
    gamma: float | None = None,
) -> Float[Tensor, " b"]:
    """Return the weighted mean error of each row.

    Args:
        kind: what the output means.
        output: the network's output at corrupt(clean, noise, at).
        clean: scaled latents.
        noise: the noise they were corrupted with.
        at: the scales of each row, shape (b, 1, 1, 1).
        weighting: how much each row counts.
        norm: how far the output is from its target.
        gamma: number of the weighting, positive; min_snr and p2 have one.
    """
    difference = output - target(kind, clean, noise, at)
    match norm:
        case ErrorNorm.L2:
            error = difference.square().mean(dim=(1, 2, 3))
        case ErrorNorm.L1:
            error = difference.abs().mean(dim=(1, 2, 3))
        case ErrorNorm.HUBER:
            error = F.huber_loss(difference, torch.zeros_like(difference), reduction="none").mean(dim=(1, 2, 3))
    return loss_weight(weighting, kind, at, gamma).flatten() * error
