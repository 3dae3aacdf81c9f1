"""What a person can do when memory runs out, in place of a library's own words."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ldm.training.world import World

NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What torch says in a plain RuntimeError when the machine itself has no more."""
REMEDIES = (
    "What takes less, what costs least first: a smaller --engine.micro-batch-size (with "
    "--no-engine.finds-micro-batch, if that was asked for) or --batch-size; --engine.kind "
    "deepspeed with --engine.zero-config infra/deepspeed/zero2.json, then zero3.json; offload to the machine's memory, "
    "zero2-offload.json or zero3-offload.json (not if it is that memory that ran out). Start the same command again "
    "with one of them; it goes on from the last checkpoint where that allows it"
)


class OutOfMemoryError(MemoryError, ValueError):
    """Memory ran out; a ValueError too, since a person can do something about it and another try can't."""


@contextmanager
def memory_explained(world: World, where: Callable[[], str]) -> Iterator[None]:
    """Run a block and say what takes less memory if it runs out.

    Args:
        world: the group of processes.
        where: says in words where this process is.

    Raises:
        OutOfMemoryError: if there was not enough, on the device or on the machine.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        kind = str(world.device) if isinstance(error, torch.OutOfMemoryError) else f"machine {socket.gethostname()}"
        first_line = str(error).strip().partition("\n")[0]
        raise OutOfMemoryError(f"no memory is left on {kind}: {where()}. {first_line}. {REMEDIES}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that there was not enough memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_HOST_MEMORY in str(error)
