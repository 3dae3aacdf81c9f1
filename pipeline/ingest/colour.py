"""Pixels of any mode → eight bits of red, green and blue in sRGB.

Order: `averageable` before a resize (levels to eight bits, palette to colours, transparent colours weighted by their
alpha), `to_srgb` after it (embedded profile, then the background), where there are few pixels left to convert.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageColor

from pipeline.store.schema import Reject

LIKE_SRGB = 2
"""Levels by which a profile may change a colour and still be called sRGB: its many versions differ by rounding."""

MAX_PROFILE_BYTES = 4_000_000
"""The largest press profiles in use have 3 MB; longer ones are ignored like broken ones."""

_SIXTEEN_BIT_STEP = 257
"""65535 / 255: what one step of eight bits is in sixteen."""

_UNSUPPORTED = frozenset({"F", "LAB", "HSV"})
_SPACE_OF_MODE = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION


def reject_mode(mode: str) -> Reject | None:
    """Return why pixels of this mode can't be shown ("unsupported_mode"), or None."""
    return Reject("unsupported_mode", f"{mode} pixels") if mode in _UNSUPPORTED else None


def is_wide(image: Image.Image) -> bool:
    """Return whether levels of a mode of up to 32 bits are of 16 rather than 8: the largest level decides."""
    if not image.mode.startswith("I"):
        return False
    return image.mode.startswith("I;16") or _largest(image.getextrema()) > 255


def averageable(image: Image.Image, has_wide_levels: bool) -> Image.Image:
    """Return the pixels in a mode that may be averaged: L, RGB, CMYK, or RGBa, colours weighted by their alpha."""
    if image.mode.startswith("I"):
        return _eight_bits(image, has_wide_levels)
    if image.has_transparency_data:
        return _weighted(image)
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in _SPACE_OF_MODE else image.convert("RGB")


def to_srgb(image: Image.Image, profile: bytes | None, is_grey: bool, background: str) -> Image.Image:
    """Return an averageable image in sRGB over the background.

    Args:
        image: of a mode that `averageable` gives.
        profile: embedded ICC profile; one that is broken or for other colours is ignored.
        is_grey: whether the original was grey with transparency, so that its red is its grey.
        background: colour that shows through, such as "#ffffff".
    """
    if image.mode != "RGBa":
        return _profiled(image, profile)
    seen = image.convert("RGBA")
    colour = seen.getchannel("R") if is_grey else seen.convert("RGB")
    over = _profiled(colour, profile)
    over.putalpha(seen.getchannel("A"))
    under = Image.new("RGBA", over.size, ImageColor.getrgb(background))
    return Image.alpha_composite(under, over).convert("RGB")


def is_plain_srgb(profile: bytes | None) -> bool:
    """Return whether the profile leaves RGB pixels what they are: there is none, it is broken, or it is sRGB."""
    return _transform(profile, "RGB") is None if profile else True


def _profiled(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only in-place conversions give None
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what brings pixels of the mode from the profile to sRGB, or None where they stay what they are."""
    if len(profile) > MAX_PROFILE_BYTES:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != _SPACE_OF_MODE[mode]:
            return None
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, target, mode, "RGB", _INTENT, _FLAGS)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode == "RGB" and _changes_little(transform) else transform


def _changes_little(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether no colour of a coarse lattice moves by more than LIKE_SRGB."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(27, 27, 3)
    moved = ImageCms.applyTransform(Image.fromarray(lattice), transform)
    return bool(np.abs(np.asarray(moved).astype(int) - lattice).max() <= LIKE_SRGB)


def _weighted(image: Image.Image) -> Image.Image:
    if image.mode == "RGBa":
        return image
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA").convert("RGBa")


def _eight_bits(image: Image.Image, has_wide_levels: bool) -> Image.Image:
    levels = np.asarray(image)
    if has_wide_levels:
        levels = levels // _SIXTEEN_BIT_STEP
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def _largest(extrema: Sequence[float] | Sequence[tuple[float, float]]) -> float:
    largest = extrema[-1]
    return max(largest) if isinstance(largest, tuple) else largest
