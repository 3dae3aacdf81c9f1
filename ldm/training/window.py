"""What a training's steps gave since the last record, summed on the device, and which of them were lost.

A step is lost when one of its metrics is not finite. Engines leave out the update of a network whose gradient is not;
here none of the step's metrics count. Nothing is read back from the device until a record is due.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

Names = tuple[str, ...]


class Window:
    """Sums between two records, and the steps that were lost in a row."""

    def __init__(self, waited_before: float, max_lost_steps: int) -> None:
        """Begin the first window.

        Args:
            waited_before: seconds that the consumer of the data has waited so far.
            max_lost_steps: so many lost steps in a row end the run.
        """
        self._max_lost_steps = max_lost_steps
        self._in_a_row: Tensor | None = None
        self._ended_at: Tensor | None = None
        self._keys: list[tuple[int, tuple[str, ...]]] = []
        self.restart()
        self.clear(waited_before)

    def clear(self, waited_before: float) -> None:
        """Begin the next window; a row of lost steps goes on."""
        self._sums: dict[Names, Tensor] = {}
        self._kept: dict[Names, Tensor] = {}
        self._lost: dict[Names, Tensor] = {}
        self._plain_sums: dict[str, float] = {}
        self._plain_counts = Counter[str]()
        self.num_steps = 0
        self.seconds = 0.0
        self.checkpoint_seconds = 0.0
        self.flops = 0.0
        self.waited_before = waited_before

    def restart(self) -> None:
        """Begin the time of the next step."""
        self._last = self._marked = time.monotonic()

    def mark(self) -> None:
        """Begin the time that a device may still need for the steps after the host is through with them."""
        self._marked = time.monotonic()

    def settle(self) -> None:
        """Count the time since the mark as the steps'."""
        self.seconds += time.monotonic() - self._marked

    def tick(self) -> float:
        """Return the seconds since the last step ended."""
        return time.monotonic() - self._last

    def add(self, metrics: Mapping[str, Tensor | float], keys: tuple[str, ...], samples_seen: int) -> None:
        """Take in what a step gave.

        Args:
            metrics: tensors of shape () on one device, where they stay, and numbers.
            keys: of the rows that this process gave to it.
            samples_seen: rows seen at its end.
        """
        self._keys.append((samples_seen, keys))
        self.num_steps += 1
        self.seconds += self.tick()
        on_device = {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
        for name, value in plain.items():
            self._plain_sums[name] = self._plain_sums.get(name, 0.0) + value
            self._plain_counts[name] += 1
        if not on_device:
            return
        names = tuple(on_device)
        values = torch.stack([value.float().reshape(()) for value in on_device.values()])
        is_lost = ~values.isfinite()
        is_step_lost = is_lost.any() if all(map(math.isfinite, plain.values())) else torch.ones_like(is_lost[0])
        kept = torch.where(is_step_lost, 0.0, values)
        self._sums[names] = self._sums[names] + kept if names in self._sums else kept
        self._kept[names] = self._kept.get(names, 0) + (~is_step_lost).to(torch.int64)
        self._lost[names] = self._lost.get(names, 0) + is_lost.to(torch.int64)
        before = torch.zeros_like(is_step_lost, dtype=torch.int64) if self._in_a_row is None else self._in_a_row
        self._in_a_row = torch.where(is_step_lost, before + 1, 0)
        ended_at = torch.zeros_like(before) if self._ended_at is None else self._ended_at
        is_end = (self._in_a_row == self._max_lost_steps) & (ended_at == 0)
        self._ended_at = torch.where(is_end, samples_seen, ended_at)

    def ended_at(self) -> int:
        """Return the samples seen when too many steps in a row had been lost; 0 while that was not so."""
        return 0 if self._ended_at is None else int(self._ended_at)

    def keys_between(self, first: int, end: int) -> list[list[str]]:
        """Return the keys of each step within these samples, as far as they are not forgotten."""
        return [list(keys) for ended, keys in self._keys if first < ended <= end]

    def forget_keys(self, until: int) -> None:
        """Keep only the keys after a sample, and those that a row of lost steps may still need."""
        latest = self._keys[-self._max_lost_steps :]
        self._keys = [step for step in self._keys[: -self._max_lost_steps] if step[0] > until] + latest

    def forgive(self) -> None:
        """Begin anew to count steps that are lost in a row: the weights that lost them are gone."""
        self._in_a_row = self._ended_at = None
        self._keys = []

    def lost_in_a_row(self) -> int:
        """Return how many of the latest steps were lost, without a good one between or after them."""
        return 0 if self._in_a_row is None else int(self._in_a_row)

    def lost(self) -> tuple[int, list[str]]:
        """Return how many of the window's steps were lost, and the metrics that were not finite in one of them."""
        if not self._kept:
            return 0, []
        num_lost = self.num_steps - sum(int(kept) for kept in self._kept.values())
        times = {names: lost.tolist() for names, lost in self._lost.items()}
        return num_lost, sorted({name for names in times for name, num in zip(names, times[names], strict=True) if num})

    def means(self, device: torch.device) -> dict[str, Tensor]:
        """Return the mean of each metric over the steps that were not lost, shape () each; NaN where all were."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for names, sums in self._sums.items():
            for name, total in zip(names, sums.unbind(), strict=True):
                before, count = found.get(name, (0.0, 0))
                found[name] = (before + total, count + self._kept[names])
        means = {name: (total / count).to(device) for name, (total, count) in found.items()}
        plain = {
            name: torch.tensor(total / self._plain_counts[name], dtype=torch.float32, device=device)
            for name, total in self._plain_sums.items()
        }
        return {**means, **plain}
