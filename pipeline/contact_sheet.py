"""The first pictures of some tars on one sheet, with their words, for a person to look at.

Order: rows of the tars from the first on → each picture shrunk or enlarged to a cell, its words below → one PNG.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from io import BytesIO
from itertools import islice

from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from ldm.storage import join, open_atomic
from pipeline.images import image_suffix
from pipeline.store.manifest import Manifest, shard_path
from pipeline.store.schema import Row
from pipeline.store.shards import read_index, read_row

SHEET_NAME = "first_pictures.png"
NUM_PICTURES = 24
NUM_COLUMNS = 6
CELL = 128
"""Pixels of the longer side of a picture on the sheet."""
CAPTION = 32
"""Pixels below a picture for two lines of its words."""
GAP = 8
FONT_SIZE = 12
LETTERS = 22
"""Letters of a line of words."""


def write_contact_sheet(root: str, manifest: Manifest) -> str:
    """Publish the sheet beside the manifest and return its path; the same tars give the same sheet."""
    rows = list(islice(_first_rows(root, manifest), NUM_PICTURES))
    num_lines = max(1, -(-len(rows) // NUM_COLUMNS))
    width = GAP + NUM_COLUMNS * (CELL + GAP)
    sheet = PillowImage.new("RGB", (width, GAP + num_lines * (CELL + CAPTION + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, row in enumerate(rows):
        line, column = divmod(number, NUM_COLUMNS)
        left, top = GAP + column * (CELL + GAP), GAP + line * (CELL + CAPTION + GAP)
        with PillowImage.open(BytesIO(row[image_suffix(tuple(row))])) as image:
            factor = CELL / max(image.size)
            shown = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)))
        sheet.paste(shown, (left + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2))
        words = textwrap.wrap(row["txt"].decode(), LETTERS, max_lines=2, placeholder=" ...")
        draw.text((left, top + CELL + 2), "\n".join(words), "black", font)
    path = join(root, SHEET_NAME)
    with open_atomic(path) as file:
        sheet.save(file, "PNG")
    return path


def _first_rows(root: str, manifest: Manifest) -> Iterator[Row]:
    for shard in manifest.shards:
        tar = shard_path(root, shard.split, shard.name, "tar")
        index = read_index(shard_path(root, shard.split, shard.name, "index"))
        for row in range(len(index.keys)):
            yield read_row(tar, index, row)
