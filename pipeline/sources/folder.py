"""A folder of images with their captions beside them: `a/b.jpg` and `a/b.txt`, one caption a line.

A row is named by its path inside the folder, so the folder may move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from ldm.config import Config, digest_of
from ldm.storage import is_local
from pipeline.sources.source import Listing, check_positive, check_share, split_of
from pipeline.store.schema import SourceRow, Split, key_of


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig(Config):
    """A local folder of images with a .txt file beside each."""

    folder: str
    """The folder; looked through at every depth."""
    rows_per_shard: int = 1024
    """Rows in one shard."""
    holdout_share: float = 0.05
    """Share of images kept for validation."""
    suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg")
    """Ends of names, in small letters, that make a file an image."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("rows_per_shard", self.rows_per_shard)
        check_share(self.holdout_share)
        if any(not suffix.startswith(".") or suffix != suffix.lower() for suffix in self.suffixes):
            raise ValueError(f"suffixes must begin with a dot and be in small letters, got {self.suffixes}")

    def build(self) -> FolderSource:
        """Return the source.

        Raises:
            ValueError: if there is no such local folder.
        """
        if not is_local(self.folder) or not Path(self.folder).is_dir():
            raise ValueError(f"{self.folder} is no local folder; for object stores make tars and use the tars source")
        return FolderSource(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """One image before it is read."""

    key: str
    name: str
    path: Path


class FolderSource:
    """The rows of a `FolderConfig`, sorted by key."""

    def __init__(self, config: FolderConfig) -> None:
        """Keep the configuration; the folder is listed at the first use."""
        self.config = config

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration without its path, and of every image's and caption file's name and size."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "folder"}
        rows = [row for split in Split for row in self._listing.entries_of_split[split]]
        sizes = [[row.name, row.path.stat().st_size, _size(row.path.with_suffix(".txt"))] for row in rows]
        return digest_of({"config": config, "files": sizes})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        return self._listing.shard_names(split)

    def open_shard_at_row(self, name: str, row: int) -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on; an image without a .txt file has no captions."""
        for file in islice(self._listing.shard(name), row, None):
            texts = file.path.with_suffix(".txt")
            lines = texts.read_text(encoding="utf-8", errors="replace").splitlines() if texts.is_file() else []
            yield SourceRow(
                key=file.key,
                captions=tuple(line for line in lines if line.strip()),
                payload=file.path.read_bytes(),
                attributes={"name": file.name},
            )

    def shard_num_rows(self, name: str) -> int:
        """Return how many rows a shard holds."""
        return len(self._listing.shard(name))

    def num_rows(self, split: Split) -> int:
        """Return how many rows a split holds."""
        return len(self._listing.entries_of_split[split])

    @cached_property
    def _listing(self) -> Listing[_File]:
        share = self.config.holdout_share
        files = ((split_of(file.key, share), file) for file in self._files())
        return Listing.of(files, self.config.rows_per_shard)

    def _files(self) -> Iterator[_File]:
        root = Path(self.config.folder)
        for path in root.rglob("*"):
            if path.suffix.lower() in self.config.suffixes and path.is_file():
                name = path.relative_to(root).as_posix()
                yield _File(key=key_of(f"file:{name}"), name=name, path=path)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
