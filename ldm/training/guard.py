"""A guard over an adversarial training: what rests while the discriminator wins, and when that begins and ends.

    average <- b average + (1 - b) measured        b = 0.5^(samples of the step / half-life)
    begins where the average is above `begins_above`, ends where it falls below `ends_below`

The measure is the gap between mean logits or the discriminator's accuracy over the global batch, so every process
decides alike; average and decision are buffers, so a resumed run decides as the unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from ldm.config import Config


class GuardMeasure(StrEnum):
    """What shows that the discriminator wins."""

    NONE = "none"
    """There is no guard."""
    LOGIT_GAP = "logit_gap"
    """Mean logit of real patches minus that of reconstructed ones; a hinge loss asks for 2."""
    ACCURACY = "accuracy"
    """Share of patches that are taken for what they are; 0.5 is a guess, 1 a discriminator that knows."""


class GuardedSide(StrEnum):
    """What rests meanwhile."""

    GENERATOR = "generator"
    """The adversarial term of the autoencoder is lowered; the discriminator learns on and may win for good."""
    DISCRIMINATOR = "discriminator"
    """The discriminator stops learning until the autoencoder has caught up with it."""
    BOTH = "both"
    """Both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig(Config):
    """What is done while the discriminator wins."""

    measure: GuardMeasure = GuardMeasure.NONE
    """none, logit_gap or accuracy."""
    begins_above: float = 8.0
    """Moving average of the measure above which the guard begins; for accuracy below 1, such as 0.95.

    A hinge loss asks for a gap of 2, and small trainings that went well were seen at 3 to 6: a lower bound begins soon.
    """
    ends_below: float = 6.0
    """Moving average below which it ends; not above `begins_above`. One that is never reached again never ends it."""
    half_life_samples: int = 1_000
    """Half-life of the moving average."""
    side: GuardedSide = GuardedSide.DISCRIMINATOR
    """generator: the adversarial term is lowered. discriminator: it stops learning. both: both."""
    share: float = 0.0
    """What is left of the adversarial term under the guard; 0 pauses it. Not for side discriminator."""

    def __post_init__(self) -> None:
        if self.ends_below > self.begins_above:
            raise ValueError(
                f"guard.ends_below can't be above guard.begins_above, got {self.ends_below} and {self.begins_above}"
            )
        if self.measure is GuardMeasure.ACCURACY and not 0.0 < self.ends_below <= self.begins_above < 1.0:
            raise ValueError(
                "an accuracy lies between 0 and 1: guard.ends_below and guard.begins_above must, "
                f"got {self.ends_below} and {self.begins_above}"
            )
        if self.half_life_samples < 1 or not 0.0 <= self.share < 1.0:
            raise ValueError(
                "guard.half_life_samples must be at least 1 and guard.share in [0, 1), "
                f"got {self.half_life_samples} and {self.share}"
            )


class Guard(nn.Module):
    """The moving average of the measure and whether the guard is up.

    Args:
        config: the bounds; its measure is not `none`.
        notice: called with a sentence where the guard begins or ends.
    """

    average: Tensor
    is_up: Tensor

    def __init__(self, config: GuardConfig, notice: Callable[[str], None]) -> None:
        super().__init__()
        self.config = config
        self._notice = notice
        undecided = 0.5 if config.measure is GuardMeasure.ACCURACY else 0.0
        self.register_buffer("average", torch.tensor(undecided, dtype=torch.float64))
        self.register_buffer("is_up", torch.tensor(False))

    @property
    def share(self) -> float:
        """What the adversarial term is multiplied with now."""
        is_lowered = bool(self.is_up) and self.config.side is not GuardedSide.DISCRIMINATOR
        return self.config.share if is_lowered else 1.0

    @property
    def is_learning(self) -> bool:
        """Whether the discriminator learns now."""
        return not bool(self.is_up) or self.config.side is GuardedSide.GENERATOR

    def update(self, measured: Tensor, clock: tuple[int, int]) -> None:
        """Take in what a step measured over the global batch.

        Args:
            measured: the gap or the accuracy, the same on every process.
            clock: (samples seen at the end of the step, samples of the step).
        """
        seen, num_samples = clock
        self.average.lerp_(measured.detach().double(), 1.0 - 0.5 ** (num_samples / self.config.half_life_samples))
        average, was_up = float(self.average), bool(self.is_up)
        is_up = average >= self.config.ends_below if was_up else average > self.config.begins_above
        self.is_up.fill_(is_up)
        name = self.config.measure.value.replace("_", " ")
        if is_up and not was_up:
            self._notice(f"the discriminator wins ({name} {average:.2f}) at {seen:,} samples: {self._consequence()}")
        if was_up and not is_up:
            self._notice(f"the discriminator no longer wins ({name} {average:.2f}) at {seen:,} samples: as before")

    def _consequence(self) -> str:
        match self.config.side:
            case GuardedSide.GENERATOR:
                return f"the adversarial term counts {self.config.share:g} times"
            case GuardedSide.DISCRIMINATOR:
                return "it stops learning"
            case GuardedSide.BOTH:
                return f"it stops learning and the adversarial term counts {self.config.share:g} times"
