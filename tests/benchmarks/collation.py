"""What the peers' loaders do with the rows of a batch, and how turns are timed, with nothing but numpy and torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

Row = tuple[str, np.ndarray, np.ndarray]
"""Key, moments and token states."""


class Batch(NamedTuple):
    """What every side of the loader benchmark hands out.

    Attributes:
        keys: the rows' names.
        moments: float32, shape (row, channel, row of the latent, column).
        states: token states, float32, padded with zeros, shape (row, token, width).
        mask: which tokens are real.
    """

    keys: Sequence[str]
    moments: torch.Tensor
    states: torch.Tensor
    mask: torch.Tensor


def collate(keys: Sequence[str], moments: Sequence[np.ndarray], states: Sequence[np.ndarray], max_tokens: int) -> Batch:
    """Stack moments, pad states, widen both: the shortest way from rows to tensors."""
    padded = torch.zeros((len(states), max_tokens, states[0].shape[1]), dtype=torch.float16)
    mask = torch.zeros((len(states), max_tokens), dtype=torch.bool)
    for row, state in enumerate(states):
        padded[row, : len(state)] = torch.from_numpy(state)
        mask[row, : len(state)] = True
    return Batch(keys, torch.from_numpy(np.stack(moments)).float(), padded.float(), mask)


def batched_rows(
    rows: Iterator[tuple[str, np.ndarray, np.ndarray]], batch_size: int, max_tokens: int
) -> Iterator[Batch]:
    """Yield whole batches of rows (key, moments, states)."""
    while len(batch := list(islice(rows, batch_size))) == batch_size:
        yield collate(*zip(*batch, strict=True), max_tokens)


def samples_a_second(batches: Iterator[Batch], num_batches: int) -> float:
    """Return how fast batches come; the first one, which starts things, is not timed."""
    next(batches)
    start = time.perf_counter()
    num_rows = sum(len(batch.keys) for batch in islice(batches, num_batches))
    return num_rows / (time.perf_counter() - start)


def digests(batches: Iterator[Batch], num_batches: int) -> dict[str, list[float]]:
    """Return what tells whether two sides gave the same row under the same key: sums over its parts."""
    found = {}
    for batch in islice(batches, num_batches):
        parts = (batch.moments.double().flatten(1), batch.states.double().flatten(1), batch.mask.double())
        weights = [torch.arange(1, part.shape[1] + 1, dtype=torch.float64) for part in parts]
        sums = torch.stack([part @ weight for part, weight in zip(parts, weights, strict=True)], dim=1)
        found.update(zip(batch.keys, sums.tolist(), strict=True))
    return found
