"""Which micro-batch a denoiser is trained with, if that is to be found: measured once, and kept beside the checkpoints.

A resumed run takes what was found before on the same kind of devices: another micro-batch rounds its sums otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from jobs.wiring.machine import look_around
from jobs.wiring.memory_forecast import Denoising, denoiser_loss, needed
from ldm import storage
from ldm.denoiser import build_denoiser
from ldm.training.engine import autocast
from ldm.training.loop import Progress
from ldm.training.micro_batch import Trial, find_micro_batch
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

    Raises:
        ValueError: if not even one row fits into memory.
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
    """Return what was found before; 0 for nothing, or for something else."""
    if not storage.exists(path):
        return 0
    try:
        content = json.loads(storage.read_text(path))
        return int(content["micro_batch_size"]) if content["made_for"] == json.loads(json.dumps(made_for)) else 0
    except (ValueError, KeyError, TypeError):  # half written
        return 0


def _found(
    training: Denoising, path: str, made_for: dict[str, Any], world: World, report: Callable[[Progress], None]
) -> int:
    look = partial(look_around, world)

    def fits(rows: int) -> bool:
        candidate = replace(training, engine=replace(training.engine, micro_batch_size=rows, finds_micro_batch=False))
        return has_room(world, world.gather(needed(candidate) if world.is_main else None)[0], look)

    with torch.random.fork_rng():
        network = build_denoiser(training.unet, training.conditioning).to(world.device)
        rows, trials = find_micro_batch(world, training.num_rows, fits, partial(_seconds, training, network, world))
    if world.is_main:
        content = {
            "micro_batch_size": rows,
            "made_for": made_for,
            "trials": {t.rows: t.rows_per_second for t in trials},
        }
        storage.write_text(path, json.dumps(content, indent=1) + "\n")
    report(Progress(done=0, total=0, notice=_sentence(rows, training.num_rows, trials)))
    return rows


def _seconds(training: Denoising, network: nn.Module, world: World, rows: int) -> float | None:
    """Return the seconds of a forward and backward pass; None if there is not enough memory."""
    try:
        for number in range(WARMUPS + MEASURED):
            if number == WARMUPS:
                begun = _now(world)
            network.zero_grad(set_to_none=True)
            with torch.device(world.device), autocast(training.engine.precision, world.device):
                loss = denoiser_loss(network, training, rows)
            torch.autograd.backward(loss)
        return (_now(world) - begun) / MEASURED
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        network.zero_grad(set_to_none=True)
        if world.device.type == "cuda":
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
