"""Metadata files of a Hugging Face image folder: which row of which file speaks of which image.

A file's rows name images relative to its own folder. A row is found again by its place, a byte offset or a row number,
so the texts are read only when they are wanted, and only by who wants them.
"""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.config import digest_of
from pipeline.sources.files import Place
from pipeline.sources.parquet_file import PARQUET_SUFFIXES, ParquetFile
from pipeline.sources.records import Broken
from pipeline.sources.slices import Slice
from pipeline.sources.source import DIGEST_LENGTH
from pipeline.sources.tables import check_columns
from pipeline.sources.text_file import TextFile
from pipeline.sources.values import json_of, text_of
from pipeline.store.schema import Split

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_NAME_CHARS = 1024
"""Longest file name that a metadata row may hold; object stores allow as many bytes."""
SHOWN_CHARS = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Mention:
    """What one row of a metadata file says of which image it speaks.

    Attributes:
        metadata: the file's name.
        place: where the row lies in it.
        image: the image's name in the whole folder, or "" if the row names none.
        problem: why it names none, or "".
        said: digest of what the row says.
    """

    metadata: str
    place: int
    image: str = ""
    problem: str = ""
    said: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """One metadata file of a folder."""

    folder: str
    name: str
    name_column: str

    def mentions(self, images: Container[str]) -> Iterator[Mention]:
        """Yield what each row speaks of; only names in `images` count, so nothing outside the folder is ever opened.

        Raises:
            ValueError: if there are rows and none has the column of names.
        """
        names: dict[str, None] = {}
        for place, row in self._rows(None):
            if isinstance(row, Mapping):
                names |= dict.fromkeys(row)
            yield self._mention(place, row, images)
        if names:
            check_columns(self.name, list(names), [self.name_column])

    def rows_at(self, places: Container[int]) -> dict[int, Mapping[str, Any]]:
        """Return the rows at some places, by place; those that can't be read are left out."""
        return {place: row for place, row in self._rows(places) if isinstance(row, Mapping)}

    def _rows(self, places: Container[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | Broken]]:
        """Yield the rows at some places, or all, each behind its place."""
        where = Place(folder=self.folder, name=self.name)
        if not self.name.endswith(PARQUET_SUFFIXES):
            yield from TextFile(place=where).placed_rows(places)
            return
        file = ParquetFile(place=where)
        cut, columns = file.survey(rows_per_slice=sys.maxsize)
        whole = Slice(split=Split.TRAIN, file=self.name, digest=cut.digest, start=0, stop=cut.num_rows)
        numbered = enumerate(file.rows(whole, columns))
        yield from ((place, row) for place, row in numbered if places is None or place in places)

    def _mention(self, place: int, row: Mapping[str, Any] | Broken, images: Container[str]) -> Mention:
        said = row.content.hex() if isinstance(row, Broken) else json_of(row)
        mention = Mention(metadata=self.name, place=place, said=digest_of(said)[:DIGEST_LENGTH])
        if isinstance(row, Broken):
            return replace(mention, problem=row.reason)
        named = text_of(row.get(self.name_column))
        shown = repr(named[:SHOWN_CHARS])
        image = posixpath.normpath(posixpath.join(posixpath.dirname(self.name), named))
        match named:
            case "":
                return replace(mention, problem=f"the row has no {self.name_column}")
            case _ if len(named) > MAX_NAME_CHARS:
                return replace(mention, problem=f"a file name of {len(named)} characters: {shown}")
            case _ if named.startswith("/") or "://" in named or ".." in named.split("/"):
                return replace(mention, problem=f"{shown} leads out of the folder")
            case _ if image not in images:
                return replace(mention, problem=f"there is no image {shown}")
        return replace(mention, image=image)
