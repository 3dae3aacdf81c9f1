"""Overlapping tiles of a plane, so that memory is that of one tile whatever the plane's sides.

    out(p) = sum_i w_i(p) tile_i(p)        sum_i w_i(p) = 1        w_i rises linearly over the overlap

Tiles are spread evenly and have one size. Each position's weights are those of its row times those of its column, and
continuous, so no tile's border shows as an edge.

Letters: b batch, c channel, y row, x column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A tile's place along one axis.

    Attributes:
        start: its first position.
        stop: behind its last one.
    """

    start: int
    stop: int

    def times(self, factor: int) -> slice:
        """Return the same place in units that are `factor` times as fine."""
        return slice(self.start * factor, self.stop * factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGrid:
    """Where tiles lie.

    Attributes:
        height: rows of the plane.
        width: its columns.
        rows: the tiles' places along its height.
        columns: the tiles' places along its width.
        overlap: least positions that neighbouring tiles share.
        margin: positions at a tile's inner borders that are not used.
    """

    height: int
    width: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    overlap: int
    margin: int

    @classmethod
    def of(cls, height: int, width: int, *, tile: int, overlap: int, margin: int = 0, unit: int = 1) -> TileGrid:
        """Return the grid for a plane of these sides.

        Args:
            height: rows.
            width: columns.
            tile: side of a tile; a plane no larger is one tile.
            overlap: least positions that neighbouring tiles share.
            margin: positions at a tile's inner borders that are not used.
            unit: pixels of a position, for what is said to a person.

        Raises:
            ValueError: if they do not fit.
        """
        if not 0 <= 2 * margin < overlap < tile:
            raise ValueError(
                "a tile must be larger than its overlap, and that than two margins, "
                f"got {(tile * unit, overlap * unit, margin * unit)}"
            )
        rows, columns = (_spans(side, tile, overlap) for side in (height, width))
        return cls(height=height, width=width, rows=rows, columns=columns, overlap=overlap, margin=margin)

    def blended(self, tile_at: Callable[[Span, Span], Tensor], factor: int = 1) -> Float[Tensor, "b c y x"]:
        """Return all tiles, each weighed.

        Args:
            tile_at: makes the tile of these rows and columns, in units `factor` times as fine as the grid's.
            factor: as said.
        """
        whole: Tensor | None = None
        row_weights, column_weights = (
            _weights(spans, side * factor, factor, (self.overlap, self.margin))
            for spans, side in ((self.rows, self.height), (self.columns, self.width))
        )
        for row, row_weight in zip(self.rows, row_weights, strict=True):
            for column, column_weight in zip(self.columns, column_weights, strict=True):
                tile = tile_at(row, column)
                exact = torch.promote_types(tile.dtype, torch.float32)  # in halves the weights would not add up to 1
                if whole is None:
                    sides = (self.height * factor, self.width * factor)
                    whole, dtype = tile.new_zeros(*tile.shape[:2], *sides, dtype=exact), tile.dtype
                weight = (row_weight[:, None] * column_weight).to(tile.device, exact)
                whole[:, :, row.times(factor), column.times(factor)] += tile * weight
        assert whole is not None
        return whole.to(dtype)


def _spans(side: int, tile: int, overlap: int) -> tuple[Span, ...]:
    """Return tiles of one size spread evenly over a side, each sharing at least `overlap` with the next."""
    if side <= tile:
        return (Span(start=0, stop=side),)
    num_tiles = -(-(side - overlap) // (tile - overlap))
    starts = [place * (side - tile) // (num_tiles - 1) for place in range(num_tiles)]
    return tuple(Span(start=start, stop=start + tile) for start in starts)


def _weights(spans: tuple[Span, ...], side: int, factor: int, borders: tuple[int, int]) -> list[Tensor]:
    """Return each tile's weights along one axis; those of a position add up to 1."""
    overlap, margin = (length * factor for length in borders)
    whole = torch.zeros(len(spans), side, dtype=torch.float64)
    for number, span in enumerate(spans):
        length = (span.stop - span.start) * factor
        inside = torch.arange(length, dtype=torch.float64) + 0.5 - margin
        rising = (inside / (overlap - 2 * margin)).clamp(0, 1)
        weight = torch.ones(length, dtype=torch.float64)
        if span.start > 0:
            weight = weight * rising
        if span.stop * factor < side:
            weight = weight * rising.flip(0)
        whole[number, span.times(factor)] = weight
    shares = whole / whole.sum(dim=0)
    return [share[span.times(factor)] for share, span in zip(shares, spans, strict=True)]
