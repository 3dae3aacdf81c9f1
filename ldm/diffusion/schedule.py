"""Noise schedule of a variance-preserving diffusion: timestep → (alpha, sigma).

    z_t = alpha_t z_0 + sigma_t eps        alpha_t^2 + sigma_t^2 = 1        alpha_t^2 = prod_{i<=t} (1 - beta_i)

(Ho et al. 2020, eq. 4.) A network is trained at whole timesteps 0 ... T-1. Between them the log signal-to-noise ratio
log(alpha^2 / sigma^2) is linear in t, so solvers may stop anywhere.
Any negative timestep is the clean end: alpha 1, sigma 0.

Letters: b batch, n number of timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import Config

CLEAN_TIMESTEP = -1.0
"""The timestep of clean data: what the last step of every sampler goes to."""
COSINE_OFFSET = 0.008
MAX_COSINE_BETA = 0.999


class ScheduleKind(StrEnum):
    """How the variances beta_t of the forward steps grow."""

    SCALED_LINEAR = "scaled_linear"
    """sqrt(beta) is linear in t (Rombach et al. 2022; their code calls it "linear")."""
    LINEAR = "linear"
    """beta is linear in t (Ho et al. 2020)."""
    COSINE = "cosine"
    """alpha^2 is a squared cosine (Nichol and Dhariwal 2021, eq. 17); start and end are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Config):
    """Which noise schedule a network is trained with."""

    kind: ScheduleKind = ScheduleKind.SCALED_LINEAR
    """How the variances of the forward steps grow."""
    start: float = 0.0015
    """Variance of the first forward step."""
    end: float = 0.0195
    """Variance of the last forward step."""
    num_timesteps: int = 1000
    """Number of forward steps."""

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end < 1:
            raise ValueError(f"schedule variances must satisfy 0 < start < end < 1, got {self.start} and {self.end}")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {self.num_timesteps}")


@dataclass(frozen=True, slots=True)
class Scales:
    """How much signal and how much noise a noisy latent holds.

    Attributes:
        alpha: scale of the clean latent, shape (b, 1, 1, 1), or () where a whole batch is at one time.
        sigma: scale of the noise, same shape.
    """

    alpha: Float[Tensor, "..."]
    sigma: Float[Tensor, "..."]

    @property
    def snr(self) -> Float[Tensor, "..."]:
        """The signal-to-noise ratio alpha^2 / sigma^2 (Kingma et al. 2021, eq. 2); infinite at the clean end."""
        return (self.alpha / self.sigma).square()


class Schedule:
    """A table of log signal-to-noise ratios, one for each timestep, in float64.

    Attributes:
        config: what the table was made from.
        betas: variances of the forward steps, shape (n,), float64.
        alphas_cumprod: alpha_t^2, shape (n,), float64.
        log_snr: log(alpha_t^2 / sigma_t^2), shape (n,), float64, strictly decreasing.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.betas = betas(config)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.log_snr = torch.logit(self.alphas_cumprod)

    @property
    def num_timesteps(self) -> int:
        """The number of whole timesteps."""
        return self.config.num_timesteps

    def scales(self, timestep: Float[Tensor, " b"]) -> Scales:
        """Return alpha and sigma of each row, shape (b, 1, 1, 1), in the dtype and on the device of `timestep`.

        Args:
            timestep: float32 or float64, in [0, num_timesteps); negative means clean. Half precision can't tell
                neighbouring timesteps apart and is refused.
        """
        if timestep.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"timesteps must be float32 or float64, got {timestep.dtype}")
        log_snr = self.log_snr_at(timestep)[:, None, None, None]
        alpha = log_snr.sigmoid().sqrt()
        sigma = (-log_snr).sigmoid().sqrt()
        return Scales(alpha.to(timestep.dtype), sigma.to(timestep.dtype))

    def scales_at(self, timestep: float) -> Scales:
        """Return alpha and sigma of one time, shape (), float64 on the CPU: in products they act as plain numbers."""
        if timestep >= self.num_timesteps:
            raise ValueError(f"timestep {timestep} lies beyond the schedule's {self.num_timesteps}")
        log_snr = self.log_snr_at(torch.tensor([timestep], dtype=torch.float64))[0]
        return Scales(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())

    def log_snr_at(self, timestep: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return log(alpha^2 / sigma^2) at each time, float64, linear between whole timesteps; infinite where clean."""
        time = timestep.double()
        table = self.log_snr.to(time.device)
        lower = time.floor().long().clamp(0, self.num_timesteps - 2)
        between = torch.lerp(table[lower], table[lower + 1], time - lower)
        return torch.where(time < 0, math.inf, between)

    def timestep_at(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the time of each log signal-to-noise ratio, float64: the inverse of `log_snr_at` on [0, n - 1]."""
        rising = -self.log_snr.to(log_snr.device)
        wanted = -log_snr.double()
        lower = (torch.searchsorted(rising, wanted, right=True) - 1).clamp(0, self.num_timesteps - 2)
        share = (wanted - rising[lower]) / (rising[lower + 1] - rising[lower])
        return (lower + share).clamp(0, self.num_timesteps - 1)


def betas(config: ScheduleConfig) -> Float[Tensor, " n"]:
    """Return the variances of the forward steps, float64."""
    num = config.num_timesteps
    match config.kind:
        case ScheduleKind.SCALED_LINEAR:
            return torch.linspace(math.sqrt(config.start), math.sqrt(config.end), num, dtype=torch.float64).square()
        case ScheduleKind.LINEAR:
            return torch.linspace(config.start, config.end, num, dtype=torch.float64)
        case ScheduleKind.COSINE:
            progress = torch.arange(num + 1, dtype=torch.float64) / num
            signal = torch.cos((progress + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
            return (1 - signal[1:] / signal[:-1]).clamp(max=MAX_COSINE_BETA)
