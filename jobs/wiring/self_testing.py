"""The self-tests of a training, put together: what must be the same, what is there, what will be needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

from jobs.wiring.machine import code_facts, look_around
from ldm import storage
from ldm.config import Config
from ldm.training.checked_task import Attempt, CheckedTask, begin
from ldm.training.loop import Progress
from ldm.training.memory import Memory
from ldm.training.record import Tracker
from ldm.training.self_tests import Findings
from ldm.training.task import Task
from ldm.training.world import World
from pipeline.store.manifest import Manifest

FoundT = TypeVar("FoundT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is known of a training's memory before it is taken.

    Attributes:
        needed: returns the forecast of a rank.
        advice: returns what would need less.
    """

    needed: Callable[[], Memory]
    advice: Callable[[], Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTests:
    """The tests of one attempt, begun."""

    attempt: Attempt
    findings: Findings

    def timed(self, measure: Callable[[], FoundT]) -> FoundT:
        """Return what a measurement finds whose seconds count as the tests'."""
        started = self.attempt.clock()
        found = measure()
        self.findings.seconds += self.attempt.clock() - started
        return found

    def around(self, task: Task[Any], networks: Mapping[str, nn.Module], tracker: Tracker) -> Task[Any]:
        """Return the task with the tests around its first step."""
        return CheckedTask(task=task, networks=networks, attempt=self.attempt, findings=self.findings, tracker=tracker)


def begin_self_tests(
    config: Config,
    root: str,
    data: Manifest,
    forecast: Forecast,
    world: World,
    report: Callable[[Progress], None],
) -> SelfTests:
    """Run the tests that come before any network.

    Args:
        config: of the training.
        root: its folder or URL.
        data: what it trains on.
        forecast: of its memory.
        world: the group of processes.
        report: called with notices.

    Raises:
        ValueError: for what a test refuses.
    """
    attempt = Attempt(
        world=world,
        facts={"configuration": config.digest(), "data": data.digest, **code_facts()},
        root=root,
        goes_on=world.gather(bool(storage.list_names(storage.join(root, "checkpoints"))))[0],
        look=partial(look_around, world),
        needs=forecast.needed,
        advice=forecast.advice,
        report=report,
        clock=time.monotonic,
    )
    return SelfTests(attempt=attempt, findings=begin(attempt))
