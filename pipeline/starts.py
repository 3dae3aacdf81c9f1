"""How often each shard was begun, and which of a worker's shards may be in work at once.

A shard that was begun before may have ended its process. It then goes on alone, so that it ends no other's work, and
its start is counted only when its turn has come, so that another's end is not counted as its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class StartCounter:
    """An actor that outlives the workers and counts how often each shard was begun."""

    def __init__(self) -> None:
        self.starts = Counter[str]()

    def count(self, task: str) -> int:
        """Return how often a task was begun."""
        return self.starts[task]

    def begin(self, task: str) -> int:
        """Count one more start of a task and return how many there were."""
        self.starts[task] += 1
        return self.starts[task]


class Turns:
    """Lets any number of threads in together, or one alone."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._num_inside = 0
        self._is_closed = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait until nobody is in alone, or waits to be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else is in, and let nobody in."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: not self._num_inside)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()
