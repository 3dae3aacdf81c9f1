"""Encoding and decoding in overlapping tiles, so that memory is that of one tile whatever the picture's sides.

What a tile's positions differ by from the whole picture's has two causes. Beyond a tile's border lies zero padding
instead of the picture: it reaches as far in as the convolutions see, and with a margin of `sight` pixels, which are
computed and not used, none of it is left. Group normalisation and attention take a tile for the whole picture: that
stays, and is small where tiles look alike (the tests say how small).

Letters: b batch, c latent channel, m moment channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.tiles import Span, TileGrid
from ldm.types import Image, Latent, Moments


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
    grid = _grid(config, image.shape[-2] // factor, image.shape[-1] // factor, (tile, overlap, margin))
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
    grid = _grid(autoencoder.config, latent.shape[-2], latent.shape[-1], (tile, overlap, margin))
    return torch.cat([grid.blended(_tiles(part, 1, autoencoder.decode), factor) for part in _pieces(latent, rows)])


def sight(config: AutoencoderConfig) -> int:
    """Return how far the convolutions of encoder and decoder see at most, in pixels, as a multiple of the factor."""
    blocks = 2 * (config.num_res_blocks + 1) * sum(config.factors)  # two 3x3 convolutions a block; the decoder has more
    changes = 2 * sum(config.factors[:-1])  # an encoder's halving reads two positions ahead
    middle = 2 * 2 * config.factor
    ends = 1 + config.factor
    within = config.factor  # from one end of a latent position's pixels to the other
    return -(-(blocks + changes + middle + ends + within) // config.factor) * config.factor


def _grid(config: AutoencoderConfig, height: int, width: int, pixels: tuple[int, int, int]) -> TileGrid:
    """Return the grid for a latent of these sides; `pixels` are tile, overlap and margin."""
    factor = config.factor
    tile, overlap, margin = (number // factor for number in pixels)
    if any(number % factor for number in pixels):
        raise ValueError(f"tile, overlap and margin must be multiples of {factor} px, got {pixels}")
    return TileGrid.of(height, width, tile=tile, overlap=overlap, margin=margin, unit=factor)


def _pieces(whole: Tensor, rows: int) -> tuple[Tensor, ...]:
    return whole.split(rows or max(1, len(whole)))


def _tiles(whole: Tensor, factor: int, network: Callable[[Tensor], Tensor]) -> Callable[[Span, Span], Tensor]:
    """Return what the network makes of a tile, of which `whole` has `factor` pixels a position."""
    return lambda row, column: network(whole[:, :, row.times(factor), column.times(factor)])
