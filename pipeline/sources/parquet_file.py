"""Parquet files: their footers, and the rows of one slice; only the columns and row groups that it touches are read.

A row group is decoded batch by batch from its start, so what stands behind the slice is never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.files import Place, WatchedFile, open_seekable, size_of
from pipeline.sources.records import Broken
from pipeline.sources.slices import Slice, SlicedFile, bounds_of
from pipeline.sources.source import DIGEST_LENGTH

PARQUET_SUFFIXES = (".parquet",)
MAGIC = b"PAR1"
TAIL_BYTES = 8
"""The last bytes of a file: the footer's length, little-endian, and the magic."""
BUFFER_BYTES = 1 << 20
UNREADABLE_ROWS = 1
"""A file whose footer can't be read counts as one row, which says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFile:
    """One parquet file.

    Attributes:
        place: where it lies.
        batch_rows: rows decoded at once.
    """

    place: Place
    batch_rows: int = 1024

    def survey(self, rows_per_slice: int) -> tuple[SlicedFile, tuple[str, ...]]:
        """Return the file cut into slices, and the names of its columns; () if it is broken."""
        with open_seekable(self.place) as file:
            footer = _read_footer(file)
        metadata = _parsed(footer)
        num_rows = UNREADABLE_ROWS if isinstance(metadata, Broken) else metadata.num_rows
        cut = SlicedFile(
            name=self.place.name, digest=_digest(footer), num_rows=num_rows, bounds=bounds_of(num_rows, rows_per_slice)
        )
        return cut, () if isinstance(metadata, Broken) else tuple(metadata.schema.to_arrow_schema().names)

    def rows(self, piece: Slice, columns: Sequence[str]) -> Iterator[Mapping[str, Any] | Broken]:
        """Yield the rows of a slice; rows that can't be decoded come out one by one too, each as what is wrong.

        Raises:
            ValueError: if the file has changed since it was cut.
        """
        with open_seekable(self.place) as file:
            footer = _read_footer(file)
            piece.check(_digest(footer))
            metadata = _parsed(footer)
            if isinstance(metadata, Broken):
                yield metadata
                return
            watched = WatchedFile(file)
            there = [name for name in columns if name in metadata.schema.to_arrow_schema().names]
            first = 0
            for group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(group).num_rows
                low, high = max(piece.start - first, 0), min(piece.stop - first, num_rows)
                if low < high:
                    yield from self._group_rows(watched, metadata, group, (low, high), there)
                first += num_rows

    def _group_rows(
        self,
        file: WatchedFile,
        metadata: pq.FileMetaData,
        group: int,
        span: tuple[int, int],
        columns: Sequence[str],
    ) -> Iterator[Mapping[str, Any] | Broken]:
        """Yield rows [low, high) of one row group."""
        place, (low, high) = 0, span
        try:
            with pq.ParquetFile(
                pa.PythonFile(file, mode="r"),
                metadata=metadata,
                pre_buffer=False,
                buffer_size=BUFFER_BYTES,
                page_checksum_verification=True,
            ) as parquet:
                for batch in parquet.iter_batches(self.batch_rows, row_groups=[group], columns=list(columns)):
                    start, stop = max(low - place, 0), min(high - place, batch.num_rows)
                    if start < stop:
                        for row in rows_of(batch.slice(start, stop - start)):
                            yield row
                            low += 1
                    place += batch.num_rows
                    if place >= high:
                        return
        except (pa.ArrowException, OSError) as error:
            if file.error is not None:
                raise
            reason = f"row group {group} can't be decoded: {error}"[:200]
            for row_number in range(low, high):
                yield Broken(reason=reason, content=f"row {row_number} of row group {group}".encode())


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch as Python values; values that Python can't hold come out as bytes or None."""
    names = batch.schema.names
    for values in zip(*(_values(column) for column in batch.columns), strict=True):
        yield dict(zip(names, values, strict=True))
    if not names:
        yield from ({} for _ in range(batch.num_rows))


def _values(column: pa.Array) -> list[Any]:
    """Return a column's values: as a whole where that goes, else one by one."""
    try:
        values: list[Any] = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):  # broken UTF-8; a date beyond Python's
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return scalar.as_buffer().to_pybytes() if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar) else None


def _read_footer(file: IO[bytes]) -> bytes:
    """Return the bytes of a file's footer with its length and magic behind them; shorter ones if it is cut off."""
    size = size_of(file)
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    num_bytes = min(size, int.from_bytes(tail[:4], "little") + TAIL_BYTES) if tail.endswith(MAGIC) else len(tail)
    file.seek(size - num_bytes)
    return file.read(num_bytes)


def _parsed(footer: bytes) -> pq.FileMetaData | Broken:
    """Return what a footer says; it is parsed apart from its file, so that an error is its own."""
    try:
        return pq.ParquetFile(pa.BufferReader(MAGIC + footer)).metadata
    except (pa.ArrowException, OSError) as error:
        return Broken(reason=f"no readable parquet file: {error}"[:200], content=footer[-TAIL_BYTES:])


def _digest(footer: bytes) -> str:
    return hashlib.sha256(footer).hexdigest()[:DIGEST_LENGTH]
