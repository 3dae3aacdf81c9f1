"""Vector drawings → pixels, with no file from outside and no drawing that holds up or ends its worker.

Order: refuse what refers outside → read the shape from the root → draw. A drawing of few plain elements is drawn right
here; one with parts that can multiply (reuse, patterns, filters, masks), or deep, or long, is drawn in a process of its
own with a limit on CPU time and memory: resvg recurses once a level, and 300 nested groups overflow a thread's stack.
Text is not drawn, as fonts differ from machine to machine.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import dataclass
from xml.parsers import expat

import resvg_py
from PIL import Image

from pipeline.store.schema import Reject

MAX_ASPECT = 8
"""Beyond this ratio of sides a drawing's centre crop would show next to nothing of it."""

MAX_BYTES = 8_000_000
"""Longer drawings are refused before they are parsed."""

PLAIN_WORK, PLAIN_DEPTH = 2_000 * 256 * 256, 48
"""Elements times pixels, and levels, up to which plain elements are drawn here: at worst, where each is a transparent
layer of its own, in two seconds, and in a quarter of a thread's stack."""

CPU_SECONDS, MEMORY_BYTES = 20, 2 << 30
"""Limits of the process that draws what is not plain."""

NATURAL_SIDE = 4096
"""A drawing has a shape and no size; its shorter side is given this length to count with."""

_START = re.compile(
    rb"(?:\xef\xbb\xbf)?"
    rb"(?>\s+|<\?(?>.*?\?>)|<!--(?>.*?-->)|<!DOCTYPE(?>[^>\[]*(?:\[(?>.*?\])\s*)?>))*+"
    rb"<(?:\w+:)?svg(?:[\s>/]|\Z)",
    re.IGNORECASE | re.DOTALL,
)
"""Spaces, processing instructions, comments and a document type, then the root; nothing is tried twice."""
_OUTSIDE = re.compile(r"<(\w+:)?(image|feImage)\b|<!ENTITY|@import", re.IGNORECASE)
"""Ways for a drawing to take in other files, which a drawing from elsewhere must not choose."""

_MULTIPLYING = frozenset({"use", "pattern", "marker", "filter", "mask", "symbol", "switch", "style"})
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(px|pt|pc|mm|cm|in)?\s*\Z")
_PIXELS_OF_UNIT = {"": 1.0, "px": 1.0, "pt": 96 / 72, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}

_SAID = "resvg: "
_DRAW_APART = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import resvg_py
text, (width, height) = sys.stdin.buffer.read().decode(), map(int, sys.argv[1:])
try:
    drawn = resvg_py.svg_to_bytes(svg_string=text, width=width, height=height, dpi=96, skip_system_fonts=True)
except ValueError as error:
    sys.exit("{_SAID}" + str(error))
sys.stdout.buffer.write(drawn)
"""


@dataclass(slots=True)
class Drawing:
    """What a parse of the XML tells of a drawing.

    Attributes:
        root: attributes of the outermost element.
        num_elements: elements in all.
        depth: elements nested in each other, at most; a clipping path may lie within each other one.
        is_plain: whether no element can multiply others.
    """

    root: dict[str, str]
    num_elements: int = 0
    depth: int = 0
    is_plain: bool = True


def is_svg(content: bytes) -> bool:
    """Return whether the bytes begin like a vector drawing."""
    return bool(_START.match(content))


def natural_size(content: bytes) -> tuple[int, int] | Reject:
    """Return the shape of a drawing as a width and height of which the shorter is NATURAL_SIDE.

    Reasons: "svg_refers_outside", "svg_too_long", "svg_too_complex", "undecodable".
    """
    read = _read(content)
    if isinstance(read, Reject):
        return read
    text, drawing = read
    shape = _declared_shape(drawing.root) or _drawn_shape(text, drawing)
    if isinstance(shape, Reject):
        return shape
    width, height = shape
    if max(width, height) > MAX_ASPECT * min(width, height):
        return Reject("svg_too_long", f"{width:g}x{height:g}")
    scale = NATURAL_SIDE / min(width, height)
    return round(width * scale), round(height * scale)


def draw(content: bytes, width: int, height: int) -> Image.Image | Reject:
    """Return the drawing as large as fits into a box of this size, with its transparency."""
    read = _read(content)
    if isinstance(read, Reject):
        return read
    text, drawing = read
    return _draw(text, drawing, width, height)


def _read(content: bytes) -> tuple[str, Drawing] | Reject:
    if len(content) > MAX_BYTES:
        return Reject("svg_too_complex", f"{len(content)} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Reject("undecodable", f"SVG is not UTF-8: {error}"[:200])
    if outside := _OUTSIDE.search(text):
        return Reject("svg_refers_outside", outside.group())
    try:
        return text, _parsed(text)
    except (expat.ExpatError, ValueError) as error:
        return Reject("undecodable", f"SVG: {error}"[:200])


def _parsed(text: str) -> Drawing:
    """Count what the drawing is made of.

    Raises:
        expat.ExpatError: where the text is no XML.
    """
    drawing, level, num_clips = Drawing(root={}), 0, 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal level, num_clips
        local = name.rpartition(":")[2]
        if level == 0:
            drawing.root = attributes
        level += 1
        num_clips += local == "clipPath"
        drawing.num_elements += 1
        drawing.depth = max(drawing.depth, level)
        drawing.is_plain &= local not in _MULTIPLYING

    def end(_: str) -> None:
        nonlocal level
        level -= 1

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.Parse(text, True)
    drawing.depth += num_clips
    return drawing


def _declared_shape(root: dict[str, str]) -> tuple[float, float] | None:
    """Return width and height that the root names, else those of its view box, else None."""
    width, height = (_length(root.get(name, "")) for name in ("width", "height"))
    if width and height:
        return width, height
    is_relative = any(root.get(name, "100%").strip() not in ("100%", "auto") for name in ("width", "height"))
    sides = [_length(number) for number in root.get("viewBox", "").replace(",", " ").split()]
    if len(sides) != 4 or not sides[2] or not sides[3] or (is_relative and not (width or height)):
        return None
    return sides[2], sides[3]


def _length(text: str) -> float | None:
    """Return a length above 0 in pixels, or None for a relative or wrong one."""
    found = _NUMBER.match(text[:64])
    length = float(found[1]) * _PIXELS_OF_UNIT[found[2] or ""] if found else 0.0
    return length if 1e-6 < length < 1e9 else None


def _drawn_shape(text: str, drawing: Drawing) -> tuple[float, float] | Reject:
    """Draw small to see which shape it takes."""
    drawn = _draw(text, drawing, 256, 256)
    return drawn if isinstance(drawn, Reject) else (float(drawn.width), float(drawn.height))


def _draw(text: str, drawing: Drawing, width: int, height: int) -> Image.Image | Reject:
    is_small = drawing.num_elements * width * height <= PLAIN_WORK and drawing.depth <= PLAIN_DEPTH
    png = _here(text, width, height) if drawing.is_plain and is_small else _apart(text, width, height)
    if isinstance(png, Reject):
        return png
    drawn = Image.open(io.BytesIO(png), formats=("PNG",))
    drawn.load()
    return drawn


def _here(text: str, width: int, height: int) -> bytes | Reject:
    try:
        return resvg_py.svg_to_bytes(svg_string=text, width=width, height=height, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        return _reject(str(error))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a panic in Rust becomes; it can't be imported
            raise
        return Reject("undecodable", f"SVG: resvg panicked: {error}"[:200])


def _apart(text: str, width: int, height: int) -> bytes | Reject:
    command = [sys.executable, "-c", _DRAW_APART, str(width), str(height)]
    ended = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if ended.returncode == 0:
        return ended.stdout
    message = ended.stderr.decode(errors="replace").strip()[-200:]
    if message.startswith(_SAID):
        return _reject(message.removeprefix(_SAID))
    return Reject("svg_too_complex", f"its process ended with {ended.returncode}")


def _reject(message: str) -> Reject:
    """Return the reason that an error of resvg's stands for; it counts elements itself once they are multiplied."""
    return Reject("svg_too_complex" if "limit" in message else "undecodable", f"SVG: {message}"[:200])
