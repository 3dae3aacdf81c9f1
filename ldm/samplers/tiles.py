"""Sampling in overlapping tiles: each call of the network sees one, so memory is a tile's (Bar-Tal et al. 2023).

    f(z, t) = sum_i w_i f(z_i, t)        sum_i w_i = 1        at every step, so that neighbours agree at the end

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from ldm.samplers.guidance import Network
from ldm.tiles import Span, TileGrid
from ldm.types import Condition, Latent

OVERLAP_SHARE = 4
"""Neighbouring tiles share at least this part, one fourth, of a tile's side."""


def tiled_network(network: Network, tile: int) -> Network:
    """Return a network that calls another one tile by tile, and blends what it puts out.

    What lies beside the latent, and a semantic map, are cut as the latent is; words, classes and layouts are told of
    every tile as they are. The output is linear in noise, velocity and clean latent, so blending either is the same.

    Args:
        network: sees tiles only.
        tile: side of a tile in latent positions; a latent no larger is one tile.
    """
    overlap = max(1, tile // OVERLAP_SHARE)

    def predict(noisy: Latent, timestep: Float[Tensor, " b"], condition: Condition) -> Latent:
        height, width = noisy.shape[-2], noisy.shape[-1]
        if max(height, width) <= tile:
            return network(noisy, timestep, condition)

        def tile_at(rows: Span, columns: Span) -> Latent:
            part = noisy[:, :, rows.times(1), columns.times(1)]
            return network(part, timestep, _cut(condition, rows, columns, width))

        return TileGrid.of(height, width, tile=tile, overlap=overlap).blended(tile_at)

    return predict


def _cut(condition: Condition, rows: Span, columns: Span, width: int) -> Condition:
    """Return the condition of a tile of a latent of so many columns."""
    spatial, shown = condition.spatial, condition.semantic_map
    if spatial is not None:
        spatial = spatial[:, :, rows.times(1), columns.times(1)]
    if shown is not None:
        factor = shown.shape[-1] // width
        shown = shown[:, rows.times(factor), columns.times(factor)]
    return replace(condition, spatial=spatial, semantic_map=shown)
