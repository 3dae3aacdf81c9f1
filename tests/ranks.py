"""Real processes that form one group through gloo, for laws about several ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes

from ldm.training.world import World, process_group

# Ranks are forked from one process that has imported what takes seconds to import, and has done nothing else.
multiprocessing.set_forkserver_preload(["ldm.training.deepspeed_engine", "jobs.wiring.train_ldm"])


def run_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(world, *arguments)` in `size` processes and raise if one of them fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_enter, (size, port, function, arguments), nprocs=size, start_method="forkserver")


def alone() -> World:
    """Return the world of a single process."""
    return World(rank=0, size=1, device=torch.device("cpu"))


def _enter(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    group = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    torch.set_num_threads(1)
    with process_group(rank, size, torch.device("cpu")) as world:
        function(world, *arguments)
