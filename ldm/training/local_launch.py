"""Where a training runs, and its start without Ray: in this process, or as one of torchrun's.

RANK, WORLD_SIZE and LOCAL_RANK say who I am, as torchrun's contract has it; without them I am alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch

from ldm.config import Config
from ldm.training.loop import Progress
from ldm.training.world import World, process_group

Outcome = dict[str, Any]


class Where(StrEnum):
    """Where a training runs."""

    RAY = "ray"
    HERE = "here"


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig(Config):
    """On what a training runs."""

    where: Where = Where.RAY
    """ray: workers of Ray Train. here: this process, or the processes that torchrun started; no Ray is needed."""
    num_workers: int = 1
    """Workers (ranks) under Ray; torchrun decides it by itself."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a worker; also its number of compute threads when it has no GPU."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for a worker."""
    max_failures: int = 3
    """How often Ray starts the workers again after one died."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"launch.num_workers must be at least 1, got {self.num_workers}")


class Worker(Protocol):
    """What runs in every process of the group."""

    def __call__(
        self, config: Any, world: World, report: Callable[[Progress], None], should_stop: Callable[[], bool]
    ) -> Outcome:
        """Train and return plain data; the main process's is the outcome of the launch."""
        ...


def run_here(
    worker: Worker, config: Any, watch: Callable[[Progress], None], should_stop: Callable[[], bool]
) -> Outcome:
    """Run the worker in this process, as one rank of torchrun's if torchrun started it."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with process_group(rank, size, device) as world:
        return worker(config, world, watch if world.is_main else alarms_of(watch), should_stop)


def alarms_of(report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Return what takes only alarms: everything else is told by the main process."""
    return lambda progress: report(progress) if progress.is_alarm else None


def ignore(_: Progress) -> None:
    """Take no notice of what is told."""
