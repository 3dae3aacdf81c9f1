"""Bad and odd images as bytes, each with what must become of it: "ok", or the reason that refuses it.

Outcomes are those of a `PictureConfig` with its defaults, at any image size of at least 8.
"""

from __future__ import annotations

import base64
import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.image_bytes import (
    chunk,
    cmyk_profile,
    encoded,
    interlaced_png,
    natural,
    png,
    with_frame,
    with_many_scans,
    with_segment,
    ycck,
)

OK = "ok"


@dataclass(frozen=True)
class BadImage:
    """Bytes of an image and their outcome."""

    content: bytes
    outcome: str


PHOTO = natural(96, 72, seed=7)
DRAWING = PHOTO.quantize(32)
JPEG = encoded(PHOTO, "JPEG", quality=90)
PNG = encoded(PHOTO, "PNG")
WEBP = encoded(PHOTO, "WEBP", quality=90)
GIF = encoded(DRAWING, "GIF")
BMP = encoded(PHOTO, "BMP")
FRAMES = [natural(40, 30, seed).quantize(16) for seed in range(3)]
SEVERAL = {"save_all": True, "append_images": FRAMES[1:]}

# cjpeg -arithmetic, from a 32x24 ramp
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVtVkVGZIhlbXd7"
    "gYKBTmCNl4x9lnN+gXz/2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8"
    "fHx8fHx8fHz/yQARCAAYACADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ACgQIOQ9jMrvI9i8PthN6TYhad6y"
    "r1gMgTXWhxrdlT4Sd3E2y6Mi9TLOGzHLJNn1JZOcoQKm/9k="
)


def _svg(inside: str, attributes: str = 'viewBox="0 0 16 16"', before: str = "") -> bytes:
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{before}<svg {spaces} {attributes}>{inside}</svg>".encode()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("hidden.txt", "hidden")
    return stream.getvalue()


def _tiff(tags: Mapping[int, tuple[int, int, int]], tail: bytes = b"", following: int = 0) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following) + tail


def _plain_tiff(**changed: tuple[int, int, int]) -> bytes:
    """An 8x8 grey TIFF of one strip, with some tags changed: type, count, value."""
    names = {
        "width": 256,
        "height": 257,
        "offset": 273,
        "rows": 278,
        "length": 279,
        "tile_width": 322,
        "tile_height": 323,
    }
    tags = {256: (3, 1, 8), 257: (3, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    tags |= {273: (4, 1, 2000), 277: (3, 1, 1), 278: (3, 1, 8), 279: (4, 1, 64)}
    tags |= {names[name]: entry for name, entry in changed.items()}
    return _tiff(tags).ljust(2000, b"\0") + bytes(range(64))


def _webp_lie() -> bytes:
    """A canvas of 10x10 around a frame of 96x72."""
    frame = WEBP[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\x09\0\0" + b"\x09\0\0"
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(frame)) + b"WEBP" + canvas + frame


def _webp_bomb() -> bytes:
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xfe\x3f\0" + b"\xfe\x3f\0"
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(WEBP) - 12) + b"WEBP" + canvas + WEBP[12:]


def _bmp_rle() -> bytes:
    """A 4x2 bitmap of runs."""
    runs = bytes([4, 1, 0, 0, 2, 0, 2, 1, 0, 1])
    palette = b"\0\0\0\0\xff\xff\xff\0"
    header = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 8, 1, len(runs), 0, 0, 2, 2)
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + header + palette + runs


def _exif(entries: bytes, count: int) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries


def _crc_broken() -> bytes:
    place = PNG.index(b"IDAT") + 40
    return PNG[:place] + bytes([PNG[place] ^ 0xFF]) + PNG[place + 1 :]


def _laughs(levels: int) -> bytes:
    """Each group uses the one before ten times: 10^levels squares."""
    groups = '<rect id="g0" width="1" height="1"/>'
    for level in range(1, levels + 1):
        groups += f'<g id="g{level}">' + f'<use xlink:href="#g{level - 1}"/>' * 10 + "</g>"
    return _svg(f'<defs>{groups}</defs><use xlink:href="#g{levels}"/>')


TRUNCATED = {
    f"truncated_{name}_{tenth}": BadImage(whole[: len(whole) * tenth // 10], "truncated")
    for name, whole in {"jpeg": JPEG, "png": PNG, "webp": WEBP, "gif": GIF}.items()
    for tenth in range(1, 10)
}

NO_IMAGES = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html><head><title>404</title></head><body>gone</body></html>", "not_an_image"),
    "html_with_svg_inside": (b"<!-- x --><html><body><svg viewBox='0 0 1 1'/></body></html>", "not_an_image"),
    "json_error": (b'{"error": {"code": 403, "message": "forbidden"}}', "not_an_image"),
    "text": (b"not an image, was ist das?\n" * 20, "not_an_image"),
    "zeros": (bytes(1000), "not_an_image"),
    "one_byte": (b"\xff", "not_an_image"),
    "noise": (np.random.default_rng(0).bytes(1000), "not_an_image"),
    "zip": (_zip(), "unsupported_format"),
    "gzip": (zlib.compress(PNG, wbits=31), "unsupported_format"),
    "eps_named_jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "unsupported_format"),
    "eps_binary": (b"\xc5\xd0\xd3\xc6" + bytes(60), "unsupported_format"),
    "pdf_named_jpg": (b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\n", "unsupported_format"),
    "psd": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(50), "unsupported_format"),
    "ico_with_png": (encoded(PHOTO, "ICO", sizes=[(32, 32)]), "unsupported_format"),
    "jpeg_2000": (encoded(PHOTO, "JPEG2000"), "unsupported_format"),
    "jpeg_xl": (b"\xff\x0a" + bytes(40), "unsupported_format"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60), "unsupported_format"),
    "video": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(60), "unsupported_format"),
}

JPEGS = {
    "jpeg_then_zip": (JPEG + _zip(), OK),
    "jpeg_after_jpeg": (JPEG + JPEG, OK),
    "jpeg_with_two_starts": (JPEG[:2] + JPEG, "undecodable"),
    "jpeg_without_end": (JPEG[:-2], "truncated"),
    "jpeg_header_only": (JPEG[: JPEG.index(b"\xff\xda")], "undecodable"),
    "jpeg_bomb": (with_frame(JPEG, width=65_500, height=65_500), "too_many_pixels"),
    "jpeg_zero_wide": (with_frame(JPEG, width=0), "undecodable"),
    "jpeg_zero_high": (with_frame(JPEG, height=0), "undecodable"),
    "jpeg_65500_wide": (encoded(Image.new("RGB", (65_500, 8), "red"), "JPEG"), OK),
    "jpeg_higher_than_its_bytes": (with_frame(JPEG, height=7_200), OK),
    "jpeg_progressive": (encoded(PHOTO, "JPEG", progressive=True), OK),
    "jpeg_of_5000_scans": (with_many_scans(5000), "too_many_scans"),
    "jpeg_arithmetic": (ARITHMETIC, OK),
    "jpeg_12_bit": (with_frame(JPEG, precision=12), "undecodable"),
    "jpeg_lossless": (with_frame(JPEG, marker=0xC3), "undecodable"),
    "jpeg_cmyk": (encoded(PHOTO.convert("CMYK"), "JPEG"), OK),
    "jpeg_ycck": (ycck(PHOTO.convert("CMYK")), OK),
    "jpeg_grey": (encoded(PHOTO.convert("L"), "JPEG"), OK),
    "jpeg_broken_profile": (encoded(PHOTO, "JPEG", icc_profile=b"not a profile" * 30), OK),
    "jpeg_cut_profile": (encoded(PHOTO, "JPEG", icc_profile=cmyk_profile(50)[:300]), OK),
    "jpeg_profile_of_other_colours": (encoded(PHOTO, "JPEG", icc_profile=cmyk_profile(50)), OK),
    "jpeg_broken_exif": (with_segment(JPEG, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), OK),
    "jpeg_exif_orientation_99": (with_segment(JPEG, 0xE1, _exif(struct.pack("<HHII", 0x112, 3, 1, 99), 1)), OK),
    "jpeg_exif_bomb": (with_segment(JPEG, 0xE1, _exif(struct.pack("<HHII", 0x112, 5, 0xFFFFFFFF, 8), 0xFFFF)), OK),
    "jpeg_endless_comments": (JPEG[:2] + b"\xff\xfe\xff\xff" + bytes(65_533) + JPEG[2:], OK),
    "mpo": (encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(180)]), OK),
}

PNGS = {
    "png_named_jpg": (PNG, OK),
    "png_with_tail": (PNG + b"<script>alert(1)</script>" * 10, OK),
    "png_bomb": (png(50_000, 50_000, rows=b"\0" * 1000), "too_many_pixels"),
    "png_grey_bomb": (encoded(Image.new("1", (9_000, 9_000)), "PNG"), "too_many_pixels"),
    "png_zero_wide": (png(0, 8), "undecodable"),
    "png_one_pixel": (png(1, 1), "too_small"),
    "png_one_pixel_high": (png(500, 1), "too_small"),
    "png_65500_wide": (png(65_500, 2), OK),
    "png_16_bit_grey": (png(20, 20, depth=16, colour=0), OK),
    "png_16_bit_colour": (png(20, 20, depth=16, colour=2), OK),
    "png_16_bit_alpha": (png(20, 20, depth=16, colour=6), OK),
    "png_grey_alpha": (png(20, 20, colour=4), OK),
    "png_one_bit": (png(20, 20, depth=1, colour=0), OK),
    "png_palette_transparent": (encoded(DRAWING, "PNG", transparency=3), OK),
    "png_palette_alphas": (encoded(DRAWING, "PNG", transparency=bytes(range(0, 256, 8))), OK),
    "png_palette_missing": (png(8, 8, colour=3, rows=b"\0" * 72), "undecodable"),
    "png_colour_key": (png(20, 20, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))), OK),
    "png_interlaced": (interlaced_png(20), OK),
    "png_broken_sum": (_crc_broken(), "undecodable"),
    "png_without_end": (PNG[:-12], OK),
    "png_of_nothing": (png(8, 8, rows=b""), "truncated"),
    "png_profile_bomb": (png(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(30_000_000)))), "metadata_too_large"),
    "png_text_bomb": (png(8, 8, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(30_000_000)))), "metadata_too_large"),
    "png_broken_profile": (png(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile"))), OK),
    "png_broken_exif": (png(8, 8, chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")), OK),
    "png_animated": (encoded(FRAMES[0], "PNG", **SEVERAL), OK),
}

OTHERS = {
    "gif_with_script": (GIF + b"/*<script>alert(1)</script>*/", OK),
    "gif_animated": (encoded(FRAMES[0], "GIF", **SEVERAL), OK),
    "gif_transparent": (encoded(DRAWING, "GIF", transparency=2), OK),
    "gif_bomb": (GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:], "too_many_pixels"),
    "gif_without_frame": (GIF[:13] + b";", "undecodable"),
    "webp_animated": (encoded(FRAMES[0].convert("RGB"), "WEBP", **SEVERAL), OK),
    "webp_alpha": (encoded(PHOTO.convert("RGBA"), "WEBP", lossless=True), OK),
    "webp_lies_of_its_size": (_webp_lie(), "undecodable"),
    "webp_bomb": (_webp_bomb(), "too_many_pixels"),
    "avif": (encoded(PHOTO, "AVIF"), OK),
    "avif_cut": (encoded(PHOTO, "AVIF")[:-300], "undecodable"),
    "tiff_of_pages": (encoded(FRAMES[0].convert("RGB"), "TIFF", **SEVERAL), OK),
    "tiff_plain": (_plain_tiff(), OK),
    "tiff_strip_far_away": (_plain_tiff(offset=(4, 1, 0x7FFFFFFF)), "truncated"),
    "tiff_strip_too_short": (_plain_tiff(length=(4, 1, 5)), OK),
    "tiff_of_4e9_strips": (_plain_tiff(offset=(4, 0xFFFFFFFF, 2000)), "undecodable"),
    "tiff_bomb": (_plain_tiff(width=(4, 1, 60_000), height=(4, 1, 60_000)), "too_many_pixels"),
    "tiff_float": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "unsupported_mode"),
    "bmp": (BMP, OK),
    "bmp_runs": (_bmp_rle(), OK),
    "bmp_bomb": (BMP[:18] + struct.pack("<ii", 60_000, 60_000) + BMP[26:], "too_many_pixels"),
    "ppm_huge_header": (b"P6\n99999999 99999999\n255\n" + bytes(30), "too_many_pixels"),
    "ppm_endless_number": (b"P6\n" + b"9" * 100_000, "undecodable"),
    "ppm_16_bit": (b"P5\n8 8\n65535\n" + bytes(range(128)), OK),
}

DRAWINGS = {
    "svg": (_svg('<rect width="8" height="16" fill="red"/>'), OK),
    "svg_after_comment": (_svg("<g/>", before='<?xml version="1.0"?>\n<!-- a -->\n<!DOCTYPE svg>'), OK),
    "svg_entity": (
        _svg("&a;", before='<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>'),
        "svg_refers_outside",
    ),
    "svg_laughs": (
        _svg("&b;", before='<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'),
        "svg_refers_outside",
    ),
    "svg_laughs_by_use": (_laughs(9), "svg_too_complex"),
    "svg_external_image": (
        _svg('<image xlink:href="http://127.0.0.1/a.png" width="9" height="9"/>'),
        "svg_refers_outside",
    ),
    "svg_file_image": (_svg('<image href="/etc/hostname" width="9" height="9"/>'), "svg_refers_outside"),
    "svg_filter_image": (_svg('<filter id="f"><feImage href="a.png"/></filter>'), "svg_refers_outside"),
    "svg_imports_style": (_svg("<style>@import url(http://127.0.0.1/a.css);</style>"), "svg_refers_outside"),
    "svg_script": (_svg("<script>while(1);</script><rect width='9' height='9'/>"), OK),
    "svg_html_inside": (_svg("<foreignObject width='9' height='9'><b>x</b></foreignObject>"), OK),
    "svg_huge_view_box": (_svg('<rect width="1e9" height="1e9"/>', 'viewBox="0 0 1e9 1e9"'), OK),
    "svg_huge_size": (_svg('<rect width="9" height="9"/>', 'width="900000" height="900000"'), OK),
    "svg_in_millimetres": (_svg('<rect width="9" height="9"/>', 'width="40mm" height="2cm" viewBox="0 0 20 10"'), OK),
    "svg_long": (_svg('<rect width="9" height="1"/>', 'viewBox="0 0 100 1"'), "svg_too_long"),
    "svg_without_area": (_svg("", 'width="0" height="9"'), "undecodable"),
    "svg_unclosed": (_svg("<g>"), "undecodable"),
    "svg_begun": (b"<svg", "undecodable"),
    "svg_utf_16": ("\ufeff<svg/>".encode("utf-16-le"), "not_an_image"),
    "svg_latin_1": (_svg("<title>x</title>").replace(b">x<", b">\xe9<"), "undecodable"),
    "svg_deep": (_svg("<g opacity='.5'>" * 5_000 + "<rect width='9' height='9'/>" + "</g>" * 5_000), "svg_too_complex"),
    "svg_tile_of_gigabytes": (
        _svg(
            '<pattern id="p" width="2" height="2" patternUnits="userSpaceOnUse" patternTransform="scale(40000)">'
            '<rect width="9" height="9"/></pattern><rect width="16" height="16" fill="url(#p)"/>'
        ),
        "svg_too_complex",
    ),
    "svg_of_ten_million_bytes": (_svg("<!--" + "x" * 10_000_000 + "-->"), "svg_too_complex"),
}

BAD_IMAGES: Mapping[str, BadImage] = TRUNCATED | {
    name: BadImage(*pair) for group in (NO_IMAGES, JPEGS, PNGS, OTHERS, DRAWINGS) for name, pair in group.items()
}
"""By name; names are fit for files."""
