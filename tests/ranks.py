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
    start_processes(_enter, (_group(size), function, arguments), nprocs=size, start_method="forkserver")


def run_fresh_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(world, *arguments)` in `size` processes that inherit nothing but the environment."""
    start_processes(_enter, (_group(size), function, arguments), nprocs=size, start_method="spawn")


def exit_codes(size: int, function: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run `function(world, *arguments)` in `size` processes, none of which is ended for another, and see their ends."""
    group = _group(size)
    server = multiprocessing.get_context("forkserver")
    ranks = [server.Process(target=_enter, args=(rank, group, function, arguments)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def alone() -> World:
    """Return the world of a single process."""
    return World(rank=0, size=1, device=torch.device("cpu"))


def _group(size: int) -> dict[str, str]:
    """Return the environment of the ranks: this process's as it is now, since theirs is as old as their server."""
    return {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _enter(rank: int, group: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    with process_group(rank, int(group["WORLD_SIZE"]), torch.device("cpu")) as world:
        function(world, *arguments)
