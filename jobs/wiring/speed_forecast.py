"""The forecast of a stage-2 training's images a second: what its ranks make by forward and backward passes alone.

    forecast = rows of a micro-batch / seconds of its passes on the slowest rank x number of ranks

It is what the run would make if data, communication, optimizer and averages were free. Passes are timed on the device
that trains, at the start of each attempt on all ranks together, before the network is built that is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jobs.wiring.machine import look_around
from jobs.wiring.memory_forecast import Denoising
from jobs.wiring.micro_batch import rate_of, search
from jobs.wiring.trials import trial_memory, trials_of
from ldm.training.local_launch import LaunchConfig, Where
from ldm.training.micro_batch import NothingFitsError, rate_of_slowest
from ldm.training.pace import pace_in_words
from ldm.training.self_tests import has_room
from ldm.training.world import World


def forecast_rate(training: Denoising, world: World, searched: float = 0.0) -> float:
    """Return images a second of all the ranks that train; 0 where a trial has no room. All processes call it together.

    Args:
        training: with the micro-batch that it is trained with.
        world: the ranks that measure; where they are fewer than train, the others are taken to be like the slowest.
        searched: rows a second of the slowest rank, where a search for the micro-batch measured them just now; else 0.
    """
    return training.num_ranks * (searched or _measured(training, world))


def dry_forecast(training: Denoising, launch: LaunchConfig, samples_seen: int, total_samples: int) -> str:
    """Return a dry run's line of the forecast, measured by one rank in this process if a device as asked for is here.

    Args:
        training: what is forecast.
        launch: where its ranks are to run.
        samples_seen: that are behind it.
        total_samples: of the whole training.
    """
    if not training.is_on_cpu and not torch.cuda.is_available():
        return "forecast  of images a second: needs a GPU like the workers', and this machine has none"
    device = torch.device("cpu") if training.is_on_cpu else torch.device("cuda", torch.cuda.current_device())
    world = World(rank=0, size=1, device=device)
    with _threads_of_a_rank(launch, device):
        rate = forecast_rate(training.with_least_rows(), world, _searched(training, world))
    if not rate:
        return "forecast  of images a second: the passes of one rank have no room on this machine now"
    # What else the machine does now slows the passes down; more ranks on it would share the bandwidth of its memory.
    about = "about " if training.is_on_cpu else ""
    return f"forecast  {about}{pace_in_words(rate, training.num_ranks, samples_seen, total_samples)}"


def _measured(training: Denoising, world: World) -> float:
    """Return rows a second of the slowest rank; 0 without room, which a CPU would not tell but end the process."""
    rows = training.engine.micro_batches(training.num_rows)[0][1]
    there = look_around(world)
    needed = world.gather(trial_memory(training, rows) if world.is_main else None)[0]
    if not has_room(world, needed, there):
        return 0.0
    with trials_of(training, world) as seconds_of:
        return rate_of_slowest(world, rows, seconds_of)


def _searched(training: Denoising, world: World) -> float:
    """Return rows a second of the micro-batch that a start would find here; 0 where it is stated, or none fits."""
    if not training.engine.finds_micro_batch:
        return 0.0
    try:
        return rate_of(*search(training, world))
    except NothingFitsError:
        return 0.0


@contextmanager
def _threads_of_a_rank(launch: LaunchConfig, device: torch.device) -> Iterator[None]:
    """Compute with as many threads as a worker under Ray; anywhere else a rank has those of its process."""
    before = torch.get_num_threads()
    if launch.where is Where.RAY and device.type == "cpu":
        torch.set_num_threads(max(1, int(launch.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
