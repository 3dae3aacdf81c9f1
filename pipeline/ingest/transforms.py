"""Bytes of any image → one finished picture, or the named reason why not.

Order: `measure` (recognise → refuse by the header alone) → `render`: decode, a JPEG at the smallest scale that suffices
→ eight bits that can be averaged → crop and resize in one step → upright by EXIF → sRGB over the background → pad →
encode. What is slow a pixel comes after the resize. Equal bytes give equal bytes, in any thread or process.
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.buckets import Box, Size
from pipeline.ingest import svg
from pipeline.ingest.colour import averageable, is_plain_srgb, is_wide, reject_mode, to_srgb
from pipeline.ingest.geometry import Placement, bucket_of, is_turned, place, stored_box
from pipeline.ingest.headers import (
    MAX_SCANS,
    ends_with_image,
    is_everyday,
    num_scans,
    open_image,
    orientation_of,
    reject_error,
)
from pipeline.ingest.picture import (
    PICTURE_REASONS,
    ChromaSampling,
    ImageFormat,
    Measured,
    Picture,
    PictureConfig,
    ResizeFilter,
    ResizeMode,
)
from pipeline.store.schema import Reject

__all__ = [
    "PICTURE_REASONS",
    "ChromaSampling",
    "ImageFormat",
    "Measured",
    "Picture",
    "PictureConfig",
    "ResizeFilter",
    "ResizeMode",
    "bucket_of",
    "encode",
    "measure",
    "render",
    "thumbnail",
]

THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 96, 80

REDUCING_GAP = 3
"""What is shrunk more than twice this factor is first averaged in whole blocks down to it: the same picture, faster."""

STRIP_PIXELS = 1 << 22
"""Pixels that are brought to eight bits at a time, so that no second copy of a large image is ever there."""

_RESAMPLING = {ResizeFilter.BICUBIC: Image.Resampling.BICUBIC, ResizeFilter.LANCZOS: Image.Resampling.LANCZOS}
_PILLOW_NAME = {ImageFormat.PNG: "PNG", ImageFormat.JPG: "JPEG", ImageFormat.WEBP: "WEBP"}
_LONGEST_SIDE = {ImageFormat.PNG: 1 << 20, ImageFormat.JPG: 65_500, ImageFormat.WEBP: 16_383}
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def measure(content: bytes, config: PictureConfig) -> Measured | Reject:
    """Return the upright size and the format of an encoded image, from its header alone.

    Bad bytes never raise; PICTURE_REASONS has the reasons.
    """
    if not content:
        return Reject("empty")
    if svg.is_svg(content):
        return _measure_svg(content, config) if config.has_svg else Reject("svg_not_wanted")
    opened = open_image(content)
    if isinstance(opened, Reject):
        return opened
    width, height = opened.size
    if width * height > config.max_pixels:
        return Reject("too_many_pixels", f"{width}x{height}")
    if opened.format in ("JPEG", "MPO") and (scans := num_scans(content)) > MAX_SCANS:
        return Reject("too_many_scans", f"{scans} scans")
    orientation = orientation_of(opened, content)
    if is_turned(orientation):
        width, height = height, width
    measured = Measured(width=width, height=height, format=opened.format or "", orientation=orientation)
    return _reject_size(measured, config) or reject_mode(opened.mode) or measured


def render(content: bytes, measured: Measured, config: PictureConfig) -> Picture | Reject:
    """Return the finished picture of an image that was measured.

    Bad bytes never raise; PICTURE_REASONS has the reasons.

    Args:
        content: the encoded image.
        measured: what `measure` said of these very bytes.
        config: what is wanted.
    """
    try:
        opened = _open(content, measured, config)
        return opened if isinstance(opened, Reject) else _render(content, opened, measured, config)
    except Exception as error:  # noqa: BLE001 - on hostile bytes Pillow's decoders raise nearly any class there is
        return reject_error(error, content)


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """Return a small JPEG of a picture's pixels, THUMBNAIL_SIDE on its longer side and never enlarged."""
    small = Image.fromarray(pixels)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=THUMBNAIL_QUALITY)
    return stream.getvalue()


def encode(image: Image.Image, config: PictureConfig) -> bytes:
    """Return the encoded picture; equal pixels give equal bytes."""
    stream = io.BytesIO()
    match config.image_format:
        case ImageFormat.PNG:
            image.save(stream, "PNG")
        case ImageFormat.JPG:
            image.save(stream, "JPEG", quality=config.quality, subsampling=config.chroma.value)
        case ImageFormat.WEBP:
            image.save(stream, "WEBP", quality=config.quality)
    return stream.getvalue()


def _measure_svg(content: bytes, config: PictureConfig) -> Measured | Reject:
    """Return the size that a drawing will be drawn at: what its placement needs without a resize."""
    natural = svg.natural_size(content)
    if isinstance(natural, Reject):
        return natural
    scale = 1 / place(*natural, config).shrink
    width, height = (max(1, round(side * scale)) for side in natural)
    if width * height > config.max_pixels:
        return Reject("too_many_pixels", f"{width}x{height}")
    return Measured(width=width, height=height, format="SVG")


def _reject_size(measured: Measured, config: PictureConfig) -> Reject | None:
    width, height = measured.width, measured.height
    if min(width, height) < config.min_side:
        return Reject("too_small", f"{width}x{height}")
    placement = place(width, height, config)
    if not config.upscales and placement.shrink < 1:
        return Reject("too_small", f"{width}x{height} for {placement.size[0]}x{placement.size[1]}")
    longest = max(placement.canvas)
    if longest > _LONGEST_SIDE[config.image_format] or math.prod(placement.canvas) > config.max_pixels:
        return Reject("too_long", f"{width}x{height}")
    return None


def _open(content: bytes, measured: Measured, config: PictureConfig) -> Image.Image | Reject:
    if measured.format == "SVG":
        return svg.draw(content, measured.width, measured.height)
    return open_image(content)


def _render(content: bytes, opened: Image.Image, measured: Measured, config: PictureConfig) -> Picture | Reject:
    turned = is_turned(measured.orientation)
    width, height = opened.size[::-1] if turned else opened.size  # a drawing may have come out smaller than its box
    placement = place(width, height, config)
    is_wanted = _is_wanted(content, opened, measured, placement, config)
    box = stored_box(placement.box, width, height, measured.orientation)
    size = placement.size[::-1] if turned else placement.size
    box = _decode(opened, box, placement.shrink)
    profile, is_grey = opened.info.get("icc_profile"), opened.mode in ("LA", "La")
    is_wanted = is_wanted and is_plain_srgb(profile)
    resized = _resized(opened, box, size, _RESAMPLING[config.resize_filter])
    upright = resized.transpose(_TURN[measured.orientation]) if measured.orientation > 1 else resized
    colour = _padded(to_srgb(upright, profile, is_grey, config.background), placement.canvas, config.background)
    return Picture(
        content=content if is_wanted else encode(colour, config),
        suffix=config.image_format.value,
        pixels=np.asarray(colour),
        original_width=measured.width,
        original_height=measured.height,
        is_untouched=is_wanted,
    )


def _is_wanted(
    content: bytes, opened: Image.Image, measured: Measured, placement: Placement, config: PictureConfig
) -> bool:
    """Return whether the image is, but for its colour profile, already what would be made of it."""
    return (
        config.keeps_bytes
        and opened.format == _PILLOW_NAME[config.image_format] == measured.format
        and measured.orientation == 1
        and opened.size == placement.size == placement.canvas
        and ends_with_image(content, measured.format)
        and is_everyday(content, opened)
    )


def _decode(image: Image.Image, box: Box, shrink: float) -> Box:
    """Decode, a JPEG at an eighth, quarter or half where that is enough, and return where the box lies then.

    The scaled image covers the original exactly; its last row and column may stand for a part of a block only.
    """
    scale = next((scale for scale in (8, 4, 2) if scale <= shrink), 1)
    width, height = image.size
    drafted = image.draft(None, (max(1, width // scale), max(1, height // scale))) if scale > 1 else None
    image.load()
    if drafted is None:
        return box
    _, (_, _, scaled_width, scaled_height) = drafted
    left, top, right, bottom = box
    by_x, by_y = scaled_width / width, scaled_height / height
    return (left * by_x, top * by_y, min(right * by_x, image.width), min(bottom * by_y, image.height))


def _resized(image: Image.Image, box: Box, size: Size, resampling: Image.Resampling) -> Image.Image:
    left, top, right, bottom = box
    factor = int(min((right - left) / size[0], (bottom - top) / size[1]) / REDUCING_GAP)
    if factor < 2:
        ready = averageable(image, is_wide(image))
        is_there = (left, top, right, bottom) == (0, 0, *size) == (0, 0, *ready.size)
        return ready if is_there else ready.resize(size, resampling, box=box)
    x, y = int(left // factor) * factor, int(top // factor) * factor
    ready = _reduced(image, (x, y, math.ceil(right), math.ceil(bottom)), factor)
    inner = ((left - x) / factor, (top - y) / factor, (right - x) / factor, (bottom - y) / factor)
    return ready.resize(size, resampling, box=inner)


def _reduced(image: Image.Image, box: tuple[int, int, int, int], factor: int) -> Image.Image:
    """Return the part of an image with blocks of `factor` by `factor` pixels averaged, made strip by strip."""
    left, top, right, bottom = box
    has_wide_levels = is_wide(image)
    rows = max(1, STRIP_PIXELS // (right - left) // factor) * factor
    strips = [
        averageable(image.crop((left, start, right, min(start + rows, bottom))), has_wide_levels).reduce(factor)
        for start in range(top, bottom, rows)
    ]
    joined = Image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
    for index, strip in enumerate(strips):
        joined.paste(strip, (0, index * (rows // factor)))
    return joined


def _padded(image: Image.Image, canvas: Size, background: str) -> Image.Image:
    if image.size == canvas:
        return image
    padded = Image.new("RGB", canvas, background)
    padded.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
    return padded
