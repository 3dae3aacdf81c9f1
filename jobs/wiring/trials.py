"""Trials of a denoiser's passes on the device that trains: the seconds of forward and backward, for a number of rows.

They are eager and unsharded: what ZeRO exchanges and what torch.compile saves is not in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jobs.wiring.memory_forecast import Denoising, denoiser_loss, denoiser_pass
from ldm.denoiser import build_denoiser
from ldm.precision import Precision
from ldm.precision import autocast as computing_in
from ldm.training.memory import Memory
from ldm.training.out_of_memory import is_out_of_memory
from ldm.training.world import World

WARMUPS, MEASURED = 1, 2
"""Passes of a trial before the clock runs, and while it does."""


@contextmanager
def trials_of(training: Denoising, world: World) -> Iterator[Callable[[int], float | None]]:
    """Yield what returns a trial's seconds for a number of rows; see `Trials.seconds`.

    No random number of the run is drawn within the block, and what the trials took is given back behind it.
    """
    trials = Trials(training, world)
    try:
        with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
            yield trials.seconds
    finally:
        trials.end()


def trial_memory(training: Denoising, rows: int) -> Memory:
    """Return what a trial holds at most: the whole network, its gradients, and what a pass of so many rows keeps."""
    dtype, autocast = training.dtypes(training.configured)
    passed = denoiser_pass(training.unet, training.conditioning, training.told, rows, weights=dtype, autocast=autocast)
    weights = passed.num_weights * dtype.itemsize + passed.frozen_bytes
    return Memory(moment="trial", weights=weights, activations=passed.peak_with_gradients_bytes)


class Trials:
    """Passes of the whole network on this rank, as long as there is memory for it."""

    def __init__(self, training: Denoising, world: World) -> None:
        self._training = training
        self._world = world
        self._network: nn.Module | None = None
        self._is_too_large = False

    def seconds(self, rows: int) -> float | None:
        """Return the seconds of a forward and backward pass; None if there is not enough memory."""
        try:
            return None if self._is_too_large else self._measured(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._is_too_large = self._network is None
        self._free()  # behind the error, whose frames hold what the pass had taken
        return None

    def end(self) -> None:
        """Give back what the trials took."""
        self._network = None
        self._free()

    def _measured(self, rows: int) -> float:
        training, world = self._training, self._world
        dtype, autocast = training.dtypes(training.configured)
        precision = training.engine.precision if autocast else Precision.FP32
        if self._network is None:
            self._network = build_denoiser(training.unet, training.conditioning).to(world.device, dtype)
        for number in range(WARMUPS + MEASURED):
            if number == WARMUPS:
                begun = _now(world)
            self._network.zero_grad(set_to_none=True)
            with torch.device(world.device), computing_in(precision, world.device):
                loss = denoiser_loss(self._network, training, rows)
            torch.autograd.backward(loss)
        return (_now(world) - begun) / MEASURED

    def _free(self) -> None:
        if self._network is not None:
            self._network.zero_grad(set_to_none=True)
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
