"""Parquet files that hold the images themselves, as Hugging Face datasets has them: a struct of bytes and path.

A row is named by the digest of its image and captions, or by a column of names where there is one. Paths in the files
are never followed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.config import Config, digest_of
from pipeline.sources.cut_files import CutFilesSource
from pipeline.sources.files import Place, check_place
from pipeline.sources.parquet_file import PARQUET_SUFFIXES, ParquetFile
from pipeline.sources.records import Broken
from pipeline.sources.slices import Cut, Slice, SlicedFile
from pipeline.sources.source import BROKEN, Holdout, check_positive, check_share
from pipeline.sources.tables import broken_key, broken_row, check_columns
from pipeline.sources.values import captions_of, json_of, text_of
from pipeline.store.schema import SourceRow, key_of

BATCH_ROWS = 16
"""Images decoded from parquet at once: they are large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageParquetConfig(Config):
    """Parquet files with a column of images, {bytes, path} or plain bytes, and columns of captions."""

    folder: str = ""
    """Where the .parquet files are: a folder or a URL such as s3://bucket/data; looked through at every depth."""
    files: tuple[str, ...] = ()
    """The files one by one, below the folder or as whole URLs; for stores that can't be listed, such as https://."""
    image_column: str = "image"
    """Column of the images: a struct with a field `bytes`, or the bytes."""
    caption_columns: tuple[str, ...] = ("text",)
    """Columns of captions, the best first; a list in one counts as several captions."""
    attribute_columns: tuple[str, ...] = ()
    """Further columns to keep in each row's JSON, where a file has them."""
    key_column: str = ""
    """Column that names each row; without it the digest of image and captions does."""
    rows_per_shard: int = 1024
    """Rows in one shard."""
    holdout_share: float = 0.01
    """Share of what is kept for validation."""
    holdout: Holdout = Holdout.ROWS
    """What is held out: single images, for which files are read twice, or whole files."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("rows_per_shard", self.rows_per_shard)
        check_share(self.holdout_share)
        check_place(self.folder, self.files)

    def build(self) -> CutFilesSource:
        """Return the source."""
        return CutFilesSource(
            self, ImageParquetReader(self), Cut(holdout_share=self.holdout_share, holdout=self.holdout)
        )

    @property
    def required_columns(self) -> list[str]:
        """The columns that every file must have."""
        named = (self.image_column, *self.caption_columns, self.key_column)
        return list(dict.fromkeys(name for name in named if name))

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([*self.required_columns, *self.attribute_columns]))


class ImageParquetReader:
    """Reads the rows of a `ImageParquetConfig`."""

    suffixes = PARQUET_SUFFIXES

    def __init__(self, config: ImageParquetConfig) -> None:
        """Keep the configuration."""
        self.config = config

    def survey(self, name: str) -> SlicedFile:
        """Return a file cut into slices, after a look at what it is; see `FileReader.survey`."""
        cut, there = self._file(name).survey(self.config.rows_per_shard)
        if there:
            check_columns(name, there, self.config.required_columns)
        return cut

    def _file(self, name: str) -> ParquetFile:
        return ParquetFile(place=Place(folder=self.config.folder, name=name), batch_rows=BATCH_ROWS)

    def rows(self, piece: Slice, cut: Cut) -> Iterator[SourceRow]:
        """Yield the rows of a slice that belong to its split."""
        for record in self._file(piece.file).rows(piece, self.config.columns):
            identity, row = self._row(piece.file, record)
            if cut.takes(identity, piece):
                yield row

    def _row(self, file: str, record: Mapping[str, Any] | Broken) -> tuple[str, SourceRow]:
        """Return a row and what decides its split: the image, so that it is on one side with all its captions."""
        config = self.config
        if isinstance(record, Broken):
            return (key := broken_key(file, record)), broken_row(key, file, record)
        payload, path, problem = _image_of(record[config.image_column])
        captions = captions_of(record[name] for name in config.caption_columns)
        attributes = {name: json_of(record[name]) for name in config.attribute_columns if name in record}
        attributes |= ({"path": path} if path else {}) | ({BROKEN: problem} if problem else {})
        image = f"image:{hashlib.sha256(payload).hexdigest()}" if payload else f"no-image:{path}"
        named = text_of(record[config.key_column]) if config.key_column else ""
        key = key_of(f"id:{named}" if named else f"{image}:{digest_of([captions, attributes])}")
        return image if payload else key, SourceRow(
            key=key, captions=captions, payload=payload or None, attributes=attributes
        )


def _image_of(value: Any) -> tuple[bytes, str, str]:
    """Return an image's bytes, its path, and what is wrong with it or ""."""
    path = ""
    if isinstance(value, Mapping):
        path, value = text_of(value.get("path")), value.get("bytes")
    match value:
        case bytes() if value:
            return value, path, ""
        case None | b"":
            return b"", path, "the image has no bytes" + ("; its path is not followed" if path else "")
        case _:
            return b"", path, f"the image is a {type(value).__name__}, not bytes"
