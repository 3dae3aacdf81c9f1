"""Pieces of a page as a tree, so that no text, however hostile, can become markup.

Captions, URLs and attributes are written by strangers. They enter the tree as text and leave it escaped by the
serialiser, with what a browser or a terminal could stumble over (NUL, control characters, lone surrogates, marks that
turn the reading direction) made visible as U+FFFD.
"""

from __future__ import annotations

import re
from typing import TypeAlias
from xml.etree import ElementTree

Element: TypeAlias = ElementTree.Element
Child: TypeAlias = "Element | str"

ELLIPSIS = "…"
MAX_TEXT_CHARS = 140
"""Letters of a caption, host or reason that are shown."""

_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def element(tag: str, *children: Child, **attributes: str) -> Element:
    """Return a node; `class_` names the attribute `class`, `aria_label` the attribute `aria-label`."""
    named = {name.rstrip("_").replace("_", "-"): _showable(value) for name, value in attributes.items()}
    node = ElementTree.Element(tag, named)
    for child in children:
        _append(node, child)
    return node


def svg(width: int, height: int, *children: Child, **attributes: str) -> Element:
    """Return a drawing of that many units, as wide as the page gives it room."""
    return element("svg", *children, viewBox=f"0 0 {width} {height}", **attributes)


def stranger(text: str, max_chars: int = MAX_TEXT_CHARS) -> Element:
    """Return another's words: cut to a readable length, and shut off from the reading direction around them."""
    return element("bdi", cut(text, max_chars))


def cut(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """Return the text, or its beginning and an ellipsis where it is longer."""
    return text if len(text) <= max_chars else text[: max_chars - 1] + ELLIPSIS


def render(page: Element) -> bytes:
    """Return the page as UTF-8 HTML."""
    return b"<!doctype html>\n" + ElementTree.tostring(page, encoding="utf-8", method="html") + b"\n"


def count(number: int) -> str:
    """Return a number with separators for thousands."""
    return f"{number:,}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole as a percentage with one decimal; of nothing, a dash."""
    return f"{part / whole:.1%}" if whole else "–"


def byte_size(number: float) -> str:
    """Return a size in the largest unit that leaves at least one of it."""
    power = 0
    while number >= 1000 and power < len(_BYTE_UNITS) - 1:
        number, power = number / 1000, power + 1
    return (
        f"{number:,.0f} {_BYTE_UNITS[power]}" if power == 0 or number >= 100 else f"{number:.3g} {_BYTE_UNITS[power]}"
    )


def decimal(number: float) -> str:
    """Return a number as a person would write it: whole where it is whole, else four digits."""
    if number == round(number) and abs(number) < 1e9:
        return f"{number:,.0f}"
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e9 else f"{number:.4g}"


def _append(node: Element, child: Child) -> None:
    if not isinstance(child, str):
        node.append(child)
        return
    text = _showable(child)
    if len(node):
        node[-1].tail = (node[-1].tail or "") + text
    else:
        node.text = (node.text or "") + text


def _showable(text: str) -> str:
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text)
