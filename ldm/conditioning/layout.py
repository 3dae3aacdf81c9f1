"""Layouts as sequences of tokens (Rombach et al. 2022, section 4.3.2 and appendix E.2; Jahn et al. 2021, section 3.1).

    an object    class, top left corner, bottom right corner                          30 objects: 90 tokens
    the crop     its top left and bottom right corner in the whole picture            2 tokens: 92 in all

A corner is the number of a cell of the finest square grid that the vocabulary holds: s = floor(sqrt(vocabulary)), and
(x, y) in [0, 1] is round(y (s - 1)) s + round(x (s - 1)). Classes share the numbers with the cells. An object that is
not there is three times the last number of the vocabulary, and so is every token of the null layout.

Letters: b batch, n box, l token.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.types import TokenNumbers

TOKENS_OF_BOX = 3
CROP_TOKENS = 2

Boxes = Float[Tensor, "b n 5"]
"""Class (negative for none), left, top, right, bottom in shares of the crop."""


def num_objects(config: TokenTransformerConfig) -> int:
    """Return how many objects a layout's transformer reads.

    Raises:
        ValueError: if its sequence is not made of whole objects and a crop.
    """
    number, rest = divmod(config.max_tokens - CROP_TOKENS, TOKENS_OF_BOX)
    if number < 1 or rest:
        raise ValueError(f"a layout has 3 tokens an object and 2 of the crop (30 objects: 92), got {config.max_tokens}")
    return number


def null_layout(num_rows: int, config: TokenTransformerConfig) -> TokenNumbers:
    """Return the layout of which nothing is known, shape (b, max_tokens)."""
    return torch.full((num_rows, config.max_tokens), config.vocab_size - 1)


def layout_tokens(
    boxes: Boxes, size: Float[Tensor, "b 2"], crop: Float[Tensor, "b 4"], config: TokenTransformerConfig
) -> TokenNumbers:
    """Return each row's layout and crop as token numbers, shape (b, max_tokens).

    Args:
        boxes: objects of each row in the order in which they are read; those that don't fit are left out.
        size: height and width of each whole picture.
        crop: top, left, height and width of each crop in it.
        config: the transformer that reads them.

    Raises:
        ValueError: if a class has no number in the vocabulary, or the sequence is not made of whole objects.
    """
    tokens = null_layout(len(boxes), config)
    held = boxes[:, : num_objects(config)]
    classes, none = held[..., 0].long(), config.vocab_size - 1
    if bool((classes >= none).any()):
        raise ValueError(f"layouts of {config.vocab_size} tokens have classes below {none}, got {int(classes.max())}")
    corners = _cells(held[..., 1:3], config), _cells(held[..., 3:5], config)
    objects = torch.stack([classes, *corners], dim=-1).masked_fill((classes < 0)[..., None], none)  # b n 3
    tokens[:, : TOKENS_OF_BOX * held.shape[1]] = objects.flatten(1)
    start, extent, whole = crop[:, :2].flip(1), crop[:, 2:].flip(1), size.flip(1)  # x, y
    tokens[:, -2] = _cells(start / whole, config)
    tokens[:, -1] = _cells((start + extent) / whole, config)
    return tokens


def _cells(points: Float[Tensor, "*b 2"], config: TokenTransformerConfig) -> Int[Tensor, "*b"]:
    """Return the grid cell of each (x, y)."""
    side = math.isqrt(config.vocab_size)
    across, down = (points.clamp(0, 1) * (side - 1)).round().long().unbind(-1)
    return down * side + across
