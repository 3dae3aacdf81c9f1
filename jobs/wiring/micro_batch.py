"""Which micro-batch a denoiser is trained with, if that is to be found: measured once, and kept beside the checkpoints.

A resumed run takes what was found before on as many devices of the same kind: another micro-batch rounds its sums
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from jobs.wiring.machine import look_around
from jobs.wiring.memory_forecast import Denoising, needed
from jobs.wiring.trials import trials_of
from ldm import storage
from ldm.training.loop import Progress
from ldm.training.micro_batch import NothingFitsError, Trial, find_micro_batch
from ldm.training.self_tests import has_room
from ldm.training.world import World

FILE = "micro_batch.json"


def with_micro_batch(
    training: Denoising, root: str, world: World, report: Callable[[Progress], None]
) -> tuple[Denoising, float]:
    """Return the training with the micro-batch that was found for it, now or before; as it is if none is asked for.

    Beside it stand the rows a second that the slowest rank made of it; 0 where nothing was measured now.

    Args:
        training: whose engine may ask for a search.
        root: folder or URL of the run, where what was found is kept.
        world: the group of processes.
        report: called with a notice of a search.

    Where none seems to fit it is one row.
    """
    if not training.engine.finds_micro_batch:
        return training, 0.0
    made_for = _made_for(training, world)
    path = storage.join(root, FILE)
    known = world.gather(_known(path, made_for) if world.is_main else 0)[0]
    rows, rate = (known, 0.0) if known else _found(training, path, made_for, world, report)
    return _with_rows(training, rows), rate


def search(training: Denoising, world: World) -> tuple[int, list[Trial]]:
    """Return the rows of the fastest micro-batch that fits and what was tried; all processes call it together.

    Raises:
        NothingFitsError: if not even one row fits.
    """
    there = look_around(world)  # before the trials take of it

    def fits(rows: int) -> bool:
        candidate = _with_rows(training, rows)
        return has_room(world, world.gather(needed(candidate) if world.is_main else None)[0], there)

    with trials_of(training, world) as seconds_of:
        return find_micro_batch(world, training.num_rows, fits, seconds_of)


def rate_of(rows: int, trials: list[Trial]) -> float:
    """Return the rows a second that the slowest rank made of a micro-batch that was tried."""
    return next(trial.rows_per_second for trial in trials if trial.rows == rows)


def _with_rows(training: Denoising, rows: int) -> Denoising:
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
) -> tuple[int, float]:
    try:
        rows, trials = search(training, world)
    except NothingFitsError:
        return 1, 0.0
    if world.is_main:
        rates = {str(trial.rows): trial.rows_per_second for trial in trials}
        found = {"micro_batch_size": rows, "made_for": made_for, "rows_per_second": rates}
        storage.write_text(path, json.dumps([*_all_known(path), found], indent=1) + "\n")
    report(Progress(done=0, total=0, notice=_sentence(rows, training.num_rows, trials)))
    return rows, rate_of(rows, trials)


def _sentence(rows: int, share: int, trials: list[Trial]) -> str:
    rates = {trial.rows: f"{trial.rows_per_second:,.1f}" if trial.rows_per_second else "no room" for trial in trials}
    others = ", ".join(f"{number}: {rate}" for number, rate in rates.items() if number != rows)
    beside = f" ({others})" if others else ""
    return f"micro-batches of {rows} of a worker's {share} rows: {rates[rows]} img/s a worker forward and back{beside}"
