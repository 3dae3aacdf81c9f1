"""Which crops of a shard's pictures go into which tar, where they lie in the originals, and cutting them out.

Order: stored sizes of the rows → a part for each shape, with the rows that have it → boxes along the longer side →
pixels, scaled down where the picture is larger than the crop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image as PillowImage

from pipeline.buckets import Box, Buckets, Size, covering_box
from pipeline.images import Pixels
from pipeline.ingest.geometry import place
from pipeline.ingest.picture import PictureConfig
from pipeline.latent_config import CropShape, LatentsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of a shard whose crops have one shape: a tar of their own.

    Attributes:
        name: what tells the tar from others of the shard, such as "320x192"; empty where there is only one.
        image_size: the size that was asked for.
        size: width and height of the crops in pixels.
        rows: numbers of its rows in the dataset's shard, ascending.
    """

    name: str
    image_size: int
    size: Size
    rows: tuple[int, ...]


def parts_of(sizes: Sequence[Size], config: LatentsConfig) -> list[Part]:
    """Return the parts of a shard whose pictures have these stored sizes: by image size, then by shape."""
    rows_of: dict[tuple[int, Size], list[int]] = {}
    for image_size in config.image_sizes:
        for row, (width, height) in enumerate(sizes):
            shape = crop_size(width, height, image_size, config)
            rows_of.setdefault((image_size, shape), []).append(row)
    order = {image_size: number for number, image_size in enumerate(config.image_sizes)}
    return [
        Part(name=part_name(image_size, size, config), image_size=image_size, size=size, rows=tuple(rows))
        for (image_size, size), rows in sorted(rows_of.items(), key=lambda entry: (order[entry[0][0]], entry[0][1]))
    ]


def crop_size(width: int, height: int, image_size: int, config: LatentsConfig) -> Size:
    """Return width and height of the crops of a picture of this stored size."""
    if config.crop.shape is CropShape.SQUARE:
        return image_size, image_size
    return buckets_of(image_size, config).nearest(width, height)


def buckets_of(image_size: int, config: LatentsConfig) -> Buckets:
    """Return the buckets of one of the config's image sizes."""
    return Buckets(image_size=image_size, step=config.crop.bucket_step, max_aspect=config.crop.bucket_max_aspect)


def part_name(image_size: int, size: Size, config: LatentsConfig) -> str:
    """Return what a part of this shape is called in a cache of this config."""
    words = [str(image_size)] if config.crop.more_sizes else []
    words += [f"{size[0]}x{size[1]}"] if config.crop.shape is CropShape.BUCKETS else []
    return "-".join(words)


def crop_boxes(key: str, width: int, height: int, size: Size, count: int) -> list[Box]:
    """Return the boxes of a picture's crops, in its stored pixels: one in the middle, or spread from end to end.

    Raises:
        ValueError: if the picture is smaller than the crop.
    """
    if width < size[0] or height < size[1]:
        raise ValueError(f"row {key} is {width}x{height}, too small for a crop of {size[0]}x{size[1]}")
    places = [0.5] if count == 1 else [number / (count - 1) for number in range(count)]
    return [covering_box(width, height, size, where) for where in places]


def cut(pixels: Shaped[np.ndarray, "y x ..."], box: Box, size: Size, *, smooth: bool = True) -> Pixels:
    """Return a box of a picture at a size: as it is where that needs no scaling, else averaged over what it covers.

    Args:
        pixels: the stored picture.
        box: the part of it.
        size: width and height of the result, at most those of the box.
        smooth: whether neighbours are averaged, bicubic; False takes the nearest one, for class numbers.
    """
    left, top, right, bottom = box
    is_whole = left.is_integer() and top.is_integer()
    if is_whole and right - left == size[0] and bottom - top == size[1]:
        return pixels[int(top) : int(bottom), int(left) : int(right)]
    resampling = PillowImage.Resampling.BICUBIC if smooth else PillowImage.Resampling.NEAREST
    return np.asarray(PillowImage.fromarray(pixels).resize(size, resampling, box=box))


def original_box(box: Box, facts: Mapping[str, Any], picture: PictureConfig | None) -> Box:
    """Return where a box of a stored picture lies in the upright original that it was made from.

    Args:
        box: part of the stored picture, in pixels.
        facts: the row's JSON: stored and original width and height.
        picture: how the dataset placed its pictures; None where that is not known, and the whole original is assumed.
    """
    width, height = int(facts["width"]), int(facts["height"])
    original_width = int(facts.get("original_width") or width)
    original_height = int(facts.get("original_height") or height)
    kept: Box = (0.0, 0.0, float(original_width), float(original_height))
    scaled, margin = (width, height), (0.0, 0.0)
    if picture is not None and (original_width, original_height) != (width, height):
        placement = place(original_width, original_height, picture)
        if placement.canvas == (width, height):
            kept, scaled = placement.box, placement.size
            margin = ((width - scaled[0]) // 2, (height - scaled[1]) // 2)
    across, down = (kept[2] - kept[0]) / scaled[0], (kept[3] - kept[1]) / scaled[1]
    left, right = (kept[0] + (side - margin[0]) * across for side in (box[0], box[2]))
    top, bottom = (kept[1] + (side - margin[1]) * down for side in (box[1], box[3]))
    return left, top, right, bottom
