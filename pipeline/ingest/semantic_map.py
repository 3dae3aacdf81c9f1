"""A semantic map goes where its picture goes: the same part, the same size, each pixel the nearest one's class.

A map is a PNG of eight bits a pixel, grey or of a palette, as large as its picture is upright; a value is a class, and
255 is none, which is also what padding becomes. A vector file's size is that at which it is drawn.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.ingest.geometry import place
from pipeline.ingest.picture import Measured, PictureConfig
from pipeline.store.schema import NO_CLASS_PIXEL, Reject

MAP_MEMBER = "map.png"
"""Suffix of the member that holds a row's map."""


def placed_map(content: bytes, measured: Measured, config: PictureConfig) -> bytes | Reject:
    """Return the PNG of a map at its finished picture's size, or why there is none: "no_map" or "bad_map".

    Args:
        content: the encoded map; no bytes where there is none.
        measured: what was measured of its picture.
        config: what becomes of the picture.
    """
    if not content:
        return Reject("no_map")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            found = f"{opened.mode} {opened.width}x{opened.height}"
            if opened.mode not in ("L", "P") or opened.size != (measured.width, measured.height):
                return Reject("bad_map", f"{found} for a picture of {measured.width}x{measured.height}")
            numbers = Image.fromarray(np.asarray(opened))  # a palette's numbers, not its colours
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return Reject("bad_map", str(error)[:200])
    placement = place(measured.width, measured.height, config)
    resized = numbers.resize(placement.size, Image.Resampling.NEAREST, box=placement.box)
    canvas = Image.new("L", placement.canvas, NO_CLASS_PIXEL)
    left, top = ((outer - inner) // 2 for outer, inner in zip(placement.canvas, placement.size, strict=True))
    canvas.paste(resized, (left, top))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()
