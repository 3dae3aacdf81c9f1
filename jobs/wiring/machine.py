"""What a rank runs on, for the self-tests: the machine's name, free memory, versions and the code's digest."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from jobs.session import PROJECT
from ldm.training.local_launch import LaunchConfig, Where
from ldm.training.self_tests import Machine, source_digest
from ldm.training.world import World

CGROUP = Path("/sys/fs/cgroup")
# (limit, in use, the file and the line that say what of it can be taken back) of both kinds of control groups.
CONTROL_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
LIBRARIES = ("torch", "deepspeed")
OWN_FOLDERS = ("ldm", "pipeline", "jobs")


def look_around(world: World) -> Machine:
    """Return what is there and free now."""
    host = free_host_bytes()
    if world.device.type != "cuda":
        return Machine(name=platform.node(), device="cpu", free_device_bytes=host, free_host_bytes=host)
    free, _ = torch.cuda.mem_get_info(world.device)
    device = str(torch.cuda.get_device_properties(world.device).uuid)
    return Machine(name=platform.node(), device=device, free_device_bytes=free, free_host_bytes=host)


def free_host_bytes(groups: Path = CGROUP) -> int:
    """Return what the machine, and the control group that we run in, still give."""
    free = psutil.virtual_memory().available
    for limit, used, statistics, reclaimable in CONTROL_FILES:
        if not (groups / limit).is_file() or not (text := (groups / limit).read_text().strip()).isdigit():
            continue
        lines = (groups / statistics).read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == reclaimable)
        free = min(free, int(text) - int((groups / used).read_text()) + cached)
    return max(0, free)


def trains_on_cpu(launch: LaunchConfig) -> bool:
    """Say whether a launch's ranks have no GPU."""
    return not launch.gpus_per_worker if launch.where is Where.RAY else not torch.cuda.is_available()


def free_share(launch: LaunchConfig) -> int:
    """Return what this machine would give each rank of a launch now: of its memory, or of one of its GPUs; 0 for none.

    Where ranks will train is not asked: on a cluster it may be elsewhere.
    """
    if trains_on_cpu(launch):
        return free_host_bytes() // launch.num_workers
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def code_facts() -> dict[str, str]:
    """Return what says which code runs here: versions, and the digest of our own files."""
    facts = {name: _version(name) for name in LIBRARIES}
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        **facts,
        "code": source_digest([PROJECT / name for name in OWN_FOLDERS]),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
