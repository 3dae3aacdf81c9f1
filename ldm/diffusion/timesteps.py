"""Which timesteps a network is trained at: draws of a row's position in the training sequence, spread by a law.

    u_p in [0, 1) → quantile of the law → whole timestep        p the row's position

Independent: u_p from the counter-based generator. Stratified: u_p = frac(u_0 + p (sqrt 5 - 1) / 2), a golden-ratio
sequence, of which any n neighbours lie nearly 1 / n apart: batches of every size, over any number of processes, are
spread evenly, and the loss varies less from batch to batch (Kingma et al. 2021, appendix I.1, for one batch size).

Letters: b batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import Config
from ldm.diffusion.schedule import Schedule
from ldm.randomness import Draw, uniform

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""(sqrt 5 - 1) / 2 as a fraction of 2^64."""


class TimestepLaw(StrEnum):
    """How training timesteps are spread."""

    UNIFORM = "uniform"
    """Each as often as the others (Ho et al. 2020)."""
    LOGIT_NORMAL = "logit_normal"
    """t / T is a logistic function of a normal draw (Esser et al. 2024, section 3.1): the middle oftener."""
    LOG_NORMAL = "log_normal"
    """log(sigma / alpha) is a normal draw (Karras et al. 2022, table 1): for schedule edm of mean -0.507 and deviation
    1.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepConfig(Config):
    """How training timesteps are drawn."""

    law: TimestepLaw = TimestepLaw.UNIFORM
    """uniform, logit_normal (more in the middle) or log_normal (EDM's)."""
    mean: float = 0.0
    """Mean of the normal draw; not used by uniform."""
    std: float = 1.0
    """Deviation of the normal draw; not used by uniform."""
    is_stratified: bool = False
    """Whether the rows of a batch share the range evenly instead of drawing each by itself."""

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"timesteps.std must be positive, got {self.std}")
        if self.law is TimestepLaw.UNIFORM and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(f"timesteps.mean and std are a normal draw's, uniform has none: {self.mean}, {self.std}")


def timesteps(config: TimestepConfig, schedule: Schedule, seed: int, positions: Sequence[int]) -> Float[Tensor, " b"]:
    """Return the whole timestep of each position, float32 on the CPU."""
    share = _golden_shares(seed, positions) if config.is_stratified else uniform(seed, Draw.TIMESTEP, positions)
    last = schedule.num_timesteps - 1
    if config.law is TimestepLaw.UNIFORM:
        return (share * schedule.num_timesteps).floor().float()
    normal = config.mean + config.std * torch.special.ndtri(share.clamp(min=2.0**-54))
    if config.law is TimestepLaw.LOGIT_NORMAL:
        return (normal.sigmoid() * schedule.num_timesteps).floor().clamp(max=last).float()
    return schedule.timestep_at(-2 * normal).round().float()


def _golden_shares(seed: int, positions: Sequence[int]) -> Float[Tensor, " b"]:
    """Return u_p, float64; in whole numbers, so that far positions are as exact as near ones."""
    first = np.uint64(int(float(uniform(seed, Draw.TIMESTEP, [0])) * 2**53)) << np.uint64(11)
    turned = first + np.fromiter(positions, np.uint64) * GOLDEN  # modulo 2^64
    return torch.from_numpy((turned >> np.uint64(11)).astype(np.float64) * 2.0**-53)
