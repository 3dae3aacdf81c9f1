"""Loss of a diffusion network: mean error against its target, weighted by the signal-to-noise ratio.

    loss_b = w(snr_b) mean_{c,h,w} (output - target)^2, or of | output - target |

Letters: b batch, c latent channel, h row, w column.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.process import Prediction, target
from ldm.diffusion.schedule import Scales
from ldm.types import Latent

MIN_SNR_GAMMA = 5.0
"""Where the weight stops growing (Hang et al. 2023, section 3.4)."""


class Weighting(StrEnum):
    """How much a row counts, by its noise level."""

    UNIFORM = "uniform"
    """Every row counts the same in the space of the prediction (Ho et al. 2020, eq. 14, for noise)."""
    MIN_SNR = "min_snr"
    """min(snr, 5) in the space of the clean latent (Hang et al. 2023)."""


class ErrorNorm(StrEnum):
    """How far an output is from its target."""

    L2 = "l2"
    """The square of the difference (Ho et al. 2020, eq. 14)."""
    L1 = "l1"
    """Its absolute value, as the paper's models of layouts, maps and masks were trained."""


def loss_weight(
    weighting: Weighting, kind: Prediction, at: Scales, gamma: float = MIN_SNR_GAMMA
) -> Float[Tensor, "..."]:
    """Return the weight of each row in the space of the prediction, in the shape of `at`.

    Squared errors of the same estimate relate as clean : noise : velocity = 1 : snr : snr + 1, so min(snr, gamma) on
    the clean error is divided by these (Hang et al. 2023, eq. 8 and appendix).
    """
    if weighting is Weighting.UNIFORM:
        return torch.ones_like(at.alpha)
    clipped = at.snr.clamp(max=gamma)
    match kind:
        case Prediction.CLEAN:
            return clipped
        case Prediction.NOISE:
            return clipped / at.snr
        case Prediction.VELOCITY:
            return clipped / (at.snr + 1)


def per_sample_loss(
    kind: Prediction,
    output: Latent,
    clean: Latent,
    noise: Latent,
    at: Scales,
    weighting: Weighting,
    norm: ErrorNorm = ErrorNorm.L2,
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
    """
    difference = output - target(kind, clean, noise, at)
    match norm:
        case ErrorNorm.L2:
            error = difference.square().mean(dim=(1, 2, 3))
        case ErrorNorm.L1:
            error = difference.abs().mean(dim=(1, 2, 3))
    return loss_weight(weighting, kind, at).flatten() * error
