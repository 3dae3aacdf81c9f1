"""Exponential moving averages of the weights, half-lives in samples (Karras et al. 2024, eq. 127: beta = 0.5^(b/h)).

A half-life grows with the run until it reaches its configured length, so that early averages forget the start. Several
may be kept side by side: the main one is used wherever no other is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import Config, added_later
from ldm.training.fragments import AVERAGE


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig(Config):
    """Moving averages of the weights."""

    half_life_samples: int = 500_000
    """Samples after which a weight's influence on the average has halved; 0 keeps the raw weights."""
    rampup_share: float = 0.05
    """The half-life is at most this share of the samples seen."""
    further_half_lives: tuple[int, ...] = added_later(())
    """Half-lives, in samples too, of further averages beside the main one, each validated and published as well; stage
    2 only."""

    def __post_init__(self) -> None:
        if self.half_life_samples < 0 or not 0 < self.rampup_share <= 1:
            raise ValueError(
                "ema.half_life_samples can't be negative and ema.rampup_share lies in (0, 1], "
                f"got {self.half_life_samples} and {self.rampup_share}"
            )
        if self.further_half_lives and not self.half_life_samples:
            raise ValueError(
                "ema.further_half_lives are kept beside a main one: ema.half_life_samples must be positive, "
                f"got {self.further_half_lives} beside 0"
            )
        if min(self.half_lives, default=1) < 1 or len(set(self.half_lives)) < len(self.half_lives):
            raise ValueError(
                "ema.further_half_lives must be positive, and differ from each other and from ema.half_life_samples, "
                f"got {self.further_half_lives} beside {self.half_life_samples}"
            )

    @property
    def half_lives(self) -> tuple[int, ...]:
        """Half-lives of all averages in samples, the main one's first; none where the raw weights are kept."""
        return (self.half_life_samples, *self.further_half_lives) if self.half_life_samples else ()


def decay_rate(half_life_samples: int, rampup_share: float, samples_seen: int, num_samples: int) -> float:
    """Return beta of the update after a step that ended at `samples_seen` and trained on `num_samples`."""
    half_life = min(float(half_life_samples), rampup_share * samples_seen)
    return 0.0 if half_life <= 0 else 0.5 ** (num_samples / half_life)


class Ema:
    """The averages, float32, on the device of the weights.

    Attributes:
        averages: by half-life in samples, the main one first, and by parameter name.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: EmaConfig) -> None:
        self._config = config
        self.averages = {
            half_life: {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}
            for half_life in config.half_lives
        }

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], samples_seen: int, num_samples: int) -> None:
        """Move the averages towards `weights` (all of one half-life at once, through one foreach kernel)."""
        current = {name: weight.detach().float() for name, weight in weights.items()}  # no copy of what is float32
        for half_life, averages in self.averages.items():
            beta = decay_rate(half_life, self._config.rampup_share, samples_seen, num_samples)
            torch._foreach_lerp_(list(averages.values()), [current[name] for name in averages], 1.0 - beta)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the averages by what checkpoints call them, and by parameter name."""
        main = self._config.half_life_samples
        return {
            AVERAGE if half_life == main else f"{AVERAGE}_{half_life}": averages
            for half_life, averages in self.averages.items()
        }


def averages_of(ema: Ema | None, half_life: int) -> dict[str, Tensor]:
    """Return the averages of a half-life by parameter name: the main ones for 0, nothing where none are kept.

    Raises:
        ValueError: if none of that half-life are kept, naming those that are.
    """
    kept = {} if ema is None else ema.averages
    if half_life and half_life not in kept:
        raise ValueError(f"no average of half-life {half_life} is kept; half-lives of those that are: {list(kept)}")
    return kept[half_life] if half_life else next(iter(kept.values()), {})


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
