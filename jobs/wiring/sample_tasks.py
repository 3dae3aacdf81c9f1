"""The tasks of drawing: what each needs, and what each row of a grid shows.

python -m jobs.sample TASK [RECIPE] [--any.field value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ldm.samplers.tasks import Between, Prompt, Seed


class SampleTask(StrEnum):
    """What is asked of a model."""

    DRAW = "draw"
    """Pictures of prompts, or of what else the model is told."""
    VARY = "vary"
    """Pictures like one that is given: --picture FILE --strength 0.6."""
    INPAINT = "inpaint"
    """A picture anew where a mask is light: --picture FILE --mask FILE."""
    OUTPAINT = "outpaint"
    """A picture with more around it: --picture FILE --margins LEFT TOP RIGHT BOTTOM."""
    UPSCALE = "upscale"
    """A small picture larger, by a model that was trained to: --small FILE."""
    INTERPOLATE = "interpolate"
    """The way from one prompt and seed to the next: --prompts ONE OTHER --shares 0 0.5 1."""


OPTIONS = {
    SampleTask.DRAW: (),
    SampleTask.VARY: ("picture",),
    SampleTask.INPAINT: ("picture", "mask"),
    SampleTask.OUTPAINT: ("picture", "margins"),
    SampleTask.UPSCALE: ("small",),
    SampleTask.INTERPOLATE: ("shares",),
}
"""Fields that a task can't do without; those of others than DRAW are no other's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a grid.

    Attributes:
        prompt: what it shows.
        seed: of its noise.
        label: what stands beside it.
    """

    prompt: Prompt
    seed: Seed
    label: str


def with_task(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command line with a task in front as an option behind."""
    if argv and argv[0] in [*SampleTask]:
        return [*argv[1:], "--task", argv[0]]
    return list(argv)


def check_task(task: SampleTask, given: Sequence[str]) -> None:
    """Refuse a task without what it needs, and what no other task has a use for.

    Args:
        task: what is asked.
        given: fields that are not empty, of those that tasks need.

    Raises:
        ValueError: naming the options.
    """
    if lacking := [name for name in OPTIONS[task] if name not in given]:
        raise ValueError(f"{task.value} needs {' and '.join(f'--{name}' for name in lacking)}")
    if task is not SampleTask.OUTPAINT and "margins" in given:
        raise ValueError("--margins are what outpaint adds to a picture: python -m jobs.sample outpaint")
    if task is SampleTask.OUTPAINT and "mask" in given:
        raise ValueError("outpaint draws all that --margins add, and takes no --mask")
    if task not in (SampleTask.DRAW, SampleTask.UPSCALE) and "small" in given:
        raise ValueError(f"{task.value} takes no --small: python -m jobs.sample upscale")


def rows_of(task: SampleTask, prompts: Sequence[str], seed: int, shares: Sequence[float]) -> list[Row]:
    """Return what each row shows: a prompt, or for `interpolate` a place on the way from one to the other."""
    if task is not SampleTask.INTERPOLATE:
        return [Row(prompt, seed + number, prompt) for number, prompt in enumerate(prompts)]
    one, other = prompts
    way = one if one == other else f"from {one} to {other}"
    return [Row(Between(one, other, share), Between(seed, seed + 1, share), f"{share:.0%} {way}") for share in shares]
