"""Layouts as sequences of numbers (Rombach et al. 2022, section 4.3.2 and appendix E.2; Jahn et al. 2021, section 3.1).

    an object    class, top left corner, bottom right corner                          30 objects: 90 tokens
    the crop     its top left and bottom right corner in the whole picture            2 tokens: 92 in all

A corner is the number of a cell of the finest square grid that the vocabulary holds: s = floor(sqrt(vocabulary)), and
(x, y) in [0, 1] is round(y (s - 1)) s + round(x (s - 1)). Classes share the numbers with the cells. An object that is
not there is three times the last number of the vocabulary, and so is every token of the null layout.

A transformer reads them one by one, which is the paper's form; or `BoxReader` reads each object as a whole.

Letters: b batch, n box, l token, d width, h latent row, w latent column, k channel.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.types import SpatialCondition, TextStates, TokenNumbers

TOKENS_OF_BOX = 3
CROP_TOKENS = 2
WAVES = 4
"""Sines, and cosines, by which a share of a side is told: of 1, 2, 4 and 8 half turns over the whole side."""
POSITION_CHANNELS = 4 * WAVES
"""Sines and cosines of a position's row and column."""
NUMBERS_OF_BOX = 8
"""Centre, both corners and extent."""

Boxes = Float[Tensor, "b n 5"]
"""Class (negative for none), left, top, right, bottom in shares of the crop."""


class LayoutForm(StrEnum):
    """How a layout is read."""

    TOKENS = "tokens"
    """Class and corners are tokens of a transformer: the paper."""
    BOXES = "boxes"
    """An object is one token, of its class and waves of its sides (Li et al. 2023, GLIGEN, section 3.2), and waves of
    each latent's own row and column lie beside it: followed after a tenth of the samples, where data are few."""


class BoxReader(nn.Module):
    """A token for each object, and one for the crop: its class, centre, corners and extent through two layers."""

    def __init__(self, config: TokenTransformerConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.vocab_size, width)  # the last one is of what has no class
        self.to_hidden = nn.Linear(width + NUMBERS_OF_BOX * 2 * WAVES, 2 * width)
        self.to_out = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: TokenNumbers) -> TextStates:
        """Return a state for each object and for the crop, shape (b, n + 1, d); what is not there has no waves."""
        none = self.config.vocab_size - 1
        crop = torch.cat([torch.full_like(tokens[:, :1], none), tokens[:, -CROP_TOKENS:]], dim=1)
        parts = torch.cat([tokens[:, :-CROP_TOKENS], crop], dim=1).unflatten(1, (-1, TOKENS_OF_BOX))  # b n+1 3
        start, end = (_places(parts[..., corner], self.config) for corner in (1, 2))
        numbers = torch.cat([(start + end) / 2, start, end, end - start], dim=-1)
        is_there = (parts[..., 1] != none)[..., None]
        told = waves(numbers).flatten(-2) * is_there
        embedded: Tensor = self.class_embedding(parts[..., 0])
        hidden = nn.functional.silu(self.to_hidden(torch.cat([embedded, told.to(embedded.dtype)], dim=-1)))
        states: Tensor = self.norm(self.to_out(hidden))
        return states


def waves(shares: Float[Tensor, "*s"]) -> Float[Tensor, "*s k"]:
    """Return sines and cosines of shares of a side; near shares have near waves."""
    turns = shares[..., None] * math.pi * 2.0 ** torch.arange(WAVES, device=shares.device)
    return torch.cat([turns.sin(), turns.cos()], dim=-1)


def position_channels(num_rows: int, size: tuple[int, int]) -> SpatialCondition:
    """Return the waves of each position's row and column in the whole, shape (b, k, h, w)."""
    rows, columns = (waves((torch.arange(side) + 0.5) / side).T for side in size)
    height, width = size
    both = torch.cat([rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)])
    return both.expand(num_rows, -1, -1, -1)


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


def _places(cells: Int[Tensor, "*b"], config: TokenTransformerConfig) -> Float[Tensor, "*b 2"]:
    """Return the (x, y) of grid cells in [0, 1]: `_cells` backwards."""
    side = math.isqrt(config.vocab_size)
    return torch.stack([cells % side, cells // side], dim=-1) / (side - 1)


def _cells(points: Float[Tensor, "*b 2"], config: TokenTransformerConfig) -> Int[Tensor, "*b"]:
    """Return the grid cell of each (x, y)."""
    side = math.isqrt(config.vocab_size)
    across, down = (points.clamp(0, 1) * (side - 1)).round().long().unbind(-1)
    return down * side + across
