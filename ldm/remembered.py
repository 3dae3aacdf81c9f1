"""What the steps of a sampling have in common is computed once: the keys and values of what is attended to.

A network is called at every step with the very same condition. While `steps_share` lasts, its attention to tokens and
its conditioner remember what they made of the last few inputs, found by identity; outside of it nothing is remembered,
so that weights may change. Nothing but time is saved: the numbers are those of a call without it, bit for bit. What is
compiled computes all of it at every step: a graph for each state of a memory would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

COMPILED = "_orig_mod"
"""Part of a compiled module that is the plain one; to import the compiler for its class takes two seconds."""
MOST_INPUTS = 2
"""Inputs that are remembered: a batch's condition, and the same with what guidance leads away from."""

Made = TypeVar("Made")


class Remembered:
    """What was made of the last few inputs."""

    def __init__(self) -> None:
        self._made: tuple[tuple[tuple[object, ...], Any], ...] = ()

    def of(self, inputs: tuple[object, ...], make: Callable[[], Made]) -> Made:
        """Return what was made of these very objects, or make it."""
        for known, made in self._made:
            if len(known) == len(inputs) and all(one is other for one, other in zip(known, inputs, strict=True)):
                found: Made = made
                return found
        fresh = make()
        # The inputs are kept with it: as long as they are, no other object has their identity.
        self._made = ((inputs, fresh), *self._made)[:MOST_INPUTS]
        return fresh


class Remembering(nn.Module):
    """A module that, while `steps_share` lasts, remembers part of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Remembered | None = None

    def remembered(self, inputs: tuple[object, ...], make: Callable[[], Made]) -> Made:
        """Return what `make` makes of the inputs, perhaps remembered."""
        memory = self.memory  # once: another thread may end its own sampling meanwhile
        return make() if memory is None else memory.of(inputs, make)


@contextmanager
def steps_share(network: object) -> Iterator[None]:
    """Let a network remember, as long as the context lasts, what it makes of one condition.

    Args:
        network: any callable; what is no module, is compiled or has no such part is left alone. Its weights must not
            change.
    """
    inside = () if not isinstance(network, nn.Module) or hasattr(network, COMPILED) else network.modules()
    parts = [part for part in inside if isinstance(part, Remembering)]
    for part in parts:
        part.memory = Remembered()
    try:
        yield
    finally:
        for part in parts:
            part.memory = None
