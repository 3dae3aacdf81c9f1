"""What is trained: a task turns a batch into updates of its networks, measures itself and draws what a person looks at.

The loop knows only this protocol; stage 1 (autoencoder against discriminator) and stage 2 (denoiser) are two tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from ldm.training.saved_state import Resumable
from ldm.types import Image


class NotFiniteError(FloatingPointError, ValueError):
    """Data or a loss that are no numbers; a ValueError too, since a person can do something about it."""


class Keyed(Protocol):
    """A batch that says which rows it is made of."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the rows' keys."""
        ...


BatchT_contra = TypeVar("BatchT_contra", bound=Keyed, contravariant=True)


class Task(Protocol[BatchT_contra]):
    """One thing to train."""

    @property
    def engines(self) -> Mapping[str, Resumable]:
        """Every network that is trained, by name, and other state to resume; checkpoints save and restore each."""
        ...

    def step(self, batch: BatchT_contra, samples_seen: int, num_samples: int) -> dict[str, Tensor | float]:
        """Make one update on this process's share of a batch.

        Args:
            batch: the share's rows.
            samples_seen: rows seen by all processes before this batch.
            num_samples: rows of the whole batch over all processes.

        Returns:
            Metrics of this process's share, still on the device.
        """
        ...

    def flops(self, batch: BatchT_contra, samples_seen: int) -> float:
        """Return the FLOPs of this process's passes in a step on a batch: forward and backward, nothing repeated.

        Args:
            batch: as given to `step`.
            samples_seen: as given to `step`.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Measure on held-out rows with the averaged weights. All processes call it together; the same on each."""
        ...

    def pictures(self) -> dict[str, Image]:
        """Return named batches of images to look at, for the main process; all processes call it together."""
        ...
