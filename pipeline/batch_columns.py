"""What a batch holds of its rows beside moments and text: the cached columns of the drawn crops, mirrored with them.

    size (b, 2) float32, height and width of the upright original;  crop (b, 4) float32, top, left, height, width in it;
    class_id (b,) int64, -1 for none;
    boxes (b, n, 5) float32, class, left, top, right, bottom in shares of the crop, filled up with class -1;
    semantic_map (b, y, x) int64, -1 for none;  low_res (b, 3, y, x) float32 in [-1, 1];
    masked_moments (b, m, h, w) float32, of the image whose masked part is grey;  mask (b, 1, h, w) float32, 1 there.

Letters: b batch, m moment channel, h latent row, w latent column, y pixel row, x pixel column, n box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from pipeline.latent_columns import NO_CLASS
from pipeline.latent_shard import LatentShard
from pipeline.store.schema import NO_CLASS_PIXEL

Columns = dict[str, NDArray[Any]]
Places = Int64[np.ndarray, " r"]


class ColumnDraws(NamedTuple):
    """What is drawn for rows of one tar: whether each is mirrored, which of its crops and masks it comes with."""

    flipped: Bool[np.ndarray, " b"]
    crops: Int64[np.ndarray, " b"]
    masks: Int64[np.ndarray, " b"]


class RowDraws(NamedTuple):
    """What is drawn for each row of a batch.

    Attributes:
        quantiles: where in [0, 1) of its captions a row's choice lies.
        dropped: whether the caption is replaced by the empty one.
        flipped: whether the moments are those of the mirrored image.
        crops: where in [0, 1) of its crops a row's choice lies.
        masks: where in [0, 1) of its masks a row's choice lies.
    """

    quantiles: Float64[np.ndarray, " b"]
    dropped: Bool[np.ndarray, " b"]
    flipped: Bool[np.ndarray, " b"]
    crops: Float64[np.ndarray, " b"]
    masks: Float64[np.ndarray, " b"]

    def of(self, places: Places, shard: LatentShard) -> ColumnDraws:
        """Return the choices of rows of one tar."""
        return ColumnDraws(
            flipped=self.flipped[places],
            crops=(self.crops[places] * shard.columns.num_crops).astype(np.int64),
            masks=(self.masks[places] * shard.num_masks).astype(np.int64),
        )


def gathered_columns(shard: LatentShard, rows: Int64[np.ndarray, " b"], draws: ColumnDraws, max_boxes: int) -> Columns:
    """Return the columns that a tar has of some of its rows, as drawn."""
    facts, flipped = shard.columns, draws.flipped
    crop = facts.crops[rows, draws.crops]
    size = facts.sizes[rows].astype(np.float32)
    crop[flipped, 1] = size[flipped, 1] - crop[flipped, 1] - crop[flipped, 3]
    found: Columns = {"size": size, "crop": crop}
    if facts.class_ids is not None:
        found["class_id"] = facts.class_ids[rows].astype(np.int64)
    if facts.boxes is not None:
        found["boxes"] = _boxes(shard, rows, draws, max_boxes)
    if shard.maps is not None:
        numbers = _mirrored(shard.maps.pick(rows, draws.crops), flipped).astype(np.int64)
        found["semantic_map"] = np.where(numbers == NO_CLASS_PIXEL, NO_CLASS, numbers)
    if shard.low_res is not None:
        pixels = _mirrored(shard.low_res.pick(rows, draws.crops), flipped)
        found["low_res"] = pixels.astype(np.float32) / 127.5 - 1.0
    if shard.masks is not None and shard.masked is not None:
        found["mask"] = _mirrored(shard.masks.pick(rows, draws.masks), flipped)[:, None].astype(np.float32)
        forms = shard.masked_forms(draws.masks, draws.crops, flipped)
        found["masked_moments"] = shard.masked.pick(rows, forms).astype(np.float32)
    return found


def joined_columns(parts: Sequence[tuple[Places, Columns]], num_rows: int) -> dict[str, Tensor]:
    """Return the columns of a whole batch; each part brings those of some of its rows, and their places.

    Raises:
        ValueError: if only some parts have a column.
    """
    names = {tuple(columns) for _, columns in parts}
    if len(names) > 1:
        raise ValueError(f"tars of one cache have the same columns, got {' and '.join(map(str, sorted(names)))}")
    joined: Columns = {}
    for places, columns in parts:
        for name, column in columns.items():
            if name not in joined:
                joined[name] = np.empty((num_rows, *column.shape[1:]), column.dtype)
            joined[name][places] = column
    return {name: torch.from_numpy(column) for name, column in joined.items()}


def _boxes(
    shard: LatentShard, rows: Int64[np.ndarray, " b"], draws: ColumnDraws, max_boxes: int
) -> Float32[np.ndarray, "b n 5"]:
    """Return layouts filled up to one length, mirrored where the picture is."""
    boxes = np.zeros((len(rows), max_boxes, 5), np.float32)
    boxes[:, :, 0] = NO_CLASS
    for place, (row, crop) in enumerate(zip(rows.tolist(), draws.crops.tolist(), strict=True)):
        layout = shard.columns.boxes_of(row, crop)[:max_boxes]
        boxes[place, : len(layout)] = layout
        if draws.flipped[place]:
            boxes[place, : len(layout), 1] = 1.0 - layout[:, 3]
            boxes[place, : len(layout), 3] = 1.0 - layout[:, 1]
    return boxes


def _mirrored(arrays: NDArray[Any], flipped: Bool[np.ndarray, " b"]) -> NDArray[Any]:
    """Return the arrays, those of mirrored rows turned about their last axis."""
    arrays[flipped] = arrays[flipped][..., ::-1]
    return arrays
