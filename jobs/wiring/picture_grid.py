"""Many pictures as one: a row for each prompt, a column for each guidance scale, with captions that can be read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ldm.drawing import Pixels

LEAST_CELL, LARGEST_CELL = 128, 512
"""Pixels of the longer side of a grid's pictures: smaller ones are enlarged, larger ones shrunk."""
LABEL_WIDTH = 200
HEADER = 28
GAP = 6


def grid_picture(images: Pixels, labels: Sequence[str], guidance: Sequence[float]) -> PILImage.Image:
    """Return one picture: a row for each prompt with its text, if any has one, a column for each guidance scale."""
    label_width = LABEL_WIDTH if any(labels) else 0
    columns, rows = len(guidance), len(labels)
    longer = max(images.shape[1:3])
    factor = min(max(longer, LEAST_CELL), LARGEST_CELL) / longer
    cell_height, cell_width = (round(side * factor) for side in images.shape[1:3])
    width = label_width + columns * (cell_width + GAP) + GAP
    height = HEADER + rows * (cell_height + GAP) + GAP
    canvas = PILImage.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    for column, scale in enumerate(guidance):
        left = label_width + GAP + column * (cell_width + GAP)
        draw.text((left + cell_width / 2, HEADER / 2 + 2), f"guidance {scale:g}", "black", font, anchor="mm")
    for row, words in enumerate(labels):
        top = HEADER + row * (cell_height + GAP)
        label = "\n".join(textwrap.wrap(words, 24)[:6])
        draw.multiline_text((GAP, top + cell_height / 2), label, "black", font, anchor="lm", spacing=4)
        for column in range(columns):
            image = PILImage.fromarray(np.ascontiguousarray(images[row * columns + column]))
            left = label_width + GAP + column * (cell_width + GAP)
            canvas.paste(image.resize((cell_width, cell_height), PILImage.Resampling.LANCZOS), (left, top))
            draw.rectangle((left - 1, top - 1, left + cell_width, top + cell_height), outline="#dddddd")
    return canvas
