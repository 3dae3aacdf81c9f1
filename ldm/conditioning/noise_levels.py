"""Noise over the small pictures of super-resolution, and how much of it, told (Ho et al. 2022, "Cascaded", 4.2).

    x_k = sqrt(abar_k) x + sqrt(1 - abar_k) eps        abar_k = product over j <= k of (1 - beta_j)

with the linear betas of Ho et al. 2020. A network that has seen all levels up to some K takes small pictures that are
worse than those of its training; at a higher level it invents more and keeps less.

Letters: b batch, k channel, h row, w column.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from ldm.diffusion.schedule import ScheduleConfig, ScheduleKind, betas
from ldm.types import NoiseLevels, SpatialCondition

SCHEDULE = ScheduleConfig(kind=ScheduleKind.LINEAR, start=1e-4, end=0.02)
MOST_LEVELS = SCHEDULE.num_timesteps


def with_noise(small: SpatialCondition, level: NoiseLevels, noise: Float[torch.Tensor, "b k h w"]) -> SpatialCondition:
    """Return small pictures under so much noise.

    Args:
        small: as they lie beside the latent, about in [-1, 1].
        level: of each row, from 0 on: hardly any.
        noise: standard normal.
    """
    kept = (1 - betas(SCHEDULE)).cumprod(0)[level].reshape(-1, 1, 1, 1)
    return (kept.sqrt() * small + (1 - kept).sqrt() * noise).to(small.dtype)
