"""Where the ranks of a training are, told without a collective: a rank that hangs answers none.

Each rank writes its place (phase, samples seen, seconds there) into the store that its process group was made with, on
a thread and a connection of their own. Places are read only when something is wrong: a healthy run costs one small
message a tick and rank.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from enum import StrEnum

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ldm.training.world import World

SILENT_AFTER_SECONDS = 10.0
"""A rank that writes nothing for so long, and for three ticks, no longer answers."""


class Phase(StrEnum):
    """What a rank is doing, in the order of a round of the loop."""

    START = "starting"
    VALIDATION = "validating"
    PICTURES = "drawing pictures"
    CHECKPOINT = "busy with a checkpoint"
    DATA = "waiting for data"
    STEP = "in the step"


ORDER = {phase: number for number, phase in enumerate(Phase)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank is.

    Attributes:
        rank: its number.
        host: the machine that it runs on.
        phase: what it does.
        samples_seen: at which sample of the run.
        seconds: for how long.
        is_silent: whether it answers no more, so that this is only the last that was heard of it.
    """

    rank: int
    host: str
    phase: Phase
    samples_seen: int
    seconds: float
    is_silent: bool = False

    @property
    def progress(self) -> tuple[int, int]:
        """What grows as a rank goes on."""
        return self.samples_seen, ORDER[self.phase]

    def sentence(self) -> str:
        """Return it in words."""
        doing = f"{self.phase.value} at sample {self.samples_seen:,} for {_span(self.seconds)}"
        about = f"no longer answers and was last {doing}" if self.is_silent else f"has been {doing}"
        return f"rank {self.rank} (host {self.host}) {about}"

    def to_json(self) -> str:
        """Return the text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Place:
        """Return the place that `to_json` wrote."""
        raw = json.loads(text)
        return cls(**{**raw, "phase": Phase(raw["phase"])})


def last_of(places: list[Place]) -> list[Place]:
    """Return the ranks that hold up the others: those that do not answer, else the least far; none if all are alike."""
    silent = [place for place in places if place.is_silent]
    least = min(place.progress for place in places)
    behind = silent or [place for place in places if place.progress == least]
    return [] if len(behind) == len(places) > 1 else behind


class Heartbeats:
    """Writes this rank's place into the group's store every `tick_seconds`, and reads those of the others.

    Args:
        world: the group of processes, of more than one.
        place: says where this rank is now.
        tick_seconds: how often it is written.
    """

    def __init__(self, world: World, place: Callable[[], Place], tick_seconds: float) -> None:
        self._world = world
        self._place = place
        self._tick_seconds = tick_seconds
        self._is_over = threading.Event()
        # A call that waits keeps its connection to itself: what is written and what is read take one each.
        store = distributed_c10d._get_default_store()
        self._writing, self._reading = store.clone(), store.clone()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write no more; a store that does not answer is not waited for."""
        self._is_over.set()
        self._thread.join(self._tick_seconds)

    def others(self) -> list[Place]:
        """Return where the other ranks are, those that wrote it; takes a few ticks, or for ever if the store hangs."""
        before = after = self._read()
        pause = threading.Event()
        for _ in range(max(3, int(SILENT_AFTER_SECONDS / self._tick_seconds))):
            pause.wait(self._tick_seconds)
            after = self._read()
            if all(text != before.get(rank) for rank, text in after.items()):
                break
        return [
            replace(Place.from_json(text), is_silent=text == before.get(rank)) for rank, text in sorted(after.items())
        ]

    def count(self, name: str) -> int:
        """Return how many ranks have called this with that name so far, this one included."""
        return int(self._reading.add(_key(name), 1))

    def wait_for(self, name: str, num_ranks: int, seconds: float) -> None:
        """Wait until so many ranks have called `count` with that name, but no longer than `seconds`."""
        pause = threading.Event()
        for _ in range(int(seconds / self._tick_seconds) + 1):
            if self._reading.add(_key(name), 0) >= num_ranks:
                return
            pause.wait(self._tick_seconds)

    def _beat(self) -> None:
        while True:
            try:
                self._writing.set(_key(self._world.rank), self._place().to_json())
            except dist.DistError:  # the process that holds the store is gone, and with it the training
                return
            if self._is_over.wait(self._tick_seconds):
                return

    def _read(self) -> dict[int, str]:
        keys = {rank: _key(rank) for rank in range(self._world.size) if rank != self._world.rank}
        return {rank: self._reading.get(key).decode() for rank, key in keys.items() if self._reading.check([key])}


def outlast(world: World, seconds: float) -> None:
    """Have collectives of all groups of processes wait that long, so that it is not they that give up first.

    DeepSpeed makes groups of its own, with torch's default: ten minutes on GPUs.
    """
    for group in distributed_c10d._world.pg_map:
        group._get_backend(world.device)._set_default_timeout(timedelta(seconds=seconds))


def _key(name: str | int) -> str:
    return f"ldm-heartbeats/{name}"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
