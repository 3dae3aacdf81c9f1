"""What holds a latent space together: a KL term on a posterior's moments, or a codebook (vector quantisation).

    KL    moments are mean and log-variance of a diagonal Gaussian    z = mean + exp(logvar / 2) noise
    VQ    moments are the latent itself, before it is quantised; quantising belongs to the decoder

Kingma and Welling 2014, appendix B; weighted and summed as in Rombach et al. 2022, appendix G. Codebooks: van den Oord
et al. 2017.

Letters: b batch, c latent channel, m moment channel (2c for KL, c for VQ), h latent row, w latent column.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.types import Latent, Moments

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Bounds of the log-variance, so that its exponential neither overflows nor divides by zero."""


class LatentKind(StrEnum):
    """What the numbers that an encoder gives are, as a cache's manifest names it."""

    KL_MOMENTS = "kl_moments"
    """Mean and log-variance of a posterior, side by side."""
    VQ_LATENTS = "vq_latents"
    """Latents before quantisation."""

    @property
    def has_log_variance(self) -> bool:
        """Whether half of the channels are log-variances, so that a latent is drawn with noise."""
        return self is LatentKind.KL_MOMENTS


class Regularizer(StrEnum):
    """How a latent space is kept from growing without bounds (Rombach et al. 2022, section 3.1)."""

    KL = "kl"
    """A slight penalty towards a standard normal posterior."""
    VQ = "vq"
    """A codebook, whose nearest vectors the decoder sees."""

    @property
    def latent_kind(self) -> LatentKind:
        """What such an encoder gives."""
        match self:
            case Regularizer.KL:
                return LatentKind.KL_MOMENTS
            case Regularizer.VQ:
                return LatentKind.VQ_LATENTS


def mode(moments: Moments, kind: LatentKind = LatentKind.KL_MOMENTS) -> Latent:
    """Return the likeliest latent: the posterior's mean, or for VQ the moments themselves."""
    match kind:
        case LatentKind.KL_MOMENTS:
            return moments.chunk(2, dim=1)[0]
        case LatentKind.VQ_LATENTS:
            return moments


def sample(moments: Moments, noise: Latent | None, kind: LatentKind = LatentKind.KL_MOMENTS) -> Latent:
    """Return the draw from the posterior that standard normal `noise` gives; VQ has no posterior and takes no noise.

    Raises:
        ValueError: if the noise has another shape than the latent, is missing, or is there for VQ.
    """
    if not kind.has_log_variance:
        if noise is not None:
            raise ValueError(f"latents of kind {kind.value} are not drawn: there is no noise, got {tuple(noise.shape)}")
        return moments
    mean, log_variance = _split(moments)
    if noise is None or noise.shape != mean.shape:
        found = None if noise is None else tuple(noise.shape)
        raise ValueError(f"noise must have the latent's shape {tuple(mean.shape)}, got {found}")
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_divergence(moments: Moments) -> Float[Tensor, "b"]:
    """Return KL(posterior || standard normal) of each row, summed over channels and positions."""
    mean, log_variance = _split(moments.float() if moments.dtype.itemsize < 4 else moments)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return divergence.flatten(1).sum(dim=1)


def _split(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)
