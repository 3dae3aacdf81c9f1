"""CSV, TSV and JSONL files, also compressed: where their slices begin, and the rows of one slice.

One pass over a file finds the byte offset of every slice's first record and the digest of the content; it holds one
record at a time. A worker then seeks to its slice. In a compressed file offsets count unpacked bytes, and a worker
unpacks and throws away what stands before its slice: cut such files small, or unpack them, where there are many rows.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.sources.files import Place, WatchedFile, open_seekable, quick_digest
from pipeline.sources.records import Broken, Record, fields_of, read_records
from pipeline.sources.slices import Slice, SlicedFile
from pipeline.sources.source import DIGEST_LENGTH
from pipeline.sources.values import text_of

DELIMITERS = {".csv": b",", ".tsv": b"\t", ".jsonl": b"", ".ndjson": b""}
COMPRESSIONS = (".gz", ".zst")
TEXT_SUFFIXES = (*DELIMITERS, *(f"{kind}{packed}" for kind in DELIMITERS for packed in COMPRESSIONS))
PLAIN_SUFFIXES = (".txt", *(f".txt{packed}" for packed in COMPRESSIONS))
"""Of plain text, which is read where a reader names its one column."""

BUFFER_BYTES = 1 << 20
STEP_BYTES = 4096
"""Bytes unpacked at once."""
PROBE_ROWS = 100
"""Rows of a JSONL file that say which columns it has."""

_QUICK_LENGTH = DIGEST_LENGTH // 2
"""Digits of a text file's digest that a worker can check without reading all of it."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """One text file with a record a line.

    Attributes:
        place: where it lies; the end of its name says the format.
        column_names: the names of its columns where it has no header line; () where it has one.
        line_column: the name of the one column of a plain text, whose lines are its values.
    """

    place: Place
    column_names: tuple[str, ...] = ()
    line_column: str = ""

    @property
    def delimiter(self) -> bytes:
        """What parts fields; b"" for JSONL and plain text."""
        if self.line_column:
            return b""
        stem = self.place.name.lower().partition("?")[0]
        for packed in COMPRESSIONS:
            stem = stem.removesuffix(packed)
        return next(delimiter for suffix, delimiter in DELIMITERS.items() if stem.endswith(suffix))

    def survey(self, rows_per_slice: int) -> tuple[SlicedFile, tuple[str, ...]]:
        """Return the file cut into slices, and the names of its columns, after one pass over it."""
        with open_seekable(self.place) as file:
            quick = quick_digest(file)
        content, bounds, num_rows, end = hashlib.sha256(), list[int](), 0, 0
        with self._records() as (columns, records):
            for record in records:
                if num_rows % rows_per_slice == 0:
                    bounds.append(record.offset)
                content.update(record.content + b"\n")
                num_rows, end = num_rows + 1, record.offset + max(1, len(record.content))
        cut = SlicedFile(
            name=self.place.name,
            digest=quick[:_QUICK_LENGTH] + content.hexdigest()[:_QUICK_LENGTH],
            num_rows=num_rows,
            bounds=(*bounds, end) if bounds else (),
        )
        return cut, columns or self._probed_columns()

    def rows(self, piece: Slice) -> Iterator[Mapping[str, Any] | Broken]:
        """Yield the rows of a slice.

        Raises:
            ValueError: if the file has changed since it was cut.
        """
        with open_seekable(self.place) as file:
            piece.check(quick_digest(file)[:_QUICK_LENGTH])
        with self._records(piece.start) as (columns, records):
            for record in records:
                if record.offset >= piece.stop:
                    return
                yield self._row(record, columns)

    def placed_rows(self, places: Container[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | Broken]]:
        """Yield the rows at some byte offsets, or all, each behind its offset."""
        with self._records() as (columns, records):
            for record in records:
                if places is None or record.offset in places:
                    yield record.offset, self._row(record, columns)

    @contextmanager
    def _records(self, start: int = 0) -> Iterator[tuple[tuple[str, ...], Iterator[Record]]]:
        """Yield the names of the columns, () for JSONL, and the records from byte `start` on, headers left out."""
        with open_seekable(self.place) as raw:
            watched = WatchedFile(raw)
            raw.seek(0)
            file = io.BufferedReader(_unpacked(watched, self.place.name), BUFFER_BYTES)
            records = self._guarded(file, 0, watched)
            columns = self.column_names
            if self.delimiter and not columns:
                header = next(records, None)
                if header is not None and header.problem:
                    records = iter([header])
                elif header is not None:
                    columns = tuple(text_of(name).strip() for name in fields_of(header, self.delimiter))
            if start > 0 and not self._is_packed:
                file.seek(start)
                records = self._guarded(file, start, watched)
            yield columns, (record for record in records if record.offset >= start)

    def _guarded(self, file: io.BufferedReader[Any], start: int, watched: WatchedFile) -> Iterator[Record]:
        """Yield records; a packed file that breaks off ends in a record that says so."""
        end = start
        try:
            if not start and file.peek(3)[:3] == _BYTE_ORDER_MARK:
                end = len(file.read(3))
            for record in read_records(file, end, self.delimiter):
                end = record.offset + max(1, len(record.content))
                yield record
        except (EOFError, zlib.error, OSError) as error:
            if watched.error is not None or not self._is_packed:
                raise
            yield Record(offset=end, content=b"", problem=f"can't be unpacked any further: {error}")

    def _row(self, record: Record, columns: tuple[str, ...]) -> Mapping[str, Any] | Broken:
        if record.problem:
            return Broken(reason=record.problem, content=record.content)
        if self.line_column:
            return {self.line_column: text_of(record.content)}
        if not self.delimiter:
            return _json_row(record.content)
        fields = fields_of(record, self.delimiter)
        if len(fields) != len(columns):
            return Broken(reason=f"{len(fields)} fields where {len(columns)} are named", content=record.content)
        return dict(zip(columns, fields, strict=True))

    def _probed_columns(self) -> tuple[str, ...]:
        """Return the names that the first rows of a JSONL file use; () if none is readable."""
        with self._records() as (columns, records):
            rows = [self._row(record, columns) for record in islice(records, PROBE_ROWS)]
        return tuple(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))

    @property
    def _is_packed(self) -> bool:
        return self.place.name.lower().partition("?")[0].endswith(COMPRESSIONS)


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a stream, in small steps: where it breaks off, what came before has been handed out."""

    def __init__(self, read_some: Callable[[int], bytes]) -> None:
        super().__init__()
        self.read_some = read_some

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        content = self.read_some(min(len(view), STEP_BYTES))
        view[: len(content)] = content
        return len(content)


def _unpacked(file: WatchedFile, name: str) -> io.RawIOBase:
    """Return the stream of a file's unpacked bytes."""
    stem = name.lower().partition("?")[0]
    if stem.endswith(".gz"):
        return _Unpacked(gzip.GzipFile(fileobj=file, mode="rb").read1)
    if stem.endswith(".zst"):
        return _Unpacked(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd").read)
    return file


def _json_row(content: bytes) -> Mapping[str, Any] | Broken:
    try:
        row = json.loads(content.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        return Broken(reason=f"no JSON: {error}"[:200], content=content)
    if not isinstance(row, dict):
        return Broken(reason=f"JSON of a {type(row).__name__}, not of an object", content=content)
    return row
