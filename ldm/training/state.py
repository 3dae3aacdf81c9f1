"""Where a training run stands: one number, samples seen, and what it has measured about itself.

The clock is samples seen. Learning rate, EMA, checkpoints, logging and the data position are functions of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """The state of a run beside its weights.

    Attributes:
        samples_seen: rows trained on since the start, over all ranks.
        first_validation: the first measurement of each validation metric, to compare later ones with.
        last_validation: the latest one.
        train_seconds: seconds spent in training steps, summed over all attempts.
        rollbacks: how often the weights of a checkpoint were taken again after too many lost steps.
        passed_over: [first, end] in samples of what was trained on or lost before each of them, and counts for nothing.
    """

    samples_seen: int = 0
    first_validation: dict[str, float] = field(default_factory=dict)
    last_validation: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    rollbacks: int = 0
    passed_over: list[list[int]] = field(default_factory=list)

    def advanced(self, num_samples: int, seconds: float) -> Self:
        """Return the state after `num_samples` more rows that took `seconds`."""
        return replace(self, samples_seen=self.samples_seen + num_samples, train_seconds=self.train_seconds + seconds)

    def validated(self, metrics: dict[str, float]) -> Self:
        """Return the state with a new validation measurement."""
        return replace(self, first_validation=self.first_validation or metrics, last_validation=metrics)

    def rolled_back(self, first: int) -> Self:
        """Return the state with the weights of the sample `first`, going on from where it stands."""
        passed_over = [*self.passed_over, [first, self.samples_seen]]
        return replace(self, rollbacks=self.rollbacks + 1, passed_over=passed_over)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def is_due(every: int, samples_seen: int, num_samples: int) -> bool:
    """Say whether a multiple of `every` lies in (samples_seen - num_samples, samples_seen]; never for 0."""
    return every > 0 and samples_seen // every != (samples_seen - num_samples) // every
