"""What the tests of pictures do with bytes: make, look, be refused."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from pipeline.ingest.transforms import (
    ImageFormat,
    Measured,
    Picture,
    PictureConfig,
    measure,
    render,
)
from pipeline.store.schema import Reject
from tests.image_bytes import (
    natural,
)

SMALL = PictureConfig(image_size=8, image_format=ImageFormat.PNG)
PHOTO = natural(97, 70, seed=1)


def made(content: bytes, config: PictureConfig = SMALL) -> Picture:
    measured = measure(content, config)
    assert isinstance(measured, Measured), measured
    picture = render(content, measured, config)
    assert isinstance(picture, Picture), picture
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.shape[2] == 3
    return picture


def pixels(content: bytes, config: PictureConfig = SMALL) -> np.ndarray:
    return made(content, config).pixels.astype(int)


def refused(content: bytes, config: PictureConfig = SMALL) -> str:
    measured = measure(content, config)
    outcome = render(content, measured, config) if isinstance(measured, Measured) else measured
    assert isinstance(outcome, Reject), outcome
    return outcome.reason


def plain(colour, size=(8, 8), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(found.astype(float) - expected.astype(float)).mean()
    return 10 * math.log10(255**2 / max(error, 1e-9))
