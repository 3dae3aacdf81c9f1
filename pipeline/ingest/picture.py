"""What a picture may be and become: the configuration of pixels, what a header tells, what rendering gives.

Every refusal of a picture has a word in PICTURE_REASONS, with its meaning for a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from ldm.config import Config

MAX_PIXELS_EVER = 178_956_970
"""Twice Pillow's MAX_IMAGE_PIXELS, where its decoders refuse on their own."""

PICTURE_REASONS: dict[str, str] = {
    "empty": "there are no bytes",
    "not_an_image": "the bytes are no image: a web page, an error message, text",
    "unsupported_format": "an image or document in a format that is not decoded, such as PDF, PSD or HEIC",
    "truncated": "the bytes end before the image does",
    "undecodable": "the bytes begin like an image and break its format's rules",
    "unsupported_mode": "pixels without a fixed white, such as floating-point ones",
    "too_small": "a side below min_side, or below the wanted size where nothing may be enlarged",
    "too_long": "so long and thin that the stored format has no room for it",
    "too_many_pixels": "more pixels than max_pixels, by the header alone",
    "too_many_scans": "a JPEG of more passes than any encoder makes, to keep its reader busy",
    "metadata_too_large": "compressed metadata that unpacks to megabytes",
    "svg_not_wanted": "a vector drawing where has_svg is off",
    "svg_refers_outside": "a vector drawing that takes in other files, pictures or entities",
    "svg_too_long": "a vector drawing more than eight times as long as it is wide",
    "svg_too_complex": "a vector drawing that takes more time, memory or depth than one drawing may",
    "no_map": "no semantic map beside the picture, where the source says that there are some",
    "bad_map": "a semantic map that is no eight-bit PNG of its picture's upright size",
}
"""Every reason of a refused picture, with what it means."""


class ImageFormat(StrEnum):
    """How pictures are stored."""

    PNG = "png"
    JPG = "jpg"
    WEBP = "webp"


class ResizeMode(StrEnum):
    """How a picture of any shape comes to the wanted size."""

    CENTRE_CROP = "centre-crop"
    """The largest centre square, image_size pixels a side."""
    SHORT_SIDE = "short-side"
    """The whole picture, its shorter side image_size pixels."""
    BUCKETS = "buckets"
    """The largest centre part that has the shape of the nearest bucket."""
    PAD = "pad"
    """The whole picture in the middle of a square of image_size pixels a side, background around it."""


class ResizeFilter(StrEnum):
    """What an output pixel averages over."""

    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class ChromaSampling(StrEnum):
    """How finely a JPEG stores colour; "4:2:0" is a third smaller and blurs coloured edges."""

    FULL = "4:4:4"
    HALF = "4:2:0"


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureConfig(Config):
    """Which pictures are taken, and what is stored of them."""

    image_size: int = 256
    """Side of the stored square in pixels; the shorter side, or the root of a bucket's area, in the other modes."""
    resize: ResizeMode = ResizeMode.CENTRE_CROP
    """How a picture comes to that size."""
    resize_filter: ResizeFilter = ResizeFilter.BICUBIC
    """Bicubic is a fifth faster over all than lanczos; see tests/benchmarks/decode.py for what each keeps."""
    image_format: ImageFormat = ImageFormat.JPG
    """How pictures are stored; png loses nothing."""
    quality: int = 95
    """Quality of jpg and webp, 1 to 100."""
    chroma: ChromaSampling = ChromaSampling.FULL
    """How finely jpg stores colour."""
    background: str = "#ffffff"
    """Colour behind transparent images, and around padded ones."""
    min_side: int = 2
    """Images with a shorter side are refused: a side of one pixel is a tracker or a rule."""
    max_pixels: int = 64_000_000
    """Images with more pixels are refused before they are decoded."""
    upscales: bool = True
    """Whether images that are smaller than wanted are enlarged; else they are refused."""
    has_svg: bool = True
    """Whether vector drawings are drawn; else they are refused."""
    keeps_bytes: bool = True
    """Whether an image that is already as wanted is stored as it came, metadata and all, not encoded again."""
    bucket_step: int = 64
    """Sides of buckets are multiples of this many pixels."""
    bucket_max_aspect: float = 2.0
    """Longer over shorter side of the longest bucket, at most."""

    def __post_init__(self) -> None:
        """Refuse what no picture could be made with."""
        for name in ("image_size", "min_side", "max_pixels", "bucket_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_pixels > MAX_PIXELS_EVER:
            raise ValueError(f"max_pixels must be at most {MAX_PIXELS_EVER}, got {self.max_pixels}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, got {self.quality}")
        if len(ImageColor.getrgb(self.background)) != len("rgb"):
            raise ValueError(f"background must be a colour without transparency, got {self.background}")
        if self.bucket_max_aspect < 1:
            raise ValueError(f"bucket_max_aspect must be at least 1, got {self.bucket_max_aspect}")
        if self.resize is ResizeMode.BUCKETS and self.image_size % self.bucket_step:
            raise ValueError(
                f"image_size must be a multiple of bucket_step, got {self.image_size} and {self.bucket_step}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What an image's header tells.

    Attributes:
        width: pixels a row, upright. A vector drawing has the size that it will be drawn at.
        height: rows, upright.
        format: Pillow's name of the format, such as "JPEG", or "SVG".
        orientation: how the stored pixels lie, 1 to 8 as EXIF counts; 1 is upright.
    """

    width: int
    height: int
    format: str
    orientation: int = 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """One finished picture.

    Attributes:
        content: the encoded picture.
        suffix: its file suffix: jpg, png or webp.
        pixels: what was encoded, red, green and blue in sRGB; of an untouched picture, what its bytes decode to.
        original_width: pixels a row before crop and resize, upright.
        original_height: rows before crop and resize, upright.
        is_untouched: whether `content` is the payload as it came.
    """

    content: bytes
    suffix: str
    pixels: NDArray[np.uint8]
    original_width: int
    original_height: int
    is_untouched: bool
