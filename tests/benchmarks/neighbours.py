"""Turns of a benchmark on a machine that others use too: a turn counts only where they took little of it.

busy seconds of the machine (/proc/stat) - CPU seconds of our own processes = seconds of neighbours. Two threads that
meet at barriers lose far more than a neighbour takes, so the same share can halve one side and spare the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import psutil

MAX_SHARE = 0.08
"""Share of the machine's CPU time that neighbours may take of a turn that counts."""
TRIES_PER_TURN = 2

Result = TypeVar("Result")


class Clock(NamedTuple):
    """Seconds by the wall, and of CPU by this process, its children, and children of either that have ended."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        """Return the time now."""
        return cls(time.perf_counter(), _own_seconds())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)

    def __add__(self, other: tuple[float, ...]) -> Clock:
        return Clock(self.wall + other[0], self.cpu + other[1])


class Turn(NamedTuple, Generic[Result]):
    """What a turn returned, and which share of the machine neighbours took meanwhile."""

    result: Result
    neighbours: float


def quiet_turns(turn: Callable[[], Result], num_turns: int, tries: int = TRIES_PER_TURN) -> list[Turn[Result]]:
    """Return that many turns, the quietest of at most `tries` times as many: it stops once enough were quiet."""
    turns: list[Turn[Result]] = []
    while len(turns) < tries * num_turns:
        turns.append(_watched(turn))
        if sum(done.neighbours <= MAX_SHARE for done in turns) == num_turns:
            break
    return sorted(turns, key=lambda done: done.neighbours)[:num_turns]


def _watched(turn: Callable[[], Result]) -> Turn[Result]:
    start, busy = Clock.now(), _busy_seconds()
    result = turn()
    spent, busy = Clock.now() - start, _busy_seconds() - busy
    return Turn(result, max(0.0, busy - spent.cpu) / (spent.wall * (os.cpu_count() or 1)))


def _busy_seconds() -> float:
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in processes)
