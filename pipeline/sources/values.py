"""Values as dirty tables hold them → captions, addresses and attributes; nothing here raises on data.

Text loses NUL and lone surrogates (replaced by U+FFFD), nothing else: it is cut nowhere. Numbers that JSON can't hold
(NaN, infinities) are absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.store.schema import JSON

MAX_DEPTH = 16
"""Levels of nesting kept of an attribute."""


def text_of(value: Any) -> str:
    """Return a value as text; "" for what is absent or no text: None, NaN, lists, mappings."""
    match value:
        case str():
            return _sound(value)
        case bytes() | bytearray() | memoryview():
            return _sound(bytes(value).decode("utf-8", errors="replace"))
        case float() if not math.isfinite(value):
            return ""
        case bool() | int() | float():
            return str(value)
        case _:
            return ""


def captions_of(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the captions among values, a list counting as several; each once, blank ones never."""
    flat = (item for value in values for item in (value if isinstance(value, list | tuple) else (value,)))
    return tuple(dict.fromkeys(text for item in flat if (text := text_of(item)).strip()))


def url_of(value: Any) -> str:
    """Return an address without the blanks around it; "" for what is no text."""
    return text_of(value).strip() if isinstance(value, str | bytes) else ""


def json_of(value: Any, depth: int = MAX_DEPTH) -> JSON:
    """Return a value as plain JSON holds it; what has no such form becomes its text, what nests too deep None."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str() | bytes() | bytearray() | memoryview():
            return text_of(value)
        case Mapping():
            return {_sound(str(name)): json_of(item, depth - 1) for name, item in value.items()} if depth else None
        case list() | tuple() | set() | frozenset():
            return [json_of(item, depth - 1) for item in value] if depth else None
        case _:
            return _sound(str(value))


def _sound(text: str) -> str:
    """Return text that UTF-8, and every reader of C strings, can hold."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "")
