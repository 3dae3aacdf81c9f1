"""Too many lost steps in a row, and the way back: weights of a checkpoint, and on behind the rows that lost them.

The clock stays where it is, so learning rate, noise and data go on as functions of it. Weights, optimizers and averages
become those of the latest whole checkpoint, or of the one before it where the last rollback led to no other checkpoint:
what lost the steps may lie in these weights. They are saved at this clock at once, in place of the latest checkpoint,
so a run that is killed goes on from here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm import storage
from ldm.training.checkpoint import CheckpointStore
from ldm.training.saved_state import Resumable
from ldm.training.state import TrainState
from ldm.training.task import NotFiniteError
from ldm.training.window import Window
from ldm.training.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class LostRow:
    """Too many lost steps in a row.

    Attributes:
        first: samples seen before them.
        ended_at: samples seen after them.
        num_steps: how many they are.
        names: the metrics that were not finite.
        place: the file with the keys of their rows.
    """

    first: int
    ended_at: int
    num_steps: int
    names: list[str]
    place: str

    def sentence(self) -> str:
        """Return what happened, in words."""
        return (
            f"{self.num_steps} steps in a row, from {self.first:,} to {self.ended_at:,} samples, were not finite "
            f"({', '.join(self.names)}), so they are lost; the keys of their rows are in {self.place}"
        )

    def error(self) -> NotFiniteError:
        """Return what ends the run."""
        return NotFiniteError(
            f"{self.sentence()}. The last checkpoint is from before. More --loop.max-lost-steps lets the same run go "
            "on, more --loop.max-rollbacks lets it go back to that checkpoint and pass these rows over; a lower "
            "optim.lr or other data is another run, in a root of its own"
        )


def look_for_lost_row(
    window: Window, max_lost_steps: int, batch_size: int, checkpoints: CheckpointStore, world: World
) -> LostRow | None:
    """Return the steps that were lost in a row, once they are too many, with their keys saved beside the checkpoints.

    All processes call it together and get the same. It reads back from the device.
    """
    ended_at = max(world.gather(window.ended_at()))
    if not ended_at:
        return None
    names = sorted({name for _, names in world.gather(window.lost()) for name in names})
    first = ended_at - max_lost_steps * batch_size
    place = storage.join(checkpoints.root, f"lost-{first:012d}.json")
    _save_keys(place, window, (first, ended_at), {"metrics": names}, world)
    return LostRow(first=first, ended_at=ended_at, num_steps=max_lost_steps, names=names, place=place)


def roll_back(
    engines: Mapping[str, Resumable], window: Window, state: TrainState, checkpoints: CheckpointStore, world: World
) -> TrainState | None:
    """Go back to a checkpoint's weights at the same clock, which is to be saved; None if there is no checkpoint.

    The keys of the rows since then are saved beside the checkpoints, as far as the window has them. All processes call
    it together.
    """
    latest = int((world.gather(checkpoints.names())[0] or ["0"])[-1])
    came_from, at = state.passed_over[-1] if state.passed_over else (0, -1)
    # The weights that the last rollback took were lost again: they go on in its own checkpoint, and may still be there.
    restored = checkpoints.restore(engines, before=came_from) if at == latest else None
    restored = restored or checkpoints.restore(engines)
    if restored is None:
        return None
    span = (restored.samples_seen, state.samples_seen)
    place = storage.join(checkpoints.root, f"passed-over-{span[0]:012d}-{span[1]:012d}.json")
    _save_keys(place, window, span, {}, world)
    window.forgive()
    return state.rolled_back(restored.samples_seen)


def _save_keys(place: str, window: Window, span: tuple[int, int], facts: Mapping[str, Any], world: World) -> None:
    """Write the keys of each step between two samples, of all processes together."""
    by_rank = world.gather(window.keys_between(*span))
    if world.is_main:
        keys = [[key for share in step for key in share] for step in zip(*by_rank, strict=True)]
        storage.write_text(place, json.dumps({"samples": list(span), **facts, "keys": keys}, indent=1))
