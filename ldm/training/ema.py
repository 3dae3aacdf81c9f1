"""Exponential moving average of the weights, its half-life in samples (Karras et al. 2024, eq. 127: beta = 0.5^(b/h)).

The half-life grows with the run until it reaches its configured length, so that early averages forget the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig(Config):
    """Moving average of the weights."""

    half_life_samples: int = 500_000
    """Samples after which a weight's influence on the average has halved; 0 keeps the raw weights."""
    rampup_share: float = 0.05
    """The half-life is at most this share of the samples seen."""

    def __post_init__(self) -> None:
        if self.half_life_samples < 0 or not 0 < self.rampup_share <= 1:
            raise ValueError(
                "ema.half_life_samples can't be negative and ema.rampup_share lies in (0, 1], "
                f"got {self.half_life_samples} and {self.rampup_share}"
            )


def decay_rate(config: EmaConfig, samples_seen: int, num_samples: int) -> float:
    """Return beta of the update after a step that ended at `samples_seen` and trained on `num_samples`."""
    half_life = min(float(config.half_life_samples), config.rampup_share * samples_seen)
    return 0.0 if half_life <= 0 else 0.5 ** (num_samples / half_life)


class Ema:
    """The averages, float32, on the device of the weights."""

    def __init__(self, weights: Mapping[str, Tensor], config: EmaConfig) -> None:
        self.config = config
        self.names = list(weights)
        self.averages = [weight.detach().float().clone() for weight in weights.values()]

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], samples_seen: int, num_samples: int) -> None:
        """Move the averages towards `weights` (all at once, through one foreach kernel)."""
        beta = decay_rate(self.config, samples_seen, num_samples)
        current = [weights[name].detach().float() for name in self.names]
        torch._foreach_lerp_(self.averages, current, 1.0 - beta)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved averages of the same names and shapes."""
        if list(state) != self.names:
            raise ValueError("the saved averages belong to another network: their parameter names differ")
        for average, saved in zip(self.averages, state.values(), strict=True):
            average.copy_(saved)


@contextmanager
def swapped_in(weights: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the block with the averages copied into `weights`, then put the trained values back."""
    kept = {name: weights[name].detach().clone() for name in averages}
    try:
        _copy_into(weights, averages)
        yield
    finally:
        _copy_into(weights, kept)


@torch.no_grad()
def _copy_into(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        weights[name].copy_(value)
