"""The ledger of a shard: one line for every input row, whether it is in the tar or why it is not.

Lines stand in the order of the source's rows. A column costs a few bytes a row; thumbnails, the one large column, are
kept for a handful of rejected rows only.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.storage import read_bytes, write_bytes
from pipeline.store.manifest import FileRecord
from pipeline.store.schema import SourceRow

OK = "ok"
"""Status of a row that is in the tar."""
LEDGER_SUFFIX = "ledger.parquet"
MAX_CAPTION_CHARS = 200
"""Letters of a caption that a line keeps; the row's JSON has it whole."""
MAX_THUMBNAILS = 4
"""Rejected pictures of a shard that a person may look at; which ones is decided by their keys, never by luck."""
DUPLICATE_KEY = "duplicate_key"
"""Status of a row whose key another row of the dataset has already."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source_row", pa.int64()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("duplicate_of", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("caption_chars", pa.int32()),
        ("num_captions", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("payload_sha256", pa.string()),
        ("pixel_sha256", pa.string()),
        ("perceptual_hash", pa.uint64()),
        ("attributes", pa.string()),
        ("scrubbed", pa.string()),
        ("thumbnail", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """What became of one input row.

    Attributes:
        key: the row's name.
        source_row: its position in the source's shard.
        status: "ok", or the reason why it is not in the tar.
        detail: what was found, for a person to read.
        duplicate_of: key of the row that was kept in its place.
        url: where its bytes were fetched.
        caption: its first caption, at most MAX_CAPTION_CHARS letters of it.
        caption_chars: letters of the whole first caption.
        num_captions: captions kept.
        original_width: pixels a row of the upright original; 0 where it was never seen.
        original_height: rows of the upright original.
        num_bytes: size of the payload.
        payload_sha256: digest of the payload.
        pixel_sha256: digest of the stored picture's pixels.
        perceptual_hash: 64 bits that alike pictures share nearly all of.
        attributes: JSON of what else the source knows.
        scrubbed: JSON of what was taken out of the captions, kind to count.
        thumbnail: JPEG of a rejected picture, for a few rows of a shard.
    """

    key: str
    source_row: int
    status: str = OK
    detail: str = ""
    duplicate_of: str = ""
    url: str = ""
    caption: str = ""
    caption_chars: int = 0
    num_captions: int = 0
    original_width: int = 0
    original_height: int = 0
    num_bytes: int = 0
    payload_sha256: str = ""
    pixel_sha256: str = ""
    perceptual_hash: int | None = None
    attributes: str = "{}"
    scrubbed: str = "{}"
    thumbnail: bytes = b""

    @classmethod
    def of(cls, row: SourceRow, source_row: int, captions: Sequence[str], attributes: str) -> LedgerLine:
        """Return the line of a row of which nothing but its listing is known yet."""
        first = captions[0] if captions else ""
        return cls(
            key=row.key,
            source_row=source_row,
            url=row.url or "",
            caption=first[:MAX_CAPTION_CHARS],
            caption_chars=len(first),
            num_captions=len(captions),
            attributes=attributes,
        )


def write_ledger(path: str, lines: Sequence[LedgerLine]) -> FileRecord:
    """Publish a shard's ledger; equal lines give equal bytes."""
    columns = [pa.array([_plain(getattr(line, name)) for line in lines], kind) for name, kind in _columns()]
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), stream, compression="zstd")
    content = stream.getvalue()
    write_bytes(path, content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def read_ledger(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a ledger, or some columns of it."""
    return pq.read_table(io.BytesIO(read_bytes(path)), columns=None if columns is None else list(columns))


def lines_of(table: pa.Table) -> list[LedgerLine]:
    """Return the lines of a whole ledger as `write_ledger` was given them."""
    return [LedgerLine(**line) for line in table.to_pylist()]


def _columns() -> list[tuple[str, pa.DataType]]:
    assert [field.name for field in fields(LedgerLine)] == SCHEMA.names
    return [(field.name, field.type) for field in SCHEMA]


def _plain(value: object) -> object:
    """Return text without lone surrogates, which no file can hold; anything else as it is."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
