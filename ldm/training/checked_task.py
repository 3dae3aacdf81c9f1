"""A task whose attempt begins with the self-tests: before anything is trained, and around its first step.

The step that is looked at is the first one that changes a weight: a step that was lost shows nothing of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from ldm.training.loop import Progress
from ldm.training.memory import Memory
from ldm.training.record import Tracker
from ldm.training.saved_state import Resumable
from ldm.training.self_tests import (
    Findings,
    Machine,
    Rows,
    check_exchange,
    check_memory,
    check_rows,
    check_same,
    check_storage,
    check_weights,
    weight_sums,
)
from ldm.training.task import Keyed, Task
from ldm.training.world import World
from ldm.types import Image


class KeyedRows(Keyed, Rows, Protocol):
    """A batch that says which rows it is made of, and where they stand in the sequence."""


BatchT = TypeVar("BatchT", bound=KeyedRows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What the tests of one attempt work with.

    Attributes:
        world: the group of processes.
        facts: what must be the same on all ranks, by name.
        root: folder or URL of the run.
        goes_on: whether there is a checkpoint to go on from: what was well before may be well again.
        look: returns what is free on this rank's machine.
        needs: returns the forecast of a rank's memory, which only the main process asks for.
        advice: returns what would need less, the first that helps first; asked for only where memory is short.
        report: called with a notice.
        clock: returns seconds.
    """

    world: World
    facts: Mapping[str, str]
    root: str
    goes_on: bool
    look: Callable[[], Machine]
    needs: Callable[[], Memory]
    advice: Callable[[], Sequence[str]]
    report: Callable[[Progress], None]
    clock: Callable[[], float]


class PassingFaultError(RuntimeError):
    """What a test would refuse for good if the run had not begun: started again, it may be well."""


def begin(attempt: Attempt) -> Findings:
    """Run the tests that need no network; to be called before one is built, which takes memory.

    Raises:
        ValueError: for what a test refuses, on all ranks.
        PassingFaultError: in place of it where storage or memory was well at an attempt before.
    """
    world, started = attempt.world, attempt.clock()
    check_same(world, attempt.facts)
    findings = Findings(num_ranks=world.size, all_reduce_gb_per_second=check_exchange(world, attempt.clock))
    needed = world.gather(attempt.needs() if world.is_main else None)[0]
    assert needed is not None
    try:
        check_storage(world, attempt.root, attempt.look().name)
        findings.memory, warning = check_memory(world, needed, attempt.look, attempt.advice)
    except ValueError as error:
        if not attempt.goes_on:
            raise
        raise PassingFaultError(str(error)) from error
    if warning:
        attempt.report(Progress(done=0, total=0, notice=warning))
    findings.seconds = attempt.clock() - started
    return findings


@dataclass(kw_only=True)
class CheckedTask(Generic[BatchT]):
    """A task that looks at weights and rows around its first step, and says once that all is well.

    Attributes:
        task: what is trained.
        networks: its networks, by name.
        attempt: what the tests work with.
        findings: of `begin`.
        tracker: where the measured bandwidth goes.
    """

    task: Task[BatchT]
    networks: Mapping[str, nn.Module]
    attempt: Attempt
    findings: Findings
    tracker: Tracker
    _is_shown: bool = field(default=False, init=False)

    @property
    def engines(self) -> Mapping[str, Resumable]:
        """The parts of the task that checkpoints hold."""
        return self.task.engines

    def step(self, batch: BatchT, samples_seen: int, num_samples: int) -> dict[str, Tensor | float]:
        """Make one update; see `Task.step`.

        Raises:
            ValueError: at the first step, if the ranks' weights differ or their rows do not.
        """
        if self._is_shown:
            return self.task.step(batch, samples_seen, num_samples)
        world, started = self.attempt.world, self.attempt.clock()
        before = weight_sums(self.networks)
        check_weights(world, before, "before the first step")
        check_rows(world, batch)
        begun = self.attempt.clock()
        metrics = self.task.step(batch, samples_seen, num_samples)
        ended = self.attempt.clock()
        after = weight_sums(self.networks)
        check_weights(world, after, "after a step")
        self._is_shown = not after or any(before.get(name, value) != value for name, value in after.items())
        self.findings.seconds += self.attempt.clock() - ended + begun - started
        if self._is_shown:
            self._tell(samples_seen, has_equal_weights=bool(after))
        return metrics

    def flops(self, batch: BatchT, samples_seen: int) -> float:
        """Return the FLOPs of a step; see `Task.flops`."""
        return self.task.flops(batch, samples_seen)

    def validate(self) -> dict[str, float]:
        """Measure on held-out rows; see `Task.validate`."""
        return self.task.validate()

    def pictures(self) -> dict[str, Image]:
        """Return images to look at; see `Task.pictures`."""
        return self.task.pictures()

    def _tell(self, samples_seen: int, *, has_equal_weights: bool) -> None:
        self.findings.has_equal_weights = has_equal_weights
        if self.findings.num_ranks > 1:
            figure = {"all_reduce_gb_per_second": self.findings.all_reduce_gb_per_second}
            self.tracker.log_metrics(figure, samples_seen)
        self.attempt.report(Progress(done=0, total=0, notice=self.findings.sentence()))
