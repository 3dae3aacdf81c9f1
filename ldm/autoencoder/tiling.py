"""Encoding and decoding in overlapping tiles, so that memory is that of one tile whatever the picture's sides.

    out(p) = sum_i w_i(p) tile_i(p)        sum_i w_i(p) = 1        w_i rises linearly over the overlap

Tiles are spread evenly and have one size. Each position's weights are those of its row times those of its column, and
continuous, so no tile's border shows as an edge.

What a tile's positions differ by from the whole picture's has two causes. Beyond a tile's border lies zero padding
instead of the picture: it reaches as far in as the convolutions see, and with a margin of `sight` pixels, which are
computed and not used, none of it is left. Group normalisation and attention take a tile for the whole picture: that
stays, and is small where tiles look alike (the tests say how small).

Letters: b batch, c latent channel, m moment channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.types import Image, Latent, Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A tile's place along one axis, in latent positions.

    Attributes:
        start: its first position.
        stop: behind its last one.
    """

    start: int
    stop: int

    def times(self, factor: int) -> slice:
        """Return the same place in units that are `factor` times as fine."""
        return slice(self.start * factor, self.stop * factor)


def tiled_encode(
    autoencoder: Autoencoder, image: Image, *, tile: int = 512, overlap: int = 64, margin: int = 0, rows: int = 0
) -> Moments:
    """Return what `autoencoder.encode` does, computed in tiles.

    Args:
        autoencoder: on the device of the image.
        image: of any sides that are multiples of the factor.
        tile: side of a tile in pixels, a multiple of the factor; a picture no larger is one tile.
        overlap: least pixels that neighbouring tiles share, a multiple of the factor.
        margin: pixels at a tile's inner borders that are not used; `sight` says how many there can be a use for.
        rows: images at once; 0 for all.

    Raises:
        ValueError: if a side, the tile, the overlap or the margin do not fit.
    """
    config = autoencoder.config
    factor = config.factor
    if image.shape[-2] % factor or image.shape[-1] % factor:
        raise ValueError(f"image sides must be multiples of {factor}, got {tuple(image.shape[-2:])}")
    grid = _Grid.of(config, image.shape[-2] // factor, image.shape[-1] // factor, (tile, overlap, margin))
    return torch.cat([grid.blended(_tiles(part, factor, autoencoder.encode), 1) for part in _pieces(image, rows)])


def tiled_decode(
    autoencoder: Autoencoder, latent: Latent, *, tile: int = 512, overlap: int = 64, margin: int = 0, rows: int = 0
) -> Image:
    """Return what `autoencoder.decode` does, computed in tiles.

    Args:
        autoencoder: on the device of the latent.
        latent: raw, of any sides; for vq not yet quantised, or quantised, which is the same.
        tile: side of a tile in pixels, a multiple of the factor; a picture no larger is one tile.
        overlap: least pixels that neighbouring tiles share, a multiple of the factor.
        margin: pixels at a tile's inner borders that are not used; `sight` says how many there can be a use for.
        rows: images at once; 0 for all.

    Raises:
        ValueError: if the tile, the overlap or the margin do not fit.
    """
    factor = autoencoder.config.factor
    grid = _Grid.of(autoencoder.config, latent.shape[-2], latent.shape[-1], (tile, overlap, margin))
    return torch.cat([grid.blended(_tiles(part, 1, autoencoder.decode), factor) for part in _pieces(latent, rows)])


def sight(config: AutoencoderConfig) -> int:
    """Return how far the convolutions of encoder and decoder see at most, in pixels, as a multiple of the factor."""
    blocks = 2 * (config.num_res_blocks + 1) * sum(config.factors)  # two 3x3 convolutions a block; the decoder has more
    changes = 2 * sum(config.factors[:-1])  # an encoder's halving reads two positions ahead
    middle = 2 * 2 * config.factor
    ends = 1 + config.factor
    within = config.factor  # from one end of a latent position's pixels to the other
    return -(-(blocks + changes + middle + ends + within) // config.factor) * config.factor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """Where tiles lie, in latent positions."""

    height: int
    width: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    overlap: int
    margin: int

    @classmethod
    def of(cls, config: AutoencoderConfig, height: int, width: int, pixels: tuple[int, int, int]) -> _Grid:
        """Return the grid for a latent of these sides; `pixels` are tile, overlap and margin."""
        factor = config.factor
        tile, overlap, margin = (number // factor for number in pixels)
        if any(number % factor for number in pixels):
            raise ValueError(f"tile, overlap and margin must be multiples of {factor} px, got {pixels}")
        if not 0 <= 2 * margin < overlap < tile:
            raise ValueError(f"a tile must be larger than its overlap, and that than two margins, got {pixels}")
        rows, columns = (_spans(side, tile, overlap) for side in (height, width))
        return cls(height=height, width=width, rows=rows, columns=columns, overlap=overlap, margin=margin)

    def blended(self, tile_at: Callable[[Span, Span], Tensor], factor: int) -> Float[Tensor, "b c y x"]:
        """Return all tiles, each weighed, in units `factor` times as fine as latent positions."""
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


def _pieces(whole: Tensor, rows: int) -> tuple[Tensor, ...]:
    return whole.split(rows or max(1, len(whole)))


def _tiles(whole: Tensor, factor: int, network: Callable[[Tensor], Tensor]) -> Callable[[Span, Span], Tensor]:
    """Return what the network makes of a tile, of which `whole` has `factor` pixels a position."""
    return lambda row, column: network(whole[:, :, row.times(factor), column.times(factor)])
