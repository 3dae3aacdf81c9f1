"""Where the time of a step goes, phase by phase: by the clock on a CPU, by events on a GPU, which nobody waits for.

What is measured on a GPU is the stream that computes: communication is the time that it waits in a collective, not the
time that something is exchanged while it computes. Where DeepSpeed exchanges on streams of its own, a wait for them
counts for the phase that waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import torch

MAX_MEASURED = 256
"""Updates that are measured between two looks at the stopwatch; more are like them, and events would pile up."""


class StepPhase(StrEnum):
    """What an update of a network is made of."""

    FORWARD = "forward"
    BACKWARD = "backward"
    COMMUNICATION = "communication"
    OPTIMIZER = "optimizer"
    AVERAGES = "averages"


class Stopwatch:
    """Seconds of each phase of an engine's updates.

    Args:
        device: where they compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[StepPhase | None, Any]] = []
        self._phase: StepPhase | None = None
        self._stream: Any = None
        self._num_updates = 0

    def begin(self) -> None:
        """Begin an update, with its first forward pass."""
        self._num_updates += 1
        if self._num_updates <= MAX_MEASURED:
            self._stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            self._mark(StepPhase.FORWARD)

    def enter(self, phase: StepPhase) -> None:
        """Count the time from now on as a phase's; nothing outside an update, or on a stream beside the update's."""
        if self._phase is None or self._phase is phase:
            return
        if self._stream is None or torch.cuda.current_stream(self._device) == self._stream:
            self._mark(phase)

    def end(self) -> None:
        """End an update."""
        if self._phase is not None:
            self._mark(None)

    def around(self, function: Callable[..., Any], phase: StepPhase) -> Callable[..., Any]:
        """Return a function that does the same, and whose time within an update is a phase's.

        So is the time of a wait for what it has begun, if that is what it returns.
        """

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._phase
            if before is None:
                return function(*args, **kwargs)
            self.enter(phase)
            try:
                begun = function(*args, **kwargs)
            finally:
                self.enter(before)
            return _Begun(begun, self, phase) if hasattr(begun, "wait") else begun

        return timed

    def take(self) -> dict[StepPhase, float]:
        """Return the seconds of each phase of all updates since the last call; on a GPU this waits for the last."""
        marks, self._marks = self._marks, []
        weight = max(1.0, self._num_updates / MAX_MEASURED)
        self._num_updates = 0
        if marks and self._device.type == "cuda":
            marks[-1][1].synchronize()
        seconds: dict[StepPhase, float] = {}
        for (phase, begun), (_, ended) in zip(marks, marks[1:], strict=False):
            if phase is not None:
                seconds[phase] = seconds.get(phase, 0.0) + _seconds_between(begun, ended)
        return {phase: total * weight for phase, total in seconds.items()}

    def _mark(self, phase: StepPhase | None) -> None:
        if self._device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((phase, now))
        self._phase = phase


@runtime_checkable
class Timed(Protocol):
    """What measures its own updates."""

    stopwatch: Stopwatch
    """Seconds of each phase."""


class _Begun:
    """What a collective has begun: a wait for it is counted as the collective itself is."""

    def __init__(self, begun: Any, watch: Stopwatch, phase: StepPhase) -> None:
        self._begun = begun
        self.wait = watch.around(begun.wait, phase)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._begun, name)


def _seconds_between(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else float(begun.elapsed_time(ended)) / 1e3
