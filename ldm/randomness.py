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
from jaxtyping import UInt64
from torch import Tensor

Words = UInt64[np.ndarray, " n"]
MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
ROUNDS = 10
LOW_BITS = np.uint64(0xFFFFFFFF)
HALF_WORD = np.uint64(32)


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
    BUCKET = 11
    CROP = 12
    MASK = 13
    LEVEL = 14
    SMALL_NOISE = 15
    CODE = 20


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
    """Return the first draw from [0, 1) of each row's generator, shape (number of samples,), float64 on the CPU."""
    positions = np.fromiter(samples, np.int64).astype(np.uint64)
    words = _first_words(np.uint64(seed & (2**64 - 1)), np.uint64(int(draw)), np.uint64(sub), positions)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _first_words(key0: np.uint64, key1: np.uint64, sub: np.uint64, samples: Words) -> Words:
    """Return word 0 of Philox4x64-10 (Salmon et al. 2011, section 3.3) at the counters that numpy reads first."""
    c0, c1, c2, c3 = np.ones_like(samples), np.full_like(samples, sub), samples, np.zeros_like(samples)
    with np.errstate(over="ignore"):
        for _ in range(ROUNDS):
            high0, low0 = _wide_product(MULTIPLIERS[0], c0)
            high1, low1 = _wide_product(MULTIPLIERS[1], c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
            key0, key1 = key0 + WEYL[0], key1 + WEYL[1]
    return c0


def _wide_product(factor: np.uint64, words: Words) -> tuple[Words, Words]:
    """Return the high and low 64 bits of each 128-bit product."""
    f_low, f_high = factor & LOW_BITS, factor >> HALF_WORD
    w_low, w_high = words & LOW_BITS, words >> HALF_WORD
    cross = f_high * w_low + (f_low * w_low >> HALF_WORD)
    middle = f_low * w_high + (cross & LOW_BITS)
    return f_high * w_high + (cross >> HALF_WORD) + (middle >> HALF_WORD), factor * words
