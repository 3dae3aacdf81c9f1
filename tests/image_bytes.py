"""Images as bytes, made by hand where no encoder would: chunks, markers, profiles."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image


def natural(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with the spectrum of photographs, 1/f, and with edges."""
    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    amplitude = np.maximum(np.hypot(rows, columns), 1) ** -1.1

    def plane() -> np.ndarray:
        waves = amplitude * np.exp(2j * np.pi * generator.random(amplitude.shape))
        noise = np.fft.irfft2(waves, s=(height, width))
        return (noise - noise.mean()) / noise.std()

    light = plane()
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for _ in range(24):
        centre_x, centre_y = generator.random(2) * (width, height)
        radius, aspect = min(width, height) * generator.uniform(0.02, 0.25), generator.uniform(0.5, 1.5)
        inside = ((x - centre_x) / aspect) ** 2 + ((y - centre_y) * aspect) ** 2 < radius**2
        light[inside] = light[inside] * 0.6 + generator.uniform(-1.8, 1.8)
    light, warm, green = 128 + 48 * light, plane(), plane()
    colours = np.stack([light + 18 * warm, light - 9 * warm - 8 * green, light + 20 * green], axis=-1)
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# --- PNG ------------------------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(width: int, height: int, *middle: bytes, depth: int = 8, colour: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG with chunks of the caller's between header and pixels; colour 0 grey, 2 RGB, 3 palette, 4 LA, 6 RGBA."""
    if rows is None:
        bits = width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        rows = (b"\0" + np.arange((bits + 7) // 8).astype(np.uint8).tobytes()) * height
    return _png((width, height, depth, colour, 0, 0, 0), rows, *middle)


def interlaced_png(side: int) -> bytes:
    """A red square in the seven passes of Adam7: first place and step of each, in x and y."""
    passes = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    sizes = [(len(range(x, side, over)), len(range(y, side, down))) for x, over, y, down in passes]
    rows = b"".join((b"\0" + b"\xff\0\0" * width) * height for width, height in sizes if width)
    return _png((side, side, 8, 2, 0, 0, 1), rows)


def _png(header: tuple[int, ...], rows: bytes, *middle: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header))
    return start + b"".join(middle) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- JPEG -----------------------------------------------------------------------------------------------------------


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + segment(marker, content) + jpeg[2:]


def with_frame(jpeg: bytes, *, width: int | None = None, height: int | None = None, **fields: int) -> bytes:
    """The JPEG with other words in its frame header: width, height, precision, marker."""
    place = next(place for place in (jpeg.find(bytes([0xFF, sof])) for sof in (0xC0, 0xC1, 0xC2)) if place > 0)
    patched = bytearray(jpeg)
    if width is not None:
        patched[place + 7 : place + 9] = struct.pack(">H", width)
    if height is not None:
        patched[place + 5 : place + 7] = struct.pack(">H", height)
    patched[place + 4] = fields.get("precision", patched[place + 4])
    patched[place + 1] = fields.get("marker", patched[place + 1])
    return bytes(patched)


def with_many_scans(num_scans: int) -> bytes:
    """A progressive JPEG that repeats its last, empty pass."""
    jpeg = encoded(Image.new("L", (64, 64), 90), "JPEG", progressive=True)
    last = jpeg.rfind(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * num_scans + b"\xff\xd9"


def ycck(image: Image.Image) -> bytes:
    """A CMYK image as Adobe's YCCK JPEG: inverted, the first three channels as light and colour."""
    cyan, magenta, yellow, black = image.split()
    light = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    channels = [channel.point(lambda level: 255 - level) for channel in light]  # Pillow inverts once more
    jpeg = encoded(Image.merge("CMYK", (*channels, black)), "JPEG", quality=100)
    place = jpeg.index(b"Adobe")
    return jpeg[: place + 11] + b"\x02" + jpeg[place + 12 :]


# --- profiles (ICC.1:2001-04) ---------------------------------------------------------------------------------------

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""X, Y, Z of red, green and blue under D50."""
D50 = (0.9642, 1.0, 0.8249)


def rgb_profile(primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    tags = {b"wtpt": _xyz(D50)}
    for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags |= {name + b"XYZ": _xyz(primary), name + b"TRC": _curve(gamma)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": _curve(gamma)})


def cmyk_profile(lightness_of_cyan: int) -> bytes:
    """A press on which full cyan is a grey of this lightness, any other ink black, and paper white."""
    inks = np.array(
        [255 if corner == 0 else lightness_of_cyan * 255 // 100 if corner == 8 else 0 for corner in range(16)]
    )
    corners = np.stack([inks, np.full(16, 128), np.full(16, 128)], axis=-1).astype(np.uint8)
    line = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * int(place % 4 == 0) for place in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + line * 4 + corners.tobytes() + line * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": lut, b"A2B1": lut})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\x05test\0" + bytes(79), b"cprt": b"text\0\0\0\0none\0"} | tags
    tags = {name: content + bytes(-len(content) % 4) for name, content in tags.items()}
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    header = bytearray(128)
    header[0:4] = struct.pack(">I", place + len(body))
    header[8:12] = b"\x02\x40\0\0"
    header[12:24] = kind + space + connection
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3i", *(round(65536 * level) for level in D50))
    return bytes(header) + table + body


def _xyz(levels: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * level) for level in levels))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
