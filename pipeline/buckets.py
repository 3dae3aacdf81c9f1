"""Shapes that pictures of any aspect come to, and the part of a picture that has such a shape: pure functions.

Letters: a box is (left, top, right, bottom) in pixels, sizes are (width, height).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Box = tuple[float, float, float, float]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """Shapes of about one area, from the square to the longest.

    Attributes:
        image_size: side of the square in pixels; no bucket has more pixels than it.
        step: sides are multiples of this many pixels; it divides `image_size`.
        max_aspect: longer over shorter side of the longest bucket, at most.
    """

    image_size: int
    step: int
    max_aspect: float

    def landscape(self) -> list[Size]:
        """Return the buckets that are at least as wide as high, the square first: for each width the largest height."""
        area = self.image_size**2
        widths = range(self.image_size, area // self.step + 1, self.step)
        sizes = [(width, area // width // self.step * self.step) for width in widths]
        return [(width, height) for width, height in sizes if width <= height * self.max_aspect]

    def nearest(self, width: int, height: int) -> Size:
        """Return the bucket whose aspect is nearest, in logarithms, to that of a picture of this size.

        A picture on its side gets the bucket on its side. Of two that are equally near, the one with more pixels is
        taken.
        """
        long, short = max(width, height), min(width, height)
        aspect = math.log(long / short)

        def distance(bucket: Size) -> tuple[float, int]:
            return (round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -bucket[0] * bucket[1])

        nearest = min(self.landscape(), key=distance)
        return nearest if width >= height else (nearest[1], nearest[0])


def covering_box(width: int, height: int, size: Size, place: float = 0.5) -> Box:
    """Return the largest part of a picture that has the shape of `size`.

    Args:
        width: pixels a row of the picture.
        height: its rows.
        size: the shape that is wanted.
        place: where along the longer side the part lies: 0 at its start, 0.5 in its middle, 1 at its end.
    """
    shrink = min(width / size[0], height / size[1])
    box_width, box_height = min(shrink * size[0], width), min(shrink * size[1], height)
    left, top = (width - box_width) * place, (height - box_height) * place
    if shrink == 1:  # half a pixel would blur a crop that needs no resize
        left, top = float(math.floor(left)), float(math.floor(top))
    return left, top, left + box_width, top + box_height
