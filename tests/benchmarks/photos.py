"""JPEGs as a web listing has them, of given megapixels: crops of photographs, scaled down and encoded anew.

Without a folder of photographs they are crops of made pictures: 1/f noise with edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.image_bytes import encoded, natural

ASPECT = 1.5
QUALITY = 90
MADE_SOURCES = 2
"""Made pictures to crop from; their noise takes seconds."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One file that is served under many addresses."""

    path: Path
    megapixels: float


def make_photos(folder: Path, sizes: Sequence[float], num_each: int, sources: str = "") -> list[Photo]:
    """Write `num_each` JPEGs of each size in megapixels and return them, size by size.

    Raises:
        ValueError: if the folder `sources` has no photograph as large as a size asks for.
    """
    folder.mkdir(parents=True)
    pictures = _opened(sources) if sources else _made(max(sizes))
    photos: list[Photo] = []
    for size in sizes:
        wide_enough = [picture for picture in pictures if _largest_crop(picture) >= _width(size)]
        if not wide_enough:
            raise ValueError(f"{sources} has no photograph with a 3:2 crop of {size:g} megapixels")
        for number in range(num_each):
            dice = np.random.default_rng([round(10 * size), number])
            path = folder / f"{size:g}mp-{number}.jpg"
            path.write_bytes(_crop(wide_enough[number % len(wide_enough)], size, dice))
            photos.append(Photo(path, size))
    return photos


def _crop(picture: Image.Image, size: float, dice: np.random.Generator) -> bytes:
    """Return a random part of a picture, scaled down to a size in megapixels."""
    width = _width(size)
    part = dice.uniform(width, _largest_crop(picture))
    left, top = dice.uniform(0, picture.width - part), dice.uniform(0, picture.height - part / ASPECT)
    box = (left, top, left + part, top + part / ASPECT)
    scaled = picture.resize((width, round(width / ASPECT)), Image.Resampling.LANCZOS, box=box)
    return encoded(scaled, "JPEG", quality=QUALITY)


def _opened(folder: str) -> list[Image.Image]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise ValueError(f"{folder} has no *.jpg")
    return [Image.open(path).convert("RGB") for path in paths]


def _made(size: float) -> list[Image.Image]:
    width = math.ceil(1.05 * _width(size))
    return [natural(width, math.ceil(width / ASPECT), seed) for seed in range(MADE_SOURCES)]


def _width(size: float) -> int:
    """Return the pixels a row of a 3:2 picture of so many megapixels."""
    return round(math.sqrt(ASPECT * 1e6 * size))


def _largest_crop(picture: Image.Image) -> int:
    return math.floor(min(picture.width, picture.height * ASPECT))
