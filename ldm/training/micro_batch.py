"""The search for the micro-batch that is fastest, among those that fit into memory; all ranks find the same.

From a process's whole share downwards by its divisors: of those that are forecast to fit, each is tried until two in a
row are slower than the best. What is nearly as fast counts as faster if it is larger, for it launches less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ldm.training.world import World

NEARLY = 0.02
"""Share by which one may be slower and still count as fast."""
SLOWER_IN_A_ROW = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One micro-batch that was looked at.

    Attributes:
        rows: of one forward pass.
        rows_per_second: of the slowest rank; 0 where it did not fit.
    """

    rows: int
    rows_per_second: float


class NothingFitsError(ValueError):
    """Not even a single row fits into memory."""


def find_micro_batch(
    world: World, share: int, fits: Callable[[int], bool], seconds_of: Callable[[int], float | None]
) -> tuple[int, list[Trial]]:
    """Return the rows of the fastest micro-batch and what was tried; all processes call it together.

    Args:
        world: the group of processes.
        share: rows of a batch on one process.
        fits: rows → whether they are forecast to fit, the same answer on all ranks.
        seconds_of: rows → seconds of a pass on this rank; None where there was not enough memory.

    Raises:
        NothingFitsError: if no divisor of the share fits.
    """
    trials: list[Trial] = []
    slower = 0
    for rows in (rows for rows in range(share, 0, -1) if share % rows == 0):
        rate = rate_of_slowest(world, rows, seconds_of) if fits(rows) else 0.0
        fastest = max((trial.rows_per_second for trial in trials), default=0.0)
        trials.append(Trial(rows=rows, rows_per_second=rate))
        slower = slower + 1 if 0 < rate <= fastest else 0
        if slower == SLOWER_IN_A_ROW:
            break
    fastest = max(trial.rows_per_second for trial in trials)
    if not fastest:
        raise NothingFitsError("not even a micro-batch of one row fits into memory")
    return next(trial.rows for trial in trials if trial.rows_per_second >= (1 - NEARLY) * fastest), trials


def rate_of_slowest(world: World, rows: int, seconds_of: Callable[[int], float | None]) -> float:
    """Return rows a second of the slowest rank, 0 if one had not enough memory; all processes call it together.

    Args:
        world: the group of processes.
        rows: of a pass.
        seconds_of: rows → seconds of a pass on this rank; None where there was not enough memory.
    """
    seconds = world.gather(seconds_of(rows))
    found = [one for one in seconds if one is not None]
    return rows / max(found) if len(found) == len(seconds) else 0.0
