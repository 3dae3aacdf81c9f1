"""A disk that fills up while something is written: how it shows, and that every process learns of it."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from typing import TypeVar

from ldm.storage import PLACE_ERRORS
from ldm.training.world import World

Made = TypeVar("Made")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCH_WRITER = "inline_container"
"""Where torch fails, in a plain RuntimeError ("unexpected pos"), when its file did not take all bytes."""


class FullDiskError(ValueError):
    """A disk took no more; a person can make room."""


class OtherRankError(OSError):
    """Another process could not write its part; its own error says why."""


def written_by_all(write: Callable[[], Made], world: World) -> list[Made]:
    """Return what a call that writes gives in every process, by rank, once all have ended. All call it together.

    Raises:
        FullDiskError: in every process, with the words of those whose disk took no more.
        OtherRankError: in those that could write, if another could not for another reason; that one raises its own.
    """
    made: list[Made] = []
    own: Exception | None = None
    try:
        made.append(write())
    except (RuntimeError, *PLACE_ERRORS) as error:
        own = error
        if is_full(error):
            _let_go(error)
    problem = "" if own is None else f"rank {world.rank}: {type(own).__name__} {' '.join(str(own).split())[:200]}"
    outcomes = world.gather((made, problem, own is None or is_full(own)))
    problems = "; ".join(problem for _, problem, _ in outcomes if problem)
    if not problems:
        return [each for made, _, _ in outcomes for each in made]
    if all(is_well_or_full for _, _, is_well_or_full in outcomes):
        raise FullDiskError(problems)
    raise OtherRankError(problems) if own is None else own


def _let_go(error: BaseException | None) -> None:
    """Free what the calls that ended in an error still hold: a file that is open takes up room when it is deleted."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def is_full(error: Exception) -> bool:
    """Say whether an error means that a disk took no more."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return TORCH_WRITER in str(error)
