"""The KL regulariser: moments are mean and log-variance of a diagonal Gaussian  z = mean + exp(logvar / 2) noise.

Kingma and Welling 2014, appendix B; weighted and summed as in Rombach et al. 2022, appendix G.

Letters: b batch, c latent channel, m moment channel (2c), h latent row, w latent column.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.types import Latent, Moments

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Bounds of the log-variance, so that its exponential neither overflows nor divides by zero."""


def mode(moments: Moments) -> Latent:
    """Return the posterior's mean."""
    return moments.chunk(2, dim=1)[0]


def sample(moments: Moments, noise: Latent) -> Latent:
    """Return the draw from the posterior that standard normal `noise` gives.

    Raises:
        ValueError: if the noise has another shape than the latent.
    """
    mean, log_variance = _split(moments)
    if noise.shape != mean.shape:
        raise ValueError(f"noise must have the latent's shape {tuple(mean.shape)}, got {tuple(noise.shape)}")
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_divergence(moments: Moments) -> Float[Tensor, "b"]:
    """Return KL(posterior || standard normal) of each row, summed over channels and positions."""
    mean, log_variance = _split(moments.float() if moments.dtype.itemsize < 4 else moments)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return divergence.flatten(1).sum(dim=1)


def _split(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)
