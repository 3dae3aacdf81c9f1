"""Mean and deviation of an autoencoder's latents, and the one factor that scales them to unit deviation.

A latent is  z = mean + exp(logvar / 2) noise,  so over all rows and positions
    E[z] = E[mean]        Var(z) = E[mean^2] + E[exp(logvar)] - E[mean]^2        (VQ: mean is the latent, without noise)
    scale factor = 1 / sqrt(E_c[Var(z)] + Var_c(E[z]))                          (Rombach et al. 2022, appendix G)

Letters: b batch, c latent channel, m moment channel (2c for KL, c for VQ), h latent row, w latent column.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.autoencoder.regularizer import LOG_VARIANCE_RANGE, LatentKind, mode
from ldm.types import Moments

NUM_SUMS = 3
"""Rows of the sums: how many values, their sum, their sum of squares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentStatistics:
    """What latents look like over a whole split.

    Attributes:
        mean: mean of each channel.
        std: standard deviation of each channel.
        scale_factor: one over the standard deviation of all channels' values together.
        num_images: how many images they were taken of.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale_factor: float
    num_images: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


def latent_sums(moments: Moments, kind: LatentKind) -> Float[Tensor, "3 c"]:
    """Return count, sum and sum of squares of each channel's latents, in float64; they add up over batches."""
    means = mode(moments, kind).double()
    squares = means.square()
    if kind.has_log_variance:
        squares = squares + moments.chunk(2, dim=1)[1].double().clamp(*LOG_VARIANCE_RANGE).exp()
    counts = torch.full_like(means[0, :, 0, 0], means.numel() / means.shape[1])
    return torch.stack([counts, means.sum(dim=(0, 2, 3)), squares.sum(dim=(0, 2, 3))])


def statistics_of_sums(sums: Float[Tensor, "3 c"], num_images: int) -> LatentStatistics:
    """Return the statistics of what `latent_sums` summed up.

    Raises:
        ValueError: if there were no images, or latents that are not finite or all alike.
    """
    counts, firsts, seconds = sums
    mean = firsts / counts
    variance = seconds / counts - mean.square()
    whole = float((seconds / counts).mean() - mean.mean().square())
    if num_images < 1 or not bool(variance.isfinite().all()) or whole <= 0:
        raise ValueError(f"latents of {num_images} images have no finite, positive deviation: {variance.tolist()}")
    return LatentStatistics(
        mean=tuple(mean.tolist()),
        std=tuple(variance.clamp(min=0).sqrt().tolist()),
        scale_factor=whole**-0.5,
        num_images=num_images,
    )
