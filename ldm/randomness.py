"""Random draws as pure functions of (seed, purpose, sample): no state, so nothing to save and nothing to lose.

Each row of training has a position in the endless sequence of samples. Its noise, timestep, caption and dropout are
read from a counter-based generator (Philox, Salmon et al. 2011) keyed by the seed and the purpose, at that position.
The draws of a row therefore do not depend on batch size, rank, world size or what was drawn before.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """What a draw is for; each purpose has its own independent stream."""

    NOISE = 1
    TIMESTEP = 2
    POSTERIOR = 3
    CAPTION = 4
    DROPOUT = 5
    FLIP = 6
    SHUFFLE = 7
    INITIAL = 8
    STEP = 9
    OFFSET = 10


def generator(seed: int, draw: Draw, sample: int, sub: int = 0) -> np.random.Generator:
    """Return the generator of one row for one purpose; `sub` separates further draws of the same row."""
    key = np.array([seed & (2**64 - 1), int(draw)], dtype=np.uint64)
    counter = np.array([0, sub, sample, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, draw: Draw, samples: Iterable[int], shape: tuple[int, ...], sub: int = 0) -> Tensor:
    """Return standard normal draws, shape (number of samples, *shape), float32 on the CPU."""
    rows = [generator(seed, draw, int(sample), sub).standard_normal(shape, dtype=np.float32) for sample in samples]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, draw: Draw, samples: Iterable[int], sub: int = 0) -> Tensor:
    """Return draws from [0, 1), shape (number of samples,), float64 on the CPU."""
    return torch.tensor([generator(seed, draw, int(sample), sub).random() for sample in samples], dtype=torch.float64)
