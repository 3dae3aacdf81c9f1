"""Text embeddings as they are stored, and as a batch that a network sees.

Letters: b batch, n number of embeddings, l token, d embedding width, p width of the pooled output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, Int32
from torch import Tensor

from ldm.types import Condition, TextMask, TextStates


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEmbedding:
    """What a text encoder makes of one caption.

    Attributes:
        states: states of its tokens, shape (l, d).
        pooled: one vector for the whole caption, shape (p,), where the encoder has one.
    """

    states: Float16[np.ndarray, "l d"]
    pooled: Float16[np.ndarray, " p"] | None = None


EncodeTokens = Callable[[Sequence[Int32[np.ndarray, "l towers"]]], list[TextEmbedding]]
"""Returns the embedding of each of some captions, given as tokens: `TextEncoder.encode_tokens`."""


def pad_states(rows: Sequence[Float16[np.ndarray, "_ d"]], max_tokens: int) -> tuple[TextStates, TextMask]:
    """Return embeddings padded with zeros to `max_tokens`, float32, and which tokens are real.

    Raises:
        ValueError: if there is no row, or one is longer than `max_tokens`.
    """
    if not rows:
        raise ValueError("pad_states needs at least one embedding")
    lengths = np.array([len(row) for row in rows])
    if lengths.max() > max_tokens:
        raise ValueError(f"an embedding has {lengths.max()} tokens, max_tokens is {max_tokens}")
    states = np.zeros((len(rows), max_tokens, rows[0].shape[1]), np.float16)
    for padded, row in zip(states, rows, strict=True):
        padded[: len(row)] = row
    mask = np.arange(max_tokens) < lengths[:, None]
    # Torch widens fp16 several times faster than numpy does row by row.
    return torch.from_numpy(states).float(), torch.from_numpy(mask)


def stacked_pooled(embeddings: Sequence[TextEmbedding]) -> Float16[np.ndarray, "n p"] | None:
    """Return the pooled outputs of embeddings as rows, or none if they have none.

    Raises:
        ValueError: if some have one and others have not.
    """
    rows = [embedding.pooled for embedding in embeddings if embedding.pooled is not None]
    if rows and len(rows) < len(embeddings):
        raise ValueError(f"{len(rows)} of {len(embeddings)} embeddings have a pooled output: all or none must")
    return np.stack(rows) if rows else None


def condition_of(embeddings: Sequence[TextEmbedding], max_tokens: int) -> Condition:
    """Return what a network is told by embeddings, one a row: states padded to `max_tokens`, and pooled outputs.

    Raises:
        ValueError: if there is no embedding, one is too long, or only some have a pooled output.
    """
    states, mask = pad_states([embedding.states for embedding in embeddings], max_tokens)
    pooled = stacked_pooled(embeddings)
    return Condition(states=states, mask=mask, pooled=None if pooled is None else torch.from_numpy(pooled).float())


def embedded_condition(
    tokens: Sequence[Int32[np.ndarray, "l towers"]], encode: EncodeTokens, max_tokens: int
) -> Condition:
    """Return what a network is told by captions that are given as tokens; equal ones are embedded once."""
    distinct = {row.tobytes(): row for row in tokens}
    of_tokens = dict(zip(distinct, encode(list(distinct.values())), strict=True))
    return condition_of([of_tokens[row.tobytes()] for row in tokens], max_tokens)


def numbered_condition(tokens: Sequence[Int32[np.ndarray, "l 1"]], max_tokens: int) -> Condition:
    """Return what a trained transformer is told by captions: their tokens' numbers, padded with 0 to one length.

    Raises:
        ValueError: if a caption is too long, or its tokens are of several tokenizers.
    """
    padded = np.zeros((len(tokens), max_tokens), np.int64)
    for row, numbers in zip(padded, tokens, strict=True):
        if numbers.shape[1] != 1 or len(numbers) > max_tokens:
            raise ValueError(f"a trained transformer reads {max_tokens} tokens of one tokenizer, got {numbers.shape}")
        row[: len(numbers)] = numbers[:, 0]
    return Condition(tokens=torch.from_numpy(padded))


def blended(one: Condition, other: Condition, share: Float[Tensor, " b"]) -> Condition:
    """Return captions' states and vectors a share of the way from one to another.

    Between the two ends a token of either is a token; the shorter caption has states of zero there.

    Raises:
        ValueError: if they are numbers of tokens, which have nothing between them.
    """
    if one.tokens is not None:
        raise ValueError("nothing lies between two captions that are read as numbers of tokens: blend seeds only")
    if one.states is None or other.states is None:
        return one
    weight = share.to(one.states.device, one.states.dtype)[:, None]
    mask = None
    if one.mask is not None and other.mask is not None:
        mask = (one.mask & (weight < 1)) | (other.mask & (weight > 0))
    return Condition(
        states=torch.lerp(one.states, other.states, weight[..., None]),
        mask=mask,
        pooled=None if one.pooled is None or other.pooled is None else torch.lerp(one.pooled, other.pooled, weight),
    )
