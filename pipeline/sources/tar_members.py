"""The members of a tar, sound or not: each with its place, and for whatever is wrong a word where it was found.

`tarfile` stops without a word at the first broken header, and follows what sparse members and links say of
themselves. Here headers are read one by one: after garbage the next sound header is looked for, links, devices and
sparse members are named and passed over, and contents are read only when they are asked for.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from pipeline.sources.files import size_of

BLOCK_BYTES = 512
MAX_EXTENDED_BYTES = 64 << 10
"""How much of a long name or extended header is read."""
MAX_DIGITS = 20
"""Longest number that an extended header may hold."""
SCAN_BYTES = 1 << 20

_ENCODING = ("utf-8", "replace")


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """One regular file of a tar, or what stands where one was expected.

    Attributes:
        offset: the first byte of its header.
        name: its name, as the tar has it.
        start: the first byte of its content.
        num_bytes: the length of its content.
        problem: why it can't be used, or "".
    """

    offset: int
    name: str = ""
    start: int = 0
    num_bytes: int = 0
    problem: str = ""

    def content(self, file: IO[bytes]) -> bytes:
        """Return the member's bytes."""
        file.seek(self.start)
        return file.read(self.num_bytes)


def read_members(file: IO[bytes]) -> Iterator[TarMember]:
    """Yield the regular members of a tar in order, and a member with a problem for everything that is none."""
    size, offset, extended = size_of(file), 0, dict[str, str]()
    while offset < size:
        header = _header(file, offset)
        if header is None:
            garbage, offset = offset, _next_header(file, offset, size)
            if not _is_blank(file, garbage, offset):
                yield TarMember(offset=garbage, problem=f"{offset - garbage} bytes at {garbage} are no tar")
            extended = {}
            continue
        start = _content_start(file, header, offset)
        num_bytes = int(extended.get("size", header.size)) if header.isreg() else header.size
        if header.type in _EXTENSIONS:
            file.seek(start)
            extended |= _extended(header.type, file.read(min(num_bytes, MAX_EXTENDED_BYTES)))
        elif not header.isdir():
            name = extended.get("path", header.name)
            problem = _problem(header, name, extended, start + num_bytes - size)
            yield TarMember(offset=offset, name=name, start=start, num_bytes=num_bytes, problem=problem)
        if header.type not in _EXTENSIONS:
            extended = {}
        if not _holds_content(header):
            offset = start
        elif start + num_bytes <= size:
            offset = start + -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        else:  # the tar ends here, or a broken size swallows what follows
            offset = _next_header(file, offset, size)


_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, b"g")


def _header(file: IO[bytes], offset: int) -> tarfile.TarInfo | None:
    """Return the header at an offset, or None if there is none."""
    file.seek(offset)
    try:
        header = tarfile.TarInfo.frombuf(file.read(BLOCK_BYTES), *_ENCODING)
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _content_start(file: IO[bytes], header: tarfile.TarInfo, offset: int) -> int:
    """Return where a member's content begins: behind its header, and behind the further maps of a sparse one."""
    start = offset + BLOCK_BYTES
    if header.type == tarfile.GNUTYPE_SPARSE:
        file.seek(offset)
        has_more = file.read(BLOCK_BYTES)[482:483]  # GNU tar's `isextended`
        while has_more.strip(b"\0"):
            has_more, start = file.read(BLOCK_BYTES)[504:505], start + BLOCK_BYTES
    return start


def _holds_content(header: tarfile.TarInfo) -> bool:
    return header.isreg() or header.type in _EXTENSIONS or header.type not in tarfile.SUPPORTED_TYPES


def _next_header(file: IO[bytes], offset: int, size: int) -> int:
    """Return the offset of the next sound header behind `offset`, or the end of the file."""
    offset += BLOCK_BYTES
    while offset < size and _header(file, offset) is None:
        file.seek(offset)
        is_blank = not file.read(SCAN_BYTES).strip(b"\0") if not offset % SCAN_BYTES else False
        offset += SCAN_BYTES if is_blank else BLOCK_BYTES
    return min(offset, size)


def _is_blank(file: IO[bytes], start: int, stop: int) -> bool:
    file.seek(start)
    while start < stop:
        block = file.read(min(SCAN_BYTES, stop - start))
        if not block or block.strip(b"\0"):
            return not block
        start += len(block)
    return True


def _problem(header: tarfile.TarInfo, name: str, extended: dict[str, str], num_missing: int) -> str:
    """Return what is wrong with a member, or ""."""
    if header.issym() or header.islnk():
        return f"{name} is a link"
    if header.type == tarfile.GNUTYPE_SPARSE or any(word.startswith("GNU.sparse") for word in extended):
        return f"{name} is sparse"
    if not header.isreg():
        return f"{name} is no regular file"
    if num_missing > 0:
        return f"{name} is cut off: {num_missing} of {header.size} bytes are missing"
    if name.startswith("/") or ".." in name.split("/"):
        return f"{name} leads out of the tar"
    return ""


def _extended(kind: bytes, content: bytes) -> dict[str, str]:
    """Return what an extended header says of the member behind it: `path`, `size` and others (POSIX.1-2001, pax)."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode(*_ENCODING)}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    found = {}
    while content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or len(length) > MAX_DIGITS or int(length) <= len(length) + 1:
            break
        record, content = rest[: int(length) - len(length) - 1], content[int(length) :]
        word, _, value = record.rstrip(b"\n").decode(*_ENCODING).partition("=")
        if word != "size" or (value.isdecimal() and len(value) <= MAX_DIGITS):
            found[word] = value
    return found
