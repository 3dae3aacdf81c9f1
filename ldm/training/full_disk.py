"""A disk that fills up while something is written: how it shows, and that every process learns of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from ldm.training.world import World

Made = TypeVar("Made")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCH_WRITER = "inline_container"
"""Where torch fails, in a plain RuntimeError ("unexpected pos"), when its file did not take all bytes."""


class FullDiskError(ValueError):
    """A disk took no more; a person can make room."""


def written_by_all(write: Callable[[], Made], world: World) -> Made:
    """Return what a call that writes gives, once it has ended well in every process. All call it together.

    Raises:
        FullDiskError: in every process, with the words of those whose disk took no more.
    """
    made: list[Made] = []
    problem = ""
    try:
        made.append(write())
    except (OSError, RuntimeError) as error:
        if not is_full(error):
            raise
        problem = f"rank {world.rank}: {type(error).__name__} {' '.join(str(error).split())[:200]}"
    problems = [each for each in world.gather(problem) if each]
    if problems:
        raise FullDiskError("; ".join(problems))
    return made[0]


def is_full(error: OSError | RuntimeError) -> bool:
    """Say whether an error means that a disk took no more."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return TORCH_WRITER in str(error)
