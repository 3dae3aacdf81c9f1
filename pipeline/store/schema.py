"""What a row is, before and after ingest, and how it is named.

A key is a digest of what identifies the row at its source, never its position: adding rows, or changing the shard
size, renames nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

SCHEMA_VERSION = 2
"""Raised whenever a folder written by older code can no longer be read as one written by this."""

KEY_LENGTH = 24
"""Hex digits of a key: 96 bits, so that among 10^9 rows two keys meet with probability below 10^-11."""

JSON: TypeAlias = Any
"""A value that JSON can hold: None, bool, int, float, str, or a list or dict of these."""

Row: TypeAlias = dict[str, Any]
"""One row of a tar: `__key__` (str) and its members by suffix (bytes), as WebDataset has them."""


class Split(StrEnum):
    """The part of a dataset that a row belongs to."""

    TRAIN = "train"
    VALIDATION = "validation"


NO_CLASS_PIXEL = 255
"""What a semantic map says of a pixel of no class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One image with its texts as a source offers it, before anything was fetched or decoded.

    Attributes:
        key: the row's name, from `key_of`.
        captions: texts of the image, the best first; may be empty.
        payload: the image's encoded bytes, or None where they must be fetched.
        url: where the bytes are, or None where they are here.
        attributes: whatever else the source knows, kept in the row's JSON.
        semantic_map: a map's encoded bytes, none of them where it is missing; None where pictures have no maps.
        members: finished members by suffix, which go into the tar as they are; such a row has no payload.
    """

    key: str
    captions: tuple[str, ...]
    payload: bytes | None = None
    url: str | None = None
    attributes: dict[str, JSON] = field(default_factory=dict)
    members: Mapping[str, bytes] | None = None
    semantic_map: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """Why an input row is not in the dataset.

    Attributes:
        reason: a fixed word such as "http_404" or "too_small", under which rows are counted.
        detail: what was found, for a person to read.
    """

    reason: str
    detail: str = ""


def key_of(identity: str) -> str:
    """Return the key of what `identity` names: 24 hex digits of its sha256."""
    return hashlib.sha256(identity.encode()).hexdigest()[:KEY_LENGTH]


def json_text(content: JSON) -> str:
    """Return the one JSON text of plain data, whatever a hostile source put into it.

    What JSON has no word for (NaN, infinities) is null, a lone surrogate a question mark, any other object its text.
    """
    return json.dumps(_plain(content), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _plain(content: JSON) -> JSON:
    match content:
        case None | bool() | int():
            return content
        case float():
            return content if math.isfinite(content) else None
        case Mapping():
            return {_plain_text(str(name)): _plain(value) for name, value in content.items()}
        case list() | tuple():
            return [_plain(value) for value in content]
        case _:
            return _plain_text(str(content))


def _plain_text(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
