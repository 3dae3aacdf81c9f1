"""Which part of a picture becomes which size: pure functions of numbers.

Letters: a box is (left, top, right, bottom) in pixels of the upright original; sizes are (width, height).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.buckets import Box, Buckets, Size, covering_box
from pipeline.ingest.picture import PictureConfig, ResizeMode


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What part of a picture is kept, and how large it becomes.

    Attributes:
        box: the kept part.
        size: what the box is resized to.
        canvas: the stored size; larger than `size` only where the picture is padded, around its middle.
    """

    box: Box
    size: Size
    canvas: Size

    @property
    def shrink(self) -> float:
        """Pixels of the original for one of the result, along the side where they are fewer."""
        left, top, right, bottom = self.box
        return min((right - left) / self.size[0], (bottom - top) / self.size[1])


def place(width: int, height: int, config: PictureConfig) -> Placement:
    """Return the placement of an upright picture of this size under the config's resize mode."""
    side = config.image_size
    whole = (0.0, 0.0, float(width), float(height))
    match config.resize:
        case ResizeMode.CENTRE_CROP:
            return _cover(width, height, (side, side))
        case ResizeMode.BUCKETS:
            return _cover(width, height, bucket_of(width, height, config))
        case ResizeMode.SHORT_SIDE:
            size = _scaled(width, height, side / min(width, height))
            return Placement(box=whole, size=size, canvas=size)
        case ResizeMode.PAD:
            size = _scaled(width, height, side / max(width, height))
            return Placement(box=whole, size=size, canvas=(side, side))


def bucket_of(width: int, height: int, config: PictureConfig) -> Size:
    """Return the bucket of a picture of this size."""
    return _buckets(config).nearest(width, height)


def landscape_buckets(config: PictureConfig) -> list[Size]:
    """Return the config's buckets that are at least as wide as high, the square first."""
    return _buckets(config).landscape()


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """Return where a box of the upright picture lies among the stored pixels.

    Args:
        box: part of the upright picture.
        width: pixels a row of the upright picture.
        height: its rows.
        orientation: how the stored pixels lie (EXIF tag 0x0112).
    """
    left, top, right, bottom = box
    match orientation:
        case 2:
            return (width - right, top, width - left, bottom)
        case 3:
            return (width - right, height - bottom, width - left, height - top)
        case 4:
            return (left, height - bottom, right, height - top)
        case 5:
            return (top, left, bottom, right)
        case 6:
            return (top, width - right, bottom, width - left)
        case 7:
            return (height - bottom, width - right, height - top, width - left)
        case 8:
            return (height - bottom, left, height - top, right)
        case _:
            return box


def is_turned(orientation: int) -> bool:
    """Return whether stored rows are upright columns."""
    return orientation >= 5


def _buckets(config: PictureConfig) -> Buckets:
    return Buckets(image_size=config.image_size, step=config.bucket_step, max_aspect=config.bucket_max_aspect)


def _cover(width: int, height: int, size: Size) -> Placement:
    """Keep the largest centre part of the wanted shape."""
    return Placement(box=covering_box(width, height, size), size=size, canvas=size)


def _scaled(width: int, height: int, scale: float) -> Size:
    return max(1, round(width * scale)), max(1, round(height * scale))
