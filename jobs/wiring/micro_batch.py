"""Which micro-batch a denoiser is trained with, if that is to be found: measured once, and kept beside the checkpoints.

A resumed run takes what was found before on as many devices of the same kind: another micro-batch rounds its sums
otherwise. Trials are eager and unsharded: what ZeRO gathers for each micro-batch is not in them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from jobs.wiring.machine import look_around
from jobs.wiring.memory_forecast import Denoising, denoiser_loss, needed
from ldm import storage
from ldm.denoiser import build_denoiser
from ldm.training.engine import autocast
from ldm.training.loop import Progress
from ldm.training.micro_batch import NothingFitsError, Trial, find_micro_batch
from ldm.training.out_of_memory import is_out_of_memory
from ldm.training.self_tests import has_room
from ldm.training.world import World

FILE = "micro_batch.json"
WARMUPS, MEASURED = 1, 2
"""Passes of a trial before the clock runs, and while it does."""


def with_micro_batch(training: Denoising, root: str, world: World, report: Callable[[Progress], None]) -> Denoising:
    """Return the training with the micro-batch that was found for it, now or before; as it is if none is asked for.

    Args:
        training: whose engine may ask for a search.
        root: folder or URL of the run, where what was found is kept.
        world: the group of processes.
        report: called with a notice of a search.

    Where none seems to fit it is one row.
    """
    if not training.engine.finds_micro_batch:
        return training
    made_for = _made_for(training, world)
    path = storage.join(root, FILE)
    known = world.gather(_known(path, made_for) if world.is_main else 0)[0]
    rows = known or _found(training, path, made_for, world, report)
    return replace(training, engine=replace(training.engine, micro_batch_size=rows, finds_micro_batch=False))


def _made_for(training: Denoising, world: World) -> dict[str, Any]:
    device = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    return {
        "device": device,
        "num_ranks": world.size,
        "rows": training.num_rows,
        "unet": training.unet.to_dict(),
        "precision": training.engine.precision.value,
        "sharding": training.configured.name,
    }


def _known(path: str, made_for: dict[str, Any]) -> int:
    """Return what was found before on such devices; 0 for nothing."""
    wanted = json.loads(json.dumps(made_for))
    return next((int(found["micro_batch_size"]) for found in _all_known(path) if found["made_for"] == wanted), 0)


def _all_known(path: str) -> list[dict[str, Any]]:
    """Return what was found on any devices; nothing if that was written by half."""
    try:
        content = json.loads(storage.read_text(path)) if storage.exists(path) else []
    except ValueError:
        return []
    is_whole = isinstance(content, list) and all(
        isinstance(found, dict) and {"micro_batch_size", "made_for"} <= set(found) for found in content
    )
    return content if is_whole else []


def _found(
    training: Denoising, path: str, made_for: dict[str, Any], world: World, report: Callable[[Progress], None]
) -> int:
    there = look_around(world)  # before the trials take of it

    def fits(rows: int) -> bool:
        candidate = replace(training, engine=replace(training.engine, micro_batch_size=rows, finds_micro_batch=False))
        return has_room(world, world.gather(needed(candidate) if world.is_main else None)[0], there)

    trying = _Trials(training, world)
    try:
        with torch.random.fork_rng():
            rows, trials = find_micro_batch(world, training.num_rows, fits, trying.seconds)
    except NothingFitsError:
        return 1
    finally:
        trying.end()
    if world.is_main:
        rates = {str(trial.rows): trial.rows_per_second for trial in trials}
        found = {"micro_batch_size": rows, "made_for": made_for, "rows_per_second": rates}
        storage.write_text(path, json.dumps([*_all_known(path), found], indent=1) + "\n")
    report(Progress(done=0, total=0, notice=_sentence(rows, training.num_rows, trials)))
    return rows


class _Trials:
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
        if self._network is None:
            self._network = build_denoiser(training.unet, training.conditioning).to(world.device)
        for number in range(WARMUPS + MEASURED):
            if number == WARMUPS:
                begun = _now(world)
            self._network.zero_grad(set_to_none=True)
            with torch.device(world.device), autocast(training.engine.precision, world.device):
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


def _sentence(rows: int, share: int, trials: list[Trial]) -> str:
    rates = {trial.rows: f"{trial.rows_per_second:,.1f}" if trial.rows_per_second else "no room" for trial in trials}
    others = ", ".join(f"{number}: {rate}" for number, rate in rates.items() if number != rows)
    beside = f" ({others})" if others else ""
    return f"micro-batches of {rows} of a worker's {share} rows: {rates[rows]} img/s a worker forward and back{beside}"
