"""A watchdog in every rank: one that has not moved for too long says where everybody is, and ends itself.

Order at the end: read where the other ranks are → one rank tells the person which rank holds up the others → each
writes its threads' stacks beside the checkpoints → they wait for each other, briefly → each exits with `EXIT_HUNG`, so
that Ray Train or torchrun see dead workers and start them again from the last checkpoint.

None of it is a collective or waits without a bound: store, terminal and disk may be what hangs. What it can't see is a
library that keeps Python's lock for ever; then another rank's watchdog speaks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import TypeVar

from ldm import storage
from ldm.training.heartbeats import Heartbeats, Phase, Place, last_of, outlast
from ldm.training.world import World

Found = TypeVar("Found")
EXIT_HUNG = 75
"""Exit status of a process that its watchdog ended: EX_TEMPFAIL of sysexits.h, a failure that another try may mend."""
PATIENCE_SECONDS = 30.0
"""How long the last words may take, each."""
LONG_PHASES = 4
"""How many times the limit anything but waiting for data and a step may take."""
TICKS = 20
"""How often a limit's time is looked at."""
LONGEST_TICK_SECONDS = 5.0


class Watchdog:
    """Ends a process that stays too long in one place.

    Args:
        limit_seconds: how long that is; 0 never ends it.
        folder: folder or URL for what a person needs to see.
        world: the group of processes.
        tell: called with a sentence for the person, by one of the ranks.
    """

    def __init__(self, limit_seconds: float, folder: str, world: World, tell: Callable[[str], None]) -> None:
        self._limit_seconds = limit_seconds
        self._folder = folder
        self._world = world
        self._tell = tell
        self._tick_seconds = min(limit_seconds / TICKS, LONGEST_TICK_SECONDS)
        self._is_over = threading.Event()
        self._idle_seconds = 0.0
        self._host = socket.gethostname()
        self.enters(Phase.START, 0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heartbeats: Heartbeats | None = None

    def enters(self, phase: Phase, samples_seen: int) -> None:
        """Take note that this rank has moved."""
        self._entered = (phase, samples_seen)

    def place(self) -> Place:
        """Return where this rank is."""
        phase, samples_seen = self._entered
        return Place(
            rank=self._world.rank,
            host=self._host,
            phase=phase,
            samples_seen=samples_seen,
            seconds=self._idle_seconds,
        )

    def __enter__(self) -> Watchdog:
        if not self._limit_seconds:
            return self
        if self._world.size > 1:
            outlast(self._world, 2 * LONG_PHASES * self._limit_seconds + 10 * PATIENCE_SECONDS)
            self._heartbeats = Heartbeats(self._world, self.place, self._tick_seconds)
            self._heartbeats.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._heartbeats is not None:
            self._heartbeats.stop()

    def _watch(self) -> None:
        entered, looked = self._entered, time.monotonic()
        while not self._is_over.wait(self._tick_seconds):
            now = time.monotonic()
            # A process that was stopped, with Ctrl-Z or by a debugger, did not hang meanwhile.
            passed, looked = min(now - looked, 2 * self._tick_seconds), now
            has_moved, entered = entered is not self._entered, self._entered
            self._idle_seconds = 0.0 if has_moved else self._idle_seconds + passed
            is_long = entered[0] not in (Phase.DATA, Phase.STEP)
            if self._idle_seconds >= self._limit_seconds * (LONG_PHASES if is_long else 1):
                self._end()

    def _end(self) -> None:
        try:
            own, beats = self.place(), self._heartbeats
            others = [] if beats is None else within(PATIENCE_SECONDS, beats.others)
            is_first = True if beats is None else within(PATIENCE_SECONDS, lambda: beats.count("told") == 1)
            message = self._message(own, others)
            if is_first is not False:
                within(PATIENCE_SECONDS, lambda: self._tell(message))
            within(PATIENCE_SECONDS, lambda: self._write(own, others or [], message))
            if beats is not None and others is not None:
                num_alive = 1 + sum(not place.is_silent for place in others)
                within(PATIENCE_SECONDS, lambda: beats.count("written"))
                within(PATIENCE_SECONDS, lambda: beats.wait_for("written", num_alive, PATIENCE_SECONDS / 2))
        finally:
            os._exit(EXIT_HUNG)

    def _message(self, own: Place, others: list[Place] | None) -> str:
        """Return which rank holds up the others, and where those are; None for others whose store does not answer."""
        places = sorted([own, *(others or [])], key=lambda place: place.rank)
        behind = last_of(places)
        named = [*behind, *(place for place in places if place not in behind)]
        whose = "" if behind else "no rank is behind the others: "
        unknown = "; where the other ranks are can't be read" if others is None else ""
        return (
            f"{whose}{'; '.join(place.sentence() for place in named)}{unknown}. loop.hang_minutes is "
            f"{self._limit_seconds / 60:g}: the processes end with status {EXIT_HUNG}, and what starts them again goes "
            f"on from the last checkpoint. The stacks of all threads are in {storage.join(self._folder, 'hang-*.json')}"
        )

    def _write(self, own: Place, others: list[Place], message: str) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().splitlines()
        content = {**asdict(own), "message": message, "others": [asdict(place) for place in others], "stacks": stacks}
        path = storage.join(self._folder, f"hang-{own.samples_seen:012d}-rank{own.rank}.json")
        storage.write_text(path, json.dumps(content, indent=1))


def within(seconds: float, act: Callable[[], Found]) -> Found | None:
    """Return what a call gives, or None if it takes longer or fails; its error goes to stderr."""
    found: list[Found] = []
    thread = threading.Thread(target=lambda: found.append(act()), name="last-words", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def unwatched(_phase: Phase, _samples_seen: int) -> None:
    """Take no note: nobody watches."""
