"""The one training loop: batch → step → clock → what is due (log, validate, draw, save).

Everything that happens is a function of samples seen, so a resumed run does what the unbroken one would have done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ldm.config import Config, added_later
from ldm.training.checkpoint import CheckpointStore
from ldm.training.heartbeats import Phase
from ldm.training.machine_load import MachineLoad
from ldm.training.out_of_memory import memory_explained
from ldm.training.pace import pace_in_words, pace_metrics
from ldm.training.record import Tracker
from ldm.training.rollback import look_for_lost_row, roll_back
from ldm.training.speed import speed_metrics
from ldm.training.state import TrainState, is_due
from ldm.training.task import Keyed, NotFiniteError, Task
from ldm.training.watchdog import Watchdog, unwatched
from ldm.training.window import Window
from ldm.training.world import World

logger = logging.getLogger(__name__)
BatchT = TypeVar("BatchT", bound=Keyed)
BatchT_co = TypeVar("BatchT_co", bound=Keyed, covariant=True)


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
    keep_every: int = added_later(0)
    """Samples between two checkpoints that stay for good; 0 keeps only the latest. A file `keep` in a checkpoint's
    folder does the same for that one."""
    saves_in_background: bool = added_later(False)
    """Whether training stands still only while its state is copied, and files are written, synchronised or uploaded
    behind it. Costs memory of each machine for one more copy of what its ranks save, for the whole run (on GPUs
    page-locked, and rounded up to a power of two for each tensor). A checkpoint counts once all of it is written."""
    max_lost_steps: int = added_later(8)
    """A step whose loss or gradient is not finite is left out and counted; so many in a row end the run, and the keys
    of their rows are saved beside the checkpoints."""
    max_rollbacks: int = added_later(0)
    """How often in a run so many lost steps lead back to the weights of the latest checkpoint instead, and on behind
    the rows since then, whose keys are saved too; 0 ends the run the first time."""
    hang_minutes: float = added_later(30.0)
    """A process that waits for data or is in a step for so long, or four times as long in a validation, in pictures or
    in a checkpoint, says where all processes are, writes its stacks beside the checkpoints and ends itself, to be
    started again; 0 lets it wait."""

    def __post_init__(self) -> None:
        for name in ("total_samples", "keep_checkpoints", "max_lost_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("keep_every", "max_rollbacks", "hang_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"loop.{name} can't be negative, got {getattr(self, name)}")

    @property
    def num_kept_for_good(self) -> int:
        """How many checkpoints of the whole run stay by `keep_every`."""
        return self.total_samples // self.keep_every if self.keep_every else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a watcher is told.

    Attributes:
        done: samples seen.
        total: samples of the whole run.
        metrics: the latest values worth a glance.
        notice: a sentence that a person must see, or empty.
        facts: where the workers run, told once at each of their starts.
        is_alarm: whether the notice comes from whichever process had to give it, which ends after it.
    """

    done: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)
    notice: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    is_alarm: bool = False


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
        load: measures what every process and its machine are busy with.
        enters: called with what comes next, and at which sample; the loop's watchdog is put there.
        peak_flops: FLOP a second that this process's device could make; 0 where that is not known.
        forecast: images a second that all processes would make by forward and backward alone; 0 where nobody measured.
    """

    world: World
    batch_size: int
    checkpoints: CheckpointStore
    tracker: Tracker
    report: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    load: MachineLoad = field(default_factory=MachineLoad)
    enters: Callable[[Phase, int], None] = unwatched
    peak_flops: float = 0.0
    forecast: float = 0.0


def train(task: Task[BatchT], loader: Loader[BatchT], config: LoopConfig, around: Surroundings) -> TrainState:
    """Train to the end, or until a stop is asked for, and return where the run stands.

    Starts from the latest whole checkpoint if there is one. A process that hangs is ended: see `Watchdog`.

    Raises:
        NotFiniteError: if too many steps in a row were lost, or the end can't be measured.
        OutOfMemoryError: if there is not enough memory, with what takes less.
    """

    def tell(sentence: str) -> None:
        around.report(Progress(done=0, total=0, notice=sentence, is_alarm=True))

    watchdog = Watchdog(60 * config.hang_minutes, around.checkpoints.root, around.world, tell)
    with watchdog, memory_explained(around.world, lambda: watchdog.place().sentence()):
        try:
            return _train(task, loader, config, replace(around, enters=watchdog.enters))
        finally:
            around.checkpoints.abandon()


def _train(task: Task[BatchT], loader: Loader[BatchT], config: LoopConfig, around: Surroundings) -> TrainState:
    state = around.checkpoints.restore(task.engines) or TrainState()
    for name in around.checkpoints.damaged:
        around.report(_progress(config, state, notice=f"checkpoint {name} was damaged and is not used"))
    if state.samples_seen:
        around.report(_progress(config, state, notice=f"resumed at {state.samples_seen:,} samples"))
    if around.forecast and state.samples_seen < config.total_samples:
        expected = pace_in_words(around.forecast, around.world.size, state.samples_seen, config.total_samples)
        around.report(Progress(done=0, total=0, notice=f"forecast {expected}"))
    if not state.samples_seen:
        state = _validate(task, state, config, around)
    window = Window(loader.wait_seconds, config.max_lost_steps)
    batches = loader.batches(state.samples_seen)
    is_stopping = False
    while state.samples_seen < config.total_samples:
        around.enters(Phase.DATA, state.samples_seen)
        batch = next(batches)
        around.enters(Phase.STEP, state.samples_seen)
        metrics = task.step(batch, state.samples_seen, around.batch_size)
        state = state.advanced(around.batch_size, window.tick())
        window.add(metrics, batch.keys, state.samples_seen)
        window.flops += task.flops(batch, state.samples_seen - around.batch_size)
        window.mark()
        is_stopping = is_stopping or around.world.any(around.should_stop())
        if is_stopping or _is_measured(config, state, around.batch_size):
            state = _recover(task, window, state, config, around)
        if state.samples_seen >= config.total_samples or is_due(
            config.log_every, state.samples_seen, around.batch_size
        ):
            _log(task, window, loader, state, config, around)
        state = _do_what_is_due(task, window, state, config, around)
        window.restart()
        if is_stopping and _save(task, window, state, config, around):
            _publish(window, state, around)
            around.report(_progress(config, state, notice="stopped as asked; the state is saved"))
            return state
    _publish(window, state, around)
    return state


def _do_what_is_due(
    task: Task[Any], window: Window, state: TrainState, config: LoopConfig, around: Surroundings
) -> TrainState:
    num_samples = around.batch_size
    is_last = state.samples_seen >= config.total_samples
    if is_last or is_due(config.validate_every, state.samples_seen, num_samples):
        state = _validate(task, state, config, around)
    if is_last or is_due(config.picture_every, state.samples_seen, num_samples):
        around.enters(Phase.PICTURES, state.samples_seen)
        for name, images in task.pictures().items():
            around.tracker.log_picture(name, images, state.samples_seen)
    if is_last or around.checkpoints.is_written():
        _publish(window, state, around)
    if is_last:
        _refuse_useless(state, around)
    is_kept = is_due(config.keep_every, state.samples_seen, num_samples)
    if is_last or is_kept or is_due(config.checkpoint_every, state.samples_seen, num_samples):
        _save(task, window, state, config, around, is_kept=is_kept)
    return state


def _save(
    task: Task[Any],
    window: Window,
    state: TrainState,
    config: LoopConfig,
    around: Surroundings,
    *,
    is_kept: bool = False,
) -> bool:
    """Save the state, unless the latest step was lost: what it was lost by may lie in the weights. Say whether."""
    _publish(window, state, around)
    is_last = state.samples_seen >= config.total_samples  # measured, and found to be of use
    if around.world.any(window.lost_in_a_row() > 0) and not is_last:
        notice = f"no checkpoint at {state.samples_seen:,} samples, for that step was lost; the next one comes"
        around.report(_progress(config, state, notice=notice))
        return False
    if config.saves_in_background:
        around.checkpoints.begin(task.engines, state, is_kept=is_kept)
        return True
    started = time.monotonic()
    around.checkpoints.save(task.engines, state, is_kept=is_kept)
    seconds = time.monotonic() - started
    window.checkpoint_seconds += seconds
    around.tracker.log_metrics({"checkpoint_seconds": seconds}, state.samples_seen)
    return True


def _publish(window: Window, state: TrainState, around: Surroundings) -> None:
    """Publish the checkpoint that is being written in the background, if there is one, once all of it is written."""
    around.enters(Phase.CHECKPOINT, state.samples_seen)
    published = around.checkpoints.finish()
    if published is not None:
        seconds = {
            "checkpoint_seconds": published.stall_seconds,
            "checkpoint_background_seconds": published.background_seconds,
        }
        window.checkpoint_seconds += published.stall_seconds
        around.tracker.log_metrics(seconds, published.samples_seen)


def _is_measured(config: LoopConfig, state: TrainState, num_samples: int) -> bool:
    """Say whether numbers are read back from the device now anyway: before a record or a checkpoint."""
    intervals = (config.log_every, config.checkpoint_every, config.keep_every)
    is_last = state.samples_seen >= config.total_samples
    return is_last or any(is_due(every, state.samples_seen, num_samples) for every in intervals)


def _recover(
    task: Task[Any], window: Window, state: TrainState, config: LoopConfig, around: Surroundings
) -> TrainState:
    """Deal with a network that does not come back, or data that can't be learned from, before the next checkpoint."""
    checkpoints, world = around.checkpoints, around.world
    lost = look_for_lost_row(window, config.max_lost_steps, around.batch_size, checkpoints, world)
    if lost is None:
        window.forget_keys(checkpoints.latest_samples if config.max_rollbacks else state.samples_seen)
        return state
    _publish(window, state, around)
    has_more = state.rollbacks < config.max_rollbacks
    again = roll_back(task.engines, window, state, checkpoints, world) if has_more else None
    if again is None:
        raise lost.error()
    if again.samples_seen < config.total_samples:  # the last one is saved when it is measured
        is_kept = is_due(config.keep_every, again.samples_seen, around.batch_size)
        checkpoints.save(task.engines, again, is_kept=is_kept, in_place_of_latest=True)
    around.tracker.log_metrics({"rollbacks": float(again.rollbacks)}, again.samples_seen)
    notice = (
        f"{lost.sentence()}. Rollback {again.rollbacks} of {config.max_rollbacks}: the weights of sample "
        f"{again.passed_over[-1][0]:,} go on from sample {again.samples_seen:,}, and the rows between are passed over"
    )
    around.report(_progress(config, again, notice=notice))
    return again


def _refuse_useless(state: TrainState, around: Surroundings) -> None:
    """Publish no network that gives no numbers on held-out rows."""
    lost = sorted(name for name, value in state.last_validation.items() if not math.isfinite(value))
    if around.world.any(bool(lost)):
        raise NotFiniteError(
            f"at the end of the run {', '.join(lost)} is not finite: nothing is published. The last checkpoint is from "
            "before; a lower optim.lr or other data is another run, in a root of its own"
        )


def _validate(task: Task[Any], state: TrainState, config: LoopConfig, around: Surroundings) -> TrainState:
    around.enters(Phase.VALIDATION, state.samples_seen)
    metrics = task.validate()
    around.tracker.log_metrics(metrics, state.samples_seen)
    around.report(_progress(config, state, metrics))
    return state.validated(metrics)


def _log(
    task: Task[Any],
    window: Window,
    loader: Loader[Any],
    state: TrainState,
    config: LoopConfig,
    around: Surroundings,
) -> None:
    means = {name: around.world.mean(value).item() for name, value in window.means(around.world.device).items()}
    if around.world.device.type == "cuda":
        window.settle()  # what was read is there: the GPU has made all the steps
    waited = loader.wait_seconds - window.waited_before
    speed = speed_metrics(
        task.engines.values(),
        around.world,
        seconds=window.seconds,
        wait_seconds=waited,
        checkpoint_seconds=window.checkpoint_seconds,
        flops=window.flops,
        peak=around.peak_flops,
    )
    metrics = {
        **means,
        **pace_metrics(window.num_steps * around.batch_size, window.seconds, around.forecast),
        "data_wait_seconds": waited,
        "train_seconds": state.train_seconds,
        **speed,
    }
    num_lost, names = window.lost()
    if num_lost:
        metrics["lost_steps"] = float(num_lost)
        notice = f"{num_lost} steps up to {state.samples_seen:,} samples were lost: {', '.join(names)} not finite"
        around.report(_progress(config, state, notice=notice))
    around.tracker.log_metrics({**metrics, **around.load.of_ranks(around.world)}, state.samples_seen)
    around.report(_progress(config, state, metrics))
    window.clear(loader.wait_seconds)


def _progress(
    config: LoopConfig, state: TrainState, metrics: dict[str, float] | None = None, notice: str = ""
) -> Progress:
    return Progress(done=state.samples_seen, total=config.total_samples, metrics=metrics or {}, notice=notice)
