"""Random masks for inpainting: thick strokes and boxes, as wide and as many as chance says (Suvorov et al. 2022, LaMa).

True is what a network must fill in. A mask is drawn in shares of the picture's sides, so that one generator gives the
same mask at any size.

Letters: y pixel row, x pixel column.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

Mask = Bool[np.ndarray, "y x"]

STROKE_SHARE = 0.5
"""Share of masks that are strokes; the others are boxes."""
SHARE_RANGE = (0.05, 0.6)
"""How much of a picture is masked; a mask outside is drawn again."""
MAX_STROKES = 5
MAX_CORNERS = 8
STROKE_WIDTH = (0.06, 0.25)
STROKE_LENGTH = (0.1, 0.5)
MAX_BOXES = 4
BOX_SIDE = (0.1, 0.6)
MAX_TRIES = 64


def random_mask(dice: np.random.Generator, height: int, width: int) -> Mask:
    """Return a mask of a picture, between 5 and 60 percent of which are True."""
    for _ in range(MAX_TRIES):
        mask = _strokes(dice, height, width) if dice.random() < STROKE_SHARE else _boxes(dice, height, width)
        if SHARE_RANGE[0] <= mask.mean() <= SHARE_RANGE[1]:
            return mask
    return _middle(height, width)


def _strokes(dice: np.random.Generator, height: int, width: int) -> Mask:
    """Return chains of thick lines with round joints, each turning about its last direction."""
    canvas = Image.new("1", (width, height))
    pen = ImageDraw.Draw(canvas)
    for _ in range(dice.integers(1, MAX_STROKES + 1)):
        thickness = max(1, round(dice.uniform(*STROKE_WIDTH) * min(height, width)))
        x, y = dice.random() * width, dice.random() * height
        heading = dice.uniform(0, 2 * math.pi)
        for _ in range(dice.integers(1, MAX_CORNERS + 1)):
            heading += dice.normal(0, 1)
            length = dice.uniform(*STROKE_LENGTH) * min(height, width)
            to_x = min(max(x + length * math.cos(heading), 0), width)
            to_y = min(max(y + length * math.sin(heading), 0), height)
            pen.line((x, y, to_x, to_y), fill=1, width=thickness)
            for joint_x, joint_y in ((x, y), (to_x, to_y)):
                reach = thickness / 2
                pen.ellipse((joint_x - reach, joint_y - reach, joint_x + reach, joint_y + reach), fill=1)
            x, y = to_x, to_y
    return np.array(canvas, bool)


def _boxes(dice: np.random.Generator, height: int, width: int) -> Mask:
    mask = np.zeros((height, width), bool)
    for _ in range(dice.integers(1, MAX_BOXES + 1)):
        tall, wide = (
            max(1, round(share * side)) for share, side in zip(dice.uniform(*BOX_SIDE, 2), (height, width), strict=True)
        )
        top, left = dice.integers(0, height - tall + 1), dice.integers(0, width - wide + 1)
        mask[top : top + tall, left : left + wide] = True
    return mask


def _middle(height: int, width: int) -> Mask:
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return mask
