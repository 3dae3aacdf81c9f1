"""A source of files that are cut into slices: what every format shares, around a reader that knows one format.

Order: name the files → survey each (its content's digest, where it may be cut) → shards named after slices → rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from ldm.config import digest_of
from pipeline.sources.files import each_at_once, names_of_files
from pipeline.sources.slices import Cut, Slice, SlicedFile, slice_of
from pipeline.store.schema import SourceRow, Split

_PLACES = frozenset({"folder", "files"})


class FilesConfig(Protocol):
    """A configuration of a source of files."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data of all fields."""
        ...

    @property
    def folder(self) -> str:
        """A folder or URL."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """The files one by one; empty for all of the folder."""
        ...


class FileReader(Protocol):
    """Reads files of one format."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """How names of its files end, in small letters."""
        ...

    def survey(self, name: str) -> SlicedFile:
        """Return a file cut into slices.

        Raises:
            ValueError: if it lacks what every row needs.
        """
        ...

    def rows(self, piece: Slice, cut: Cut) -> Iterator[SourceRow]:
        """Yield the rows of a slice that the cut gives to its split."""
        ...


class CutFilesSource:
    """The rows of files, in the files' own order; a `Source`."""

    def __init__(self, config: FilesConfig, reader: FileReader, cut: Cut) -> None:
        """Keep the configuration; files are listed at the first use."""
        self.config = config
        self._reader = reader
        self._cut = cut

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration without its places, and of every file's name and content."""
        config = {name: value for name, value in self.config.to_dict().items() if name not in _PLACES}
        return digest_of({"config": config, "files": [[file.name, file.digest] for file in self._files]})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in the files' order."""
        return self._cut.shard_names(self._files, split)

    def open_shard_at_row(self, name: str, row: int, payload: str = "") -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on; a table's images are still to be fetched."""
        return islice(self._reader.rows(slice_of(name), self._cut), row, None)

    def shard_num_rows(self, name: str) -> int | None:
        """Return None: how many rows of a slice are held out is known when they are read."""
        return None

    def num_rows(self, split: Split) -> int | None:
        """Return about how many rows a split holds: the share of all rows; None where only reading would tell."""
        return self._cut.num_rows(self._files, split)

    def without(self, known: Container[str]) -> CutFilesSource:
        """Return the source itself: its files are cut by place, and their shards' names stay."""
        return self

    def previous_of(self, name: str) -> str:
        """Return the name of the file that a shard was cut from."""
        return slice_of(name).file

    def shard_payload(self, name: str) -> str:
        """Return "": the name says all."""
        return ""

    @cached_property
    def _files(self) -> list[SlicedFile]:
        return each_at_once(
            self._reader.survey, names_of_files(self.config.folder, self.config.files, self._reader.suffixes)
        )
