"""Lines of CSV, TSV and JSONL as records with their byte offsets; a broken line costs itself and nothing after it.

A CSV record may span lines inside a quoted field (RFC 4180). Where a quote is never closed, or text follows a closing
one, the first line stands alone, its quotes being plain letters, and reading goes on at the second: so every line is
part of one record, and any record can be read from its offset without what stands before it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import IO

MAX_RECORD_BYTES = 16 << 20
"""Longest record that is read; what is longer is one broken record, of which this much is never held at once."""

_CLOSING = re.compile(rb'(?:[^"]++|"")*+"')
_QUOTED = re.compile(rb'"((?:[^"]++|"")*+)"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """What stands in place of a record that can't be read.

    Attributes:
        reason: what is wrong, for a person.
        content: the beginning of what was found.
    """

    reason: str
    content: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of a text file.

    Attributes:
        offset: its first byte.
        content: its bytes without the line's end.
        has_quotes: whether quotes enclose fields; else they are plain letters.
        problem: why it can't be read, or "".
    """

    offset: int
    content: bytes
    has_quotes: bool = False
    problem: str = ""


class _State(Enum):
    DONE = 0
    INSIDE = 1
    BROKEN = 2


_Line = tuple[int, bytes, str]
"""Offset, bytes with the line's end, and problem or ""."""


def read_records(file: IO[bytes], offset: int, delimiter: bytes) -> Iterator[Record]:
    """Yield the records of a file from its present place on; blank lines are none.

    Args:
        file: a buffered file, placed at `offset`.
        offset: the first byte of a record.
        delimiter: what parts fields, or b"" where a line is a record whatever it holds (JSONL).
    """
    lines = _lines(file, offset)
    waiting: deque[_Line] = deque()
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        place, content, problem = line
        if problem or not delimiter or b'"' not in content:
            if problem or content.strip(b"\r\n" if delimiter else None):
                yield Record(offset=place, content=content.rstrip(b"\r\n"), problem=problem)
            continue
        further = _rest_of_record(content, waiting, lines, delimiter)
        if further is None:
            yield Record(offset=place, content=content.rstrip(b"\r\n"))
            continue
        parts = [waiting.popleft()[1] for _ in range(further)]
        yield Record(offset=place, content=b"".join([content, *parts]).rstrip(b"\r\n"), has_quotes=True)


def fields_of(record: Record, delimiter: bytes) -> list[bytes]:
    """Return the fields of a record, without the quotes around them."""
    if not record.has_quotes:
        return record.content.split(delimiter)
    fields, place, content = [], 0, record.content
    while True:
        if quoted := _QUOTED.match(content, place):
            fields.append(quoted[1].replace(b'""', b'"'))
            place = quoted.end()
        else:
            end = content.find(delimiter, place)
            fields.append(content[place : end if end >= 0 else None])
            place = end if end >= 0 else len(content)
        if place >= len(content):
            return fields
        place += len(delimiter)


def _rest_of_record(first: bytes, waiting: deque[_Line], lines: Iterator[_Line], delimiter: bytes) -> int | None:
    """Return how many of the lines that wait belong to the record that `first` begins; None if it is not well-formed.

    Lines that had to be looked at are left in `waiting`.
    """
    state, num_bytes = _state_after(first, False, delimiter), len(first)
    seen = 0
    while state is _State.INSIDE and num_bytes <= MAX_RECORD_BYTES:
        if seen == len(waiting):
            line = next(lines, None)
            if line is None:
                return None
            waiting.append(line)
        _, content, problem = waiting[seen]
        if problem:
            return None
        seen += 1
        num_bytes += len(content)
        state = _state_after(content, True, delimiter) if b'"' in content else state
    return seen if state is _State.DONE else None


def _state_after(line: bytes, is_inside: bool, delimiter: bytes) -> _State:
    """Return whether the record is complete after a line that began inside a quoted field, or not."""
    place = 0
    while True:
        if not is_inside and line.startswith(b'"', place):
            is_inside, place = True, place + 1
        if is_inside:
            closing = _CLOSING.match(line, place)
            if closing is None:
                return _State.INSIDE
            is_inside, place = False, closing.end()
            if not line.startswith(delimiter, place):
                return _State.BROKEN if line[place:].strip(b"\r\n") else _State.DONE
        else:
            place = line.find(delimiter, place)
            if place < 0:
                return _State.DONE
        place += len(delimiter)


def _lines(file: IO[bytes], offset: int) -> Iterator[_Line]:
    while line := file.readline(MAX_RECORD_BYTES):
        num_bytes = len(line)
        if num_bytes < MAX_RECORD_BYTES or line.endswith(b"\n"):
            yield offset, line, ""
        else:
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(MAX_RECORD_BYTES)):
                num_bytes += len(rest)
            yield offset, line[:1024], f"a line of {num_bytes} bytes; {MAX_RECORD_BYTES} are allowed"
        offset += num_bytes
