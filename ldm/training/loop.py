"""The one training loop: batch → step → clock → what is due (log, validate, draw, save).

Everything that happens is a function of samples seen, so a resumed run does what the unbroken one would have done.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ldm.config import Config
from ldm.training.checkpoint import CheckpointStore
from ldm.training.record import Tracker
from ldm.training.state import TrainState, is_due
from ldm.training.task import Task
from ldm.training.world import World

logger = logging.getLogger(__name__)
BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig(Config):
    """How long, and how often what is done; every interval counts samples."""

    total_samples: int = 100_000
    """Rows to train on, repetitions counted."""
    log_every: int = 2_000
    """Samples between two records of the metrics."""
    validate_every: int = 20_000
    """Samples between two measurements on held-out rows; 0 measures only at the start and the end."""
    picture_every: int = 50_000
    """Samples between two grids of pictures; 0 draws only at the end."""
    checkpoint_every: int = 20_000
    """Samples between two checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""

    def __post_init__(self) -> None:
        if self.total_samples < 1 or self.keep_checkpoints < 1:
            raise ValueError(
                f"loop.total_samples and loop.keep_checkpoints must be at least 1, "
                f"got {self.total_samples} and {self.keep_checkpoints}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a watcher is told.

    Attributes:
        done: samples seen.
        total: samples of the whole run.
        metrics: the latest values worth a glance.
        notice: a sentence that a person must see, or empty.
    """

    done: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)
    notice: str = ""


class Loader(Protocol[BatchT_co]):
    """An endless sequence of batches that can start at any sample."""

    wait_seconds: float
    """Seconds that the consumer has waited for data so far."""

    def batches(self, samples_seen: int) -> Iterator[BatchT_co]:
        """Yield this process's share of each batch from the given sample on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a loop works with beside task and data.

    Attributes:
        world: the group of processes.
        batch_size: rows of a batch over all processes.
        checkpoints: where the state is kept.
        tracker: where numbers and pictures go.
        report: called with the progress of the run by the main process.
        should_stop: says that a stop was asked for (a signal); the loop saves and returns.
    """

    world: World
    batch_size: int
    checkpoints: CheckpointStore
    tracker: Tracker
    report: Callable[[Progress], None]
    should_stop: Callable[[], bool]


def train(task: Task[BatchT], loader: Loader[BatchT], config: LoopConfig, around: Surroundings) -> TrainState:
    """Train to the end, or until a stop is asked for, and return where the run stands.

    Starts from the latest whole checkpoint if there is one.
    """
    state = around.checkpoints.restore(task.engines) or TrainState()
    for name in around.checkpoints.damaged:
        around.report(_progress(config, state, notice=f"checkpoint {name} was damaged and is not used"))
    if state.samples_seen:
        around.report(_progress(config, state, notice=f"resumed at {state.samples_seen:,} samples"))
    else:
        state = _validate(task, state, config, around)
    window = _Window(loader.wait_seconds)
    batches = loader.batches(state.samples_seen)
    while state.samples_seen < config.total_samples:
        batch = next(batches)
        metrics = task.step(batch, state.samples_seen, around.batch_size)
        state = state.advanced(around.batch_size, window.tick())
        window.add(metrics, state.samples_seen)
        if is_due(config.log_every, state.samples_seen, around.batch_size):
            _log(window, loader, state, config, around)
        if _is_measured(config, state, around.batch_size):
            _refuse_nonfinite(window, state, around.world)
        state = _do_what_is_due(task, state, config, around)
        window.restart()
        if around.world.any(around.should_stop()):
            around.checkpoints.save(task.engines, state)
            around.report(_progress(config, state, notice="stopped as asked; the state is saved"))
            return state
    return state


def _do_what_is_due(task: Task[Any], state: TrainState, config: LoopConfig, around: Surroundings) -> TrainState:
    num_samples = around.batch_size
    is_last = state.samples_seen >= config.total_samples
    if is_last or is_due(config.validate_every, state.samples_seen, num_samples):
        state = _validate(task, state, config, around)
    if is_last or is_due(config.picture_every, state.samples_seen, num_samples):
        for name, images in task.pictures().items():
            around.tracker.log_picture(name, images, state.samples_seen)
    if is_last or is_due(config.checkpoint_every, state.samples_seen, num_samples):
        started = time.monotonic()
        around.checkpoints.save(task.engines, state)
        around.tracker.log_metrics({"checkpoint_seconds": time.monotonic() - started}, state.samples_seen)
    return state


def _is_measured(config: LoopConfig, state: TrainState, num_samples: int) -> bool:
    """Say whether numbers are read back from the device now anyway: before a record or a checkpoint."""
    intervals = (config.log_every, config.checkpoint_every)
    is_last = state.samples_seen >= config.total_samples
    return is_last or any(is_due(every, state.samples_seen, num_samples) for every in intervals)


def _refuse_nonfinite(window: _Window, state: TrainState, world: World) -> None:
    """Stop before a checkpoint keeps a network that is lost; the one before is whole."""
    first, names = window.first_lost()
    if world.any(bool(names)):
        what = f"{', '.join(names)} is not finite" if names else "a metric of another process is not finite"
        raise FloatingPointError(
            f"{what} since {first or state.samples_seen:,} samples: the last checkpoint is from before; "
            "lower optim.lr or look at the data, then start again"
        )


def _validate(task: Task[Any], state: TrainState, config: LoopConfig, around: Surroundings) -> TrainState:
    metrics = task.validate()
    around.tracker.log_metrics(metrics, state.samples_seen)
    around.report(_progress(config, state, metrics))
    return state.validated(metrics)


def _log(window: _Window, loader: Loader[Any], state: TrainState, config: LoopConfig, around: Surroundings) -> None:
    means = {name: around.world.mean(value).item() for name, value in window.means(around.world.device).items()}
    rate = window.num_steps * around.batch_size / max(window.seconds, 1e-9)
    metrics = {
        **means,
        "images_per_second": rate,
        "data_wait_seconds": loader.wait_seconds - window.waited_before,
        "train_seconds": state.train_seconds,
    }
    around.tracker.log_metrics(metrics, state.samples_seen)
    around.report(_progress(config, state, metrics))
    window.clear(loader.wait_seconds)


def _progress(
    config: LoopConfig, state: TrainState, metrics: dict[str, float] | None = None, notice: str = ""
) -> Progress:
    return Progress(done=state.samples_seen, total=config.total_samples, metrics=metrics or {}, notice=notice)


class _Window:
    """Sums between two records; nothing is read back from the device until a record is due."""

    def __init__(self, waited_before: float) -> None:
        self._lost: dict[str, Tensor] = {}
        self.restart()
        self.clear(waited_before)

    def clear(self, waited_before: float) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts = Counter[str]()
        self.num_steps = 0
        self.seconds = 0.0
        self.waited_before = waited_before

    def restart(self) -> None:
        self._last = time.monotonic()

    def tick(self) -> float:
        """Return the seconds since the last step ended."""
        return time.monotonic() - self._last

    def add(self, metrics: dict[str, Tensor | float], samples_seen: int) -> None:
        self.num_steps += 1
        self.seconds += self.tick()
        for name, value in metrics.items():
            detached = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + detached
            self.counts[name] += 1
            # Noted on the device, so that the step is known without a step's wait for it.
            is_lost = ~torch.as_tensor(detached).isfinite()
            known = self._lost.get(name, torch.zeros_like(is_lost, dtype=torch.int64))
            self._lost[name] = torch.where(is_lost & (known == 0), samples_seen, known)

    def first_lost(self) -> tuple[int, list[str]]:
        """Return the end of the first step with metrics that are not finite, 0 if there is none, and their names."""
        lost = {name: int(seen) for name, seen in self._lost.items() if int(seen)}
        first = min(lost.values(), default=0)
        return first, [name for name, seen in lost.items() if seen == first]

    def means(self, device: torch.device) -> dict[str, Tensor]:
        return {
            name: torch.as_tensor(total, dtype=torch.float32, device=device) / self.counts[name]
            for name, total in self.sums.items()
        }
