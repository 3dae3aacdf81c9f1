"""What an image's first bytes and markers tell, read without decoding a pixel.

Pillow reads the headers; here is what it leaves open: documents that are no images, JPEGs of endless passes, images
that end early or go on after their end, and metadata in the way of the pixels.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from pipeline.store.schema import Reject

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is decoded. Others that Pillow knows start programs (EPS) or are no pictures for a reader."""

MAX_SCANS = 100
"""Passes of a progressive JPEG; encoders make about ten, and a file of kilobytes may hold thousands over all pixels."""

_UNSUPPORTED = {
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"8BPS": "PSD",
    b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x02\x00": "CUR",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x1a\x45\xdf\xa3": "Matroska",
}
_UNSUPPORTED_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"isom", b"mp42", b"qt  ", b"M4V "}

_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""A JPEG marker that ends entropy-coded bytes: not a stuffed 0xff, not a restart."""

_TURNED = re.compile(rb"eXIf|Raw profile type exif|tiff:Orientation")
"""Ways for a PNG to say how it lies."""

_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM|II[*+]\0|MM\0[*+]|P[1-6][\s]|....ftypavi", re.DOTALL
)
"""Beginnings of the formats that are decoded: such bytes are meant to be an image, whatever is wrong with them."""

_EARLY_END = re.compile(r"truncated|unexpected end|EOF|not enough", re.IGNORECASE)
_LARGE_METADATA = re.compile(r"MAX_TEXT")

# Pillow warns of odd metadata and of pixels that are counted here; `catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(content: bytes) -> Image.Image | Reject:
    """Return the image with its header read, or why there is none.

    Reasons: "not_an_image", "unsupported_format", "truncated", "too_many_pixels", "metadata_too_large", "undecodable".
    """
    if early := _reject_start(content):
        return early
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # noqa: BLE001 - on hostile bytes Pillow's parsers raise nearly any class there is
        return reject_error(error, content)


def reject_error(error: Exception, content: bytes) -> Reject:
    """Return the reason that an error of Pillow's stands for."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):
        is_meant = _SIGNATURE.match(content)
        return Reject("undecodable" if is_meant else "not_an_image", f"begins with {content[:12]!r}")
    if isinstance(error, Image.DecompressionBombError):
        return Reject("too_many_pixels", str(error))
    if _LARGE_METADATA.search(message):
        return Reject("metadata_too_large", message[:200])
    is_early = isinstance(error, EOFError) or _EARLY_END.search(message)
    return Reject("truncated" if is_early else "undecodable", message[:200])


def orientation_of(image: Image.Image, content: bytes) -> int:
    """Return how the stored pixels lie, 1 to 8; 1 where it is not said, or said brokenly.

    A PNG may say so behind its pixels, which Pillow decodes to get there: only where the bytes hold such a word.
    """
    if image.format == "TIFF" or (image.format == "PNG" and not _TURNED.search(content)):
        return 1  # Pillow turns a TIFF upright itself
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - broken EXIF raises nearly any class, and the pixels are there all the same
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def num_scans(content: bytes) -> int:
    """Return the passes of a JPEG, at least; 1 where the first holds all components at full precision."""
    num_components = 0
    for marker, start, _ in jpeg_segments(content):
        if marker in (0xC0, 0xC1):
            num_components = content[start + 9] if start + 9 < len(content) else 0
        if marker == 0xDA and content[start + 4 : start + 5] == bytes([num_components]):
            return 1
        if marker == 0xDA:
            break
    most = content.count(b"\xff\xda")  # a bound from above: thumbnails in metadata have passes too
    return most if most <= MAX_SCANS else sum(marker == 0xDA for marker, _, _ in jpeg_segments(content))


def jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of a JPEG's segments, the end-of-image marker last where there is one."""
    place = 2
    while found := _MARKER.search(content, place):
        marker, start = found[1][0], found.start()
        if marker == 0xD9:
            yield marker, start, found.end()
            return
        if found.end() + 2 > len(content):
            return
        place = found.end() + struct.unpack_from(">H", content, found.end())[0]
        yield marker, start, place


def ends_with_image(content: bytes, image_format: str) -> bool:
    """Return whether the last byte is the image's last: nothing was cut off, and nothing follows."""
    match image_format:
        case "JPEG":
            return max((end for marker, _, end in jpeg_segments(content) if marker == 0xD9), default=0) == len(content)
        case "PNG":
            return content.endswith(b"\x00\x00\x00\x00IEND\xaeB`\x82") and _png_end(content) == len(content)
        case "WEBP":
            return _riff_end(content) == len(content)
        case _:
            return False


def is_everyday(content: bytes, image: Image.Image) -> bool:
    """Return whether any reader shows this image as it was decoded: three colours of eight bits, one frame."""
    if image.mode != "RGB" or image.has_transparency_data or getattr(image, "is_animated", False):
        return False
    match image.format:
        case "JPEG":
            frames = [marker for marker, _, _ in jpeg_segments(content) if 0xC0 <= marker <= 0xCF]
            return not any(marker not in (0xC0, 0xC1, 0xC2, 0xC4) for marker in frames)  # Huffman coding only
        case "PNG":
            return content[24:26] == b"\x08\x02"  # eight bits, colours without a palette
        case _:
            return image.format == "WEBP"


def _reject_start(content: bytes) -> Reject | None:
    named = next((name for start, name in _UNSUPPORTED.items() if content.startswith(start)), None)
    if content[4:8] == b"ftyp" and content[8:12] in _UNSUPPORTED_BRANDS and b"avif" not in content[12:64]:
        named = content[8:12].decode()
    if named:
        return Reject("unsupported_format", named)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP" and _riff_end(content) > len(content) + 1:
        return Reject("truncated", f"{len(content)} of {_riff_end(content)} bytes")
    return None


def _riff_end(content: bytes) -> int:
    return int.from_bytes(content[4:8], "little") + 8


def _png_end(content: bytes) -> int:
    """Return where the chunk that ends a PNG ends, or 0."""
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        place += 12 + length
        if content[place - 8 - length : place - 4 - length] == b"IEND":
            return place
    return 0
