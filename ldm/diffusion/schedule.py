"""Noise schedule of a diffusion: timestep → (alpha, sigma).

    z_t = alpha_t z_0 + sigma_t eps
    variance-preserving   alpha_t^2 + sigma_t^2 = 1        alpha_t^2 = prod_{i<=t} (1 - beta_i)
    flow                  alpha_t + sigma_t = 1

(Ho et al. 2020, eq. 4; Liu et al. 2023.) A network is trained at whole timesteps 0 ... T-1. Between them the log
signal-to-noise ratio log(alpha^2 / sigma^2) is linear in t, so solvers may stop anywhere.
Any negative timestep is the clean end: alpha 1, sigma 0. The last timestep may be pure noise: alpha 0.

Letters: b batch, n number of timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ldm.config import Config, added_later

CLEAN_TIMESTEP = -1.0
"""The timestep of clean data: what the last step of every sampler goes to."""
COSINE_OFFSET = 0.008
MAX_COSINE_BETA = 0.999
EDM_SIGMAS = (0.004, 160.0)
EDM_RHO = 7.0
LEAST_LOG_SNR = -40.0
"""Where a last timestep without signal is taken to lie when times before it are looked for: alpha 2e-9."""


class ScheduleKind(StrEnum):
    """How the variances beta_t of the forward steps grow."""

    SCALED_LINEAR = "scaled_linear"
    """sqrt(beta) is linear in t (Rombach et al. 2022; their code calls it "linear")."""
    LINEAR = "linear"
    """beta is linear in t (Ho et al. 2020)."""
    COSINE = "cosine"
    """alpha^2 is a squared cosine (Nichol and Dhariwal 2021, eq. 17); start and end are not used."""
    EDM = "edm"
    """sigma / alpha grows from 0.004 to 160 by its seventh root, on the variance-preserving path (Karras et al. 2022,
    eq. 5: theirs are for data of deviation 0.5, scaled latents have 1, so every sigma is twice as large). The target
    of their network is the negative velocity, and their weight is the same for all sigmas there: prediction velocity,
    weighting uniform and timesteps log_normal of mean -0.507 (theirs is -1.2, plus log 2) and deviation 1.2 are their
    training. start and end are not used."""
    FLOW = "flow"
    """sigma grows evenly from 1 / T to 1 and alpha is the rest (Liu et al. 2023); start and end are not used."""


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
    has_zero_terminal_snr: bool = added_later(False)
    """Whether the schedule is stretched until its last timestep is pure noise (Lin et al. 2024, algorithm 1); flow's
    always is."""
    shift: float = added_later(1.0)
    """How far flow's times move towards noise: sigma becomes shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024,
    eq. 23); for four times the pixels of a schedule that is right, 2."""

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end < 1:
            raise ValueError(f"schedule variances must satisfy 0 < start < end < 1, got {self.start} and {self.end}")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {self.num_timesteps}")
        if self.shift <= 0 or (self.shift != 1 and self.kind is not ScheduleKind.FLOW):
            raise ValueError(f"shift must be positive and is flow's, got {self.shift} for {self.kind.value}")
        if self.has_zero_terminal_snr and self.kind in (ScheduleKind.EDM, ScheduleKind.FLOW):
            raise ValueError(f"has_zero_terminal_snr stretches a schedule of betas, got {self.kind.value}")

    @property
    def ends_without_signal(self) -> bool:
        """Whether alpha is 0 at the last timestep, where the noise tells nothing of the clean latent."""
        return self.has_zero_terminal_snr or self.kind is ScheduleKind.FLOW


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
        log_snr: log(alpha_t^2 / sigma_t^2), shape (n,), float64, strictly decreasing; the last may be -infinity.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.log_snr = log_snr_table(config)
        finite = self.log_snr.clamp(min=LEAST_LOG_SNR) if config.ends_without_signal else self.log_snr
        self._finite = {finite.device: finite}
        self._known = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Schedule], tuple[ScheduleConfig]]:
        """A copy and a pickle are made anew: what is known of other tensors doesn't travel."""
        return Schedule, (self.config,)

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
        known: Scales | None = self._known.get(timestep)
        if known is not None:
            return known
        if timestep.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"timesteps must be float32 or float64, got {timestep.dtype}")
        at = self._scales_of(self.log_snr_at(timestep)[:, None, None, None])
        return Scales(at.alpha.to(timestep.dtype), at.sigma.to(timestep.dtype))

    def scales_at(self, timestep: float) -> Scales:
        """Return alpha and sigma of one time, shape (), float64 on the CPU: in products they act as plain numbers."""
        (found,) = self.scales_along([timestep])
        return found

    def scales_along(self, timesteps: Sequence[float]) -> list[Scales]:
        """Return those of each of several times."""
        if beyond := [timestep for timestep in timesteps if timestep >= self.num_timesteps]:
            raise ValueError(f"timestep {beyond[0]} lies beyond the schedule's {self.num_timesteps}")
        whole = self._scales_of(self.log_snr_at(torch.tensor(timesteps, dtype=torch.float64)))
        return [Scales(alpha, sigma) for alpha, sigma in zip(whole.alpha, whole.sigma, strict=True)]

    def rows_along(self, timesteps: Sequence[float], like: Float[Tensor, "b ..."]) -> list[Float[Tensor, " b"]]:
        """Return each of several times for the rows of a tensor; `scales` has computed all of theirs at once.

        It knows them again as long as they are, as these very tensors.
        """
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        times = torch.tensor(timesteps, dtype=dtype, device=like.device)[:, None].repeat(1, len(like))
        at = self.scales(times.flatten())
        parts = [part.reshape(*times.shape, 1, 1, 1).unbind() for part in (at.alpha, at.sigma)]
        rows = list(times.unbind())
        for row, alpha, sigma in zip(rows, *parts, strict=True):
            self._known[row] = Scales(alpha, sigma)
        return rows

    def log_snr_at(self, timestep: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return log(alpha^2 / sigma^2) at each time, float64, linear between whole timesteps; infinite where clean."""
        time = timestep.double()
        table = self._finite_on(time.device)
        lower = time.floor().long().clamp(0, self.num_timesteps - 2)
        between = torch.lerp(table[lower], table[lower + 1], time - lower)
        if self.config.ends_without_signal:
            between = torch.where(time >= self.num_timesteps - 1, -math.inf, between)
        return torch.where(time < 0, math.inf, between)

    def timestep_at(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the time of each log signal-to-noise ratio, float64: the inverse of `log_snr_at` on [0, n - 1]."""
        rising = -self._finite_on(log_snr.device)
        wanted = -log_snr.double().clamp(min=LEAST_LOG_SNR)
        lower = (torch.searchsorted(rising, wanted, right=True) - 1).clamp(0, self.num_timesteps - 2)
        share = (wanted - rising[lower]) / (rising[lower + 1] - rising[lower])
        return (lower + share).clamp(0, self.num_timesteps - 1)

    def _finite_on(self, device: torch.device) -> Float[Tensor, " n"]:
        """Return the table without infinities; a device is sent it once."""
        if device not in self._finite:
            self._finite[device] = self._finite[self.log_snr.device].to(device)
        return self._finite[device]

    def _scales_of(self, log_snr: Float[Tensor, "..."]) -> Scales:
        if self.config.kind is ScheduleKind.FLOW:
            return Scales((0.5 * log_snr).sigmoid(), (-0.5 * log_snr).sigmoid())
        return Scales(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


def log_snr_table(config: ScheduleConfig) -> Float[Tensor, " n"]:
    """Return log(alpha^2 / sigma^2) of each whole timestep, float64."""
    steps = torch.arange(config.num_timesteps, dtype=torch.float64)
    match config.kind:
        case ScheduleKind.EDM:
            low, high = (sigma ** (1 / EDM_RHO) for sigma in EDM_SIGMAS)
            return -2 * EDM_RHO * torch.log(low + steps / (config.num_timesteps - 1) * (high - low))
        case ScheduleKind.FLOW:
            even = (steps + 1) / config.num_timesteps
            sigma = config.shift * even / (1 + (config.shift - 1) * even)
            return -2 * torch.logit(sigma)
        case _:
            cumulated = torch.cumprod(1 - betas(config), dim=0)
            if not config.has_zero_terminal_snr:
                return torch.logit(cumulated)
            alpha = cumulated.sqrt()
            stretched = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            return torch.logit(stretched.square())


def betas(config: ScheduleConfig) -> Float[Tensor, " n"]:
    """Return the variances of the forward steps of a schedule that is made of them, float64, before any stretching.

    Raises:
        ValueError: for schedules that are not.
    """
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
        case _:
            raise ValueError(f"schedule {config.kind.value} is not made of betas")
