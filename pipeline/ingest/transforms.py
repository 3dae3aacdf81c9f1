"""Bytes of any image → one square RGB picture, or the named reason why not.

Order: recognise → refuse too many pixels before decoding → decode (JPEG at the smallest scale that suffices) → upright
by EXIF → eight bits, RGB, alpha over the background → centre crop and resize in one step → encode.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import resvg_py
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from pipeline.store.schema import Reject

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF")
"""What is decoded. Others that Pillow knows start programs (EPS) or are no pictures for a reader."""

DRAFT_FACTOR = 2
"""A JPEG is decoded at a power of two that leaves this many times the wanted side, for the resize to average over."""

MAX_SVG_ASPECT = 8
"""Beyond this ratio of sides a drawing's centre crop would show next to nothing of it."""

_SVG_START = re.compile(rb"^(\xef\xbb\xbf)?\s*<(\?xml|!--|!DOCTYPE svg|svg)", re.IGNORECASE)
_SVG_OUTSIDE = re.compile(r"<(\w+:)?(image|feImage)\b|<!ENTITY|@import", re.IGNORECASE)
"""Ways for a drawing to take in other files, which a drawing from elsewhere must not choose."""

_SIXTEEN_BIT_STEP = 257
"""65535 / 255: what one step of eight bits is in sixteen."""


class ImageFormat(StrEnum):
    """How pictures are stored."""

    PNG = "png"
    JPG = "jpg"
    WEBP = "webp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A decoded image.

    Attributes:
        image: square, mode RGB.
        original_width: pixels a row before crop and resize, upright.
        original_height: rows before crop and resize, upright.
    """

    image: Image.Image
    original_width: int
    original_height: int


def decode(content: bytes, image_size: int, background: str, max_pixels: int) -> Picture | Reject:
    """Return the centre square of an encoded image at `image_size` pixels a side.

    Bad bytes never raise. Reasons: "empty", "not_an_image", "too_many_pixels", "truncated", "unsupported_mode",
    "svg_refers_outside", "svg_too_long", "undecodable".

    Args:
        content: the encoded image: any of FORMATS, or SVG.
        image_size: side of the result in pixels.
        background: colour that shows through where the image is transparent, such as "#ffffff".
        max_pixels: more than this is refused by the header alone.
    """
    if not content:
        return Reject("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters is refused below
            opened = _open_svg(content, image_size) if _SVG_START.match(content) else _open_raster(content)
            return opened if isinstance(opened, Reject) else _picture(opened, image_size, background, max_pixels)
    except UnidentifiedImageError:
        return Reject("not_an_image", f"begins with {content[:12]!r}")
    except Image.DecompressionBombError as error:
        return Reject("too_many_pixels", str(error))
    except Exception as error:  # noqa: BLE001 - on hostile bytes Pillow's decoders raise nearly any class there is
        is_truncated = "truncated" in str(error)
        return Reject("truncated" if is_truncated else "undecodable", f"{type(error).__name__}: {error}"[:200])


def encode(image: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """Return the encoded picture; equal pixels give equal bytes. `quality` has no meaning for PNG."""
    stream = io.BytesIO()
    match image_format:
        case ImageFormat.PNG:
            image.save(stream, "PNG")
        case ImageFormat.JPG:
            image.save(stream, "JPEG", quality=quality, subsampling=0)
        case ImageFormat.WEBP:
            image.save(stream, "WEBP", quality=quality)
    return stream.getvalue()


def _open_raster(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


def _open_svg(content: bytes, image_size: int) -> Image.Image | Reject:
    """Draw an SVG so that its shorter side has `image_size` pixels."""
    text = content.decode("utf-8-sig")
    if _SVG_OUTSIDE.search(text):
        return Reject("svg_refers_outside")
    drawn = _draw(text, image_size)
    aspect = image_size / min(drawn.size)
    if aspect > 1 and aspect <= MAX_SVG_ASPECT:
        drawn = _draw(text, round(image_size * aspect))
    if 2 * min(drawn.size) < image_size:
        return Reject("svg_too_long", f"{drawn.width}x{drawn.height}")
    return drawn


def _draw(text: str, box_size: int) -> Image.Image:
    """Draw an SVG as large as fits into a square box."""
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=text, width=box_size, height=box_size)))


def _picture(opened: Image.Image, image_size: int, background: str, max_pixels: int) -> Picture | Reject:
    width, height = opened.size
    if width * height > max_pixels:
        return Reject("too_many_pixels", f"{width}x{height}")
    opened.draft(None, (DRAFT_FACTOR * image_size, DRAFT_FACTOR * image_size))
    upright = ImageOps.exif_transpose(opened)
    if (upright.width < upright.height) != (opened.width < opened.height):
        width, height = height, width
    colour = _rgb(upright, background)
    if isinstance(colour, Reject):
        return colour
    return Picture(image=_centre_square(colour, image_size), original_width=width, original_height=height)


def _rgb(image: Image.Image, background: str) -> Image.Image | Reject:
    """Return eight bits of red, green and blue, transparency laid over the background."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode == "F":
        return Reject("unsupported_mode", "floating-point pixels have no fixed white")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, ImageColor.getrgb(background)), over).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey levels of 16 bits as 8; mode "I" says not which of the two it holds, so its largest level decides."""
    levels = np.asarray(image).astype(np.int64)
    is_sixteen_bit = image.mode.startswith("I;16") or levels.max(initial=0) > 255
    eight_bit = levels // _SIXTEEN_BIT_STEP if is_sixteen_bit else levels
    return Image.fromarray(np.clip(eight_bit, 0, 255).astype(np.uint8))


def _centre_square(image: Image.Image, image_size: int) -> Image.Image:
    side = min(image.size)
    if image.size == (image_size, image_size):
        return image
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)
