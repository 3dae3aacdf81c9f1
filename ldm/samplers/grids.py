"""Time grids: at which timesteps a sampler calls the network.

Every grid has exactly `num_steps` falling timesteps and then the clean end, whether or not num_steps divides the number
of timesteps a network was trained with.

Letters: k number of steps + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.schedule import CLEAN_TIMESTEP, Schedule

KARRAS_RHO = 7.0


class Grid(StrEnum):
    """How the timesteps of a sampler are spread."""

    TRAILING = "trailing"
    """Evenly, starting at the last timestep, where a latent is noisiest (Lin et al. 2024, table 2)."""
    LEADING = "leading"
    """Evenly, ending at timestep 0 (Song et al. 2021, appendix D.2); starts below the last timestep."""
    LEADING_TO_ONE = "leading_to_one"
    """As leading, each a timestep later, as Stable Diffusion's own samplers have it (diffusers' `leading` with
    `steps_offset` 1). With as many steps as timesteps it is leading."""
    LINSPACE = "linspace"
    """Evenly from the last timestep to 0, both included (Nichol and Dhariwal 2021)."""
    QUADRATIC = "quadratic"
    """As squares from the last timestep to 0, denser towards the clean end, fractional timesteps (Song et al. 2021,
    appendix D.2)."""
    KARRAS = "karras"
    """Evenly in the seventh root of sigma / alpha, fractional timesteps (Karras et al. 2022, eq. 5)."""
    LOG_SNR = "log_snr"
    """Evenly in log signal-to-noise ratio, fractional timesteps (Lu et al. 2022)."""


def time_grid(grid: Grid, schedule: Schedule, num_steps: int) -> Float[Tensor, " k"]:
    """Return num_steps falling timesteps and the clean end, float64.

    Raises:
        ValueError: if num_steps is not between 1 and the schedule's number of timesteps, or the grid leaves out a last
            timestep without signal, where pure noise belongs.
    """
    total = schedule.num_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie between 1 and the schedule's {total} timesteps, got {num_steps}")
    if grid in (Grid.LEADING, Grid.LEADING_TO_ONE) and schedule.config.ends_without_signal:
        raise ValueError(
            f"grid {grid.value} starts below the last timestep, and this schedule's pure noise is there alone"
        )
    steps = torch.arange(num_steps, dtype=torch.float64)
    match grid:
        case Grid.TRAILING:
            times = torch.round(total - steps * total / num_steps) - 1
        case Grid.LEADING:
            times = torch.floor(steps * total / num_steps).flip(0)
        case Grid.LEADING_TO_ONE:
            times = torch.floor(steps * total / num_steps).flip(0) + (num_steps < total)
        case Grid.LINSPACE:
            times = torch.round(total - 1 - steps * (total - 1) / max(num_steps - 1, 1))
        case Grid.QUADRATIC:
            times = (total - 1) * (1 - steps / max(num_steps - 1, 1)).square()
        case Grid.KARRAS:
            times = karras_times(schedule, num_steps)
        case Grid.LOG_SNR:
            times = log_snr_times(schedule, num_steps)
    return torch.cat([times, torch.tensor([CLEAN_TIMESTEP], dtype=torch.float64)])


def log_snr_times(schedule: Schedule, num_times: int) -> Float[Tensor, " k"]:
    """Return falling times from the last timestep to 0, evenly spaced in log signal-to-noise ratio."""
    return _times_between(schedule, num_times, torch.lerp)


def karras_times(schedule: Schedule, num_times: int) -> Float[Tensor, " k"]:
    """Return falling times from the last timestep to 0, evenly spaced in the seventh root of sigma / alpha."""

    def spaced(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
        first, last = (torch.exp(-0.5 * log_snr / KARRAS_RHO) for log_snr in (start, end))
        return -2 * KARRAS_RHO * torch.log(torch.lerp(first, last, share))

    return _times_between(schedule, num_times, spaced)


def _times_between(
    schedule: Schedule, num_times: int, spaced: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Float[Tensor, " k"]:
    """Return falling times from the last timestep to 0, at the log signal-to-noise ratios that `spaced` finds.

    A last timestep without signal lies infinitely far away: it comes first, and the others begin at the one before it.
    """
    is_apart = schedule.config.ends_without_signal
    noisiest, num_spaced = (-2, num_times - 1) if is_apart else (-1, num_times)
    shares = torch.linspace(0, 1, num_spaced, dtype=torch.float64)
    times = schedule.timestep_at(spaced(schedule.log_snr[noisiest], schedule.log_snr[0], shares))
    return torch.cat([torch.tensor([schedule.num_timesteps - 1.0], dtype=torch.float64), times]) if is_apart else times
