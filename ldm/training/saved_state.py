"""State beside the networks that a checkpoint keeps: moving averages and counts, equal on every process."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ldm.training.snapshot import Snapshot
from ldm.training.world import World

STATE_NAME = "state.pt"


class Resumable(Protocol):
    """What a checkpoint saves and restores."""

    def snapshot(self) -> Snapshot:
        """Return the state to resume, as far as this process writes it. All processes call it together."""
        ...

    def load(self, folder: Path) -> None:
        """Take over a saved state. All processes call it together."""
        ...


class SavedState:
    """The buffers of a module that is not trained by gradients, written by the main process.

    Args:
        module: holds the state; every process has the same.
        world: the group of processes.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self._module = module
        self._world = world

    def snapshot(self) -> Snapshot:
        """Return the buffers."""
        return Snapshot(files={STATE_NAME: self._module.state_dict()} if self._world.is_main else {})

    def load(self, folder: Path) -> None:
        """Take over what a snapshot wrote."""
        saved = torch.load(folder / STATE_NAME, map_location=self._world.device, weights_only=True)
        self._module.load_state_dict(saved)
