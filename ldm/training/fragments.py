"""Pieces of weights and of what belongs to them, in a form that any engine reads on any number of processes.

A weight is flattened; a process holds elements start to stop of it, and of its moments and averages the same ones.
Order of a save: each process that holds something of its own writes one file. Order of a load: each process maps all
files and copies from them what overlaps with its own pieces, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.training.snapshot import Snapshot

Shapes = Mapping[str, tuple[int, ...]]
WEIGHT, AVERAGE = "weight", "average"
"""A weight and its main average; a further one is `average_` and its half-life in samples."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the names that torch gives them."""
PATTERN = "fragments-*.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """What a process holds of one weight.

    Attributes:
        start: its first element in the flattened weight.
        parts: the weight, its moments and its averages: live tensors of the same number of elements, of the weight's
            own shape where all of it is held, else of one dimension.
        steps: the steps that its optimizer has made with it.
    """

    start: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)
    steps: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a load found beside the pieces that it copied.

    Attributes:
        steps: steps of the optimizer, by weight.
        extra: what the first file keeps beside fragments.
    """

    steps: dict[str, float]
    extra: dict[str, Any]


def fragments_snapshot(
    rank: int, fragments: Mapping[str, Fragment], shapes: Shapes, extra: Mapping[str, Any]
) -> Snapshot:
    """Return what a process holds, as the file that a checkpoint has of it.

    Args:
        rank: the process, which names the file.
        fragments: by the weights' names.
        shapes: the whole weights' shapes, by name.
        extra: plain data and tensors that are kept beside them; those of the lowest rank that writes are given back.
    """
    held = {
        name: {
            "start": fragment.start,
            "steps": fragment.steps,
            "parts": {part: tensor.detach().contiguous().reshape(-1) for part, tensor in fragment.parts.items()},
        }
        for name, fragment in fragments.items()
    }
    content = {"shapes": {name: list(shape) for name, shape in shapes.items()}, "held": held, "extra": dict(extra)}
    return Snapshot(files={PATTERN.replace("*", f"{rank:05d}"): content})


@torch.no_grad()
def load_fragments(folder: Path, fragments: Mapping[str, Fragment], shapes: Shapes) -> Loaded:
    """Copy into `fragments` what the files of all processes that saved hold of them.

    Raises:
        ValueError: if there is no file, if they are of another network, or do not hold all of it.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise ValueError(f"{folder} holds no {PATTERN}: it was not written by this version")
    saved = [torch.load(file, mmap=True, map_location="cpu", weights_only=True) for file in files]
    _refuse_another_network(folder, {name: tuple(shape) for name, shape in saved[0]["shapes"].items()}, shapes)
    for name, fragment in fragments.items():
        pieces = [content["held"][name] for content in saved if name in content["held"]]
        for part, target in fragment.parts.items():
            found = _joined(pieces, part, fragment.start, target.numel())
            if found is not None:
                target.copy_(found.view(target.shape))
            elif part in MOMENTS:  # a weight that no gradient has reached yet has none
                target.zero_()
            else:
                raise ValueError(f"{folder} does not hold all of the {part} of {name!r}")
    steps: dict[str, float] = {}
    for content in saved:
        for name, piece in content["held"].items():
            steps[name] = max(steps.get(name, 0.0), piece["steps"])
    return Loaded(steps=steps, extra=saved[0]["extra"])


def whole_fragments(
    weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, averages: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Fragment]:
    """Return the fragments of a process that holds all of every weight.

    Args:
        weights: by name.
        optimizer: what holds their moments.
        averages: by part, then by the weights' names.
    """
    stepped = {name: optimizer.state[weight] for name, weight in weights.items() if weight in optimizer.state}
    counts = torch.stack([state["step"] for state in stepped.values()]).tolist() if stepped else []
    steps = dict(zip(stepped, counts, strict=True))
    return {
        name: Fragment(
            parts={
                WEIGHT: weight,
                **{moment: state[moment] for moment in MOMENTS if (state := stepped.get(name))},
                **{part: average[name] for part, average in averages.items()},
            },
            steps=steps.get(name, 0.0),
        )
        for name, weight in weights.items()
    }


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the whole weights' shapes; ZeRO-3 leaves an empty weight that knows its own."""
    return {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}


def begin_moments(optimizer: torch.optim.Optimizer, weight: Tensor, steps: float) -> None:
    """Give a weight the moments that fused AdamW begins with, unless it has some, and say how many steps were made."""
    state = optimizer.state[weight]
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    state["step"] = torch.tensor(steps, dtype=torch.float32, device=weight.device)


def _joined(pieces: Iterable[Mapping[str, Any]], part: str, start: int, numel: int) -> Tensor | None:
    """Return `numel` elements from `start` on, put together from pieces, shape (numel,); None if they lack one."""
    joined, num_found = torch.empty(numel), 0
    for piece in pieces:
        values = piece["parts"].get(part)
        if values is None:
            continue
        low, high = max(start, piece["start"]), min(start + numel, piece["start"] + len(values))
        if low < high:
            joined[low - start : high - start] = values[low - piece["start"] : high - piece["start"]]
            num_found += high - low
    return joined if num_found == numel else None


def _refuse_another_network(folder: Path, saved: Shapes, now: Shapes) -> None:
    problems = [
        *_listed("it lacks", sorted(set(now) - set(saved))),
        *_listed("it has besides", sorted(set(saved) - set(now))),
        *_listed("of another shape are", sorted(n for n in set(saved) & set(now) if tuple(saved[n]) != tuple(now[n]))),
    ]
    if problems:
        raise ValueError(f"{folder} is of another network: {'; '.join(problems)}")


def _listed(what: str, names: Sequence[str]) -> list[str]:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [f"{what} {shown}"] if names else []
