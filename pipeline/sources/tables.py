"""Listings of image addresses and captions: parquet as LAION publishes it, CSV, TSV, JSONL; read slice by slice.

Every row comes out. One whose address is missing or no text has the address "", one that can't be read at all has in
its attributes what is wrong, and both are counted by ingest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.config import Config, digest_of
from pipeline.sources.cut_files import CutFilesSource
from pipeline.sources.files import Place, check_place
from pipeline.sources.parquet_file import PARQUET_SUFFIXES, ParquetFile
from pipeline.sources.records import Broken
from pipeline.sources.slices import Cut, Slice, SlicedFile
from pipeline.sources.source import BROKEN, check_positive, check_share
from pipeline.sources.text_file import TEXT_SUFFIXES, TextFile
from pipeline.sources.values import captions_of, json_of, text_of, url_of
from pipeline.store.schema import SourceRow, key_of

BROKEN_LINE = "broken_line"
"""Attribute of a row of which not even the columns could be told apart."""
SHOWN_BYTES = 200
"""Bytes of a broken line that its row shows."""


def laion_columns() -> tuple[str, ...]:
    """Return the columns that LAION's listings have beside URL and TEXT, in one release or another."""
    return (
        *("WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE", "hash", "LANGUAGE", "LICENSE"),
        *("NSFW", "SAMPLE_ID"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlTableConfig(Config):
    """Files with a column of image addresses and columns of captions: parquet, CSV, TSV or JSONL, also packed."""

    folder: str = ""
    """Where the files are: a folder or a URL such as s3://bucket/laion; looked through at every depth."""
    files: tuple[str, ...] = ()
    """The files one by one, below the folder or as whole URLs; for stores that can't be listed, such as https://."""
    url_column: str = "URL"
    """Column of the images' addresses."""
    caption_columns: tuple[str, ...] = ("TEXT",)
    """Columns of captions, the best first; a list in one counts as several captions."""
    attribute_columns: tuple[str, ...] = ()
    """Further columns to keep in each row's JSON, where a file has them; `laion_columns()` names LAION's."""
    column_names: tuple[str, ...] = ()
    """Names of all columns, in order, for CSV and TSV files without a header line."""
    rows_per_shard: int = 10_000
    """Input rows in one shard; fewer come out, since some addresses are dead."""
    holdout_share: float = 0.001
    """Share of addresses kept for validation."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("rows_per_shard", self.rows_per_shard)
        check_share(self.holdout_share)
        check_place(self.folder, self.files)

    def build(self) -> CutFilesSource:
        """Return the source."""
        return CutFilesSource(self, UrlTableReader(self), Cut(holdout_share=self.holdout_share))

    @property
    def required_columns(self) -> list[str]:
        """The columns that every file must have."""
        return list(dict.fromkeys([self.url_column, *self.caption_columns]))

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([*self.required_columns, *self.attribute_columns]))


class UrlTableReader:
    """Reads the rows of a `UrlTableConfig`."""

    suffixes = (*PARQUET_SUFFIXES, *TEXT_SUFFIXES)

    def __init__(self, config: UrlTableConfig) -> None:
        """Keep the configuration."""
        self.config = config

    def survey(self, name: str) -> SlicedFile:
        """Return a file cut into slices, after a look at its columns."""
        cut, there = self._file(name).survey(self.config.rows_per_shard)
        if there:
            check_columns(name, there, self.config.required_columns)
        return cut

    def _file(self, name: str) -> ParquetFile | TextFile:
        place = Place(folder=self.config.folder, name=name)
        if name.lower().partition("?")[0].endswith(PARQUET_SUFFIXES):
            return ParquetFile(place=place)
        return TextFile(place=place, column_names=self.config.column_names)

    def rows(self, piece: Slice, cut: Cut) -> Iterator[SourceRow]:
        """Yield the rows of a slice that belong to its split."""
        file = self._file(piece.file)
        records = file.rows(piece, self.config.columns) if isinstance(file, ParquetFile) else file.rows(piece)
        for record in records:
            identity, row = self._row(piece.file, record)
            if cut.takes(identity, piece):
                yield row

    def _row(self, file: str, record: Mapping[str, Any] | Broken) -> tuple[str, SourceRow]:
        """Return a row and what decides its split."""
        if isinstance(record, Broken):
            return (key := broken_key(file, record)), broken_row(key, file, record)
        config = self.config
        url = url_of(record.get(config.url_column))
        attributes = {name: json_of(record[name]) for name in config.attribute_columns if name in record}
        captions = captions_of(record.get(name) for name in config.caption_columns)
        # Rows without an address would otherwise all be one row.
        key = key_of(f"url:{url}" if url else f"no-url:{digest_of([captions, attributes, json_of(dict(record))])}")
        return url or key, SourceRow(key=key, captions=captions, url=url, attributes=attributes)


def check_columns(file: str, there: Sequence[str], required: Sequence[str]) -> None:
    """Refuse a file that lacks a column that every row needs.

    Raises:
        ValueError: naming what is lacking and what is there.
    """
    if missing := sorted(set(required) - set(there)):
        raise ValueError(f"{file} lacks columns {missing}; it has {list(there)}")


def broken_key(file: str, record: Broken) -> str:
    """Return the key of what can't be read: the same for the same content, wherever in the file it stands."""
    return key_of(f"broken:{file}:{record.reason}:{hashlib.sha256(record.content).hexdigest()}")


def broken_row(key: str, file: str, record: Broken) -> SourceRow:
    """Return the row that stands for what can't be read."""
    found = {BROKEN_LINE: True, BROKEN: record.reason, "file": file, "found": text_of(record.content[:SHOWN_BYTES])}
    return SourceRow(key=key, captions=(), url="", attributes=found)
