"""A folder of images with their texts: `a/b.txt` or `a/b.json` beside `a/b.jpg`, and Hugging Face's metadata files.

A row is named by its image's path inside the folder, so the folder may move. A metadata row that speaks of no image of
the folder is a row of its own that says why; only what the folder's listing holds is ever opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ldm.config import Config, added_later, digest_of
from ldm.storage import exists
from pipeline.sources.files import Place, list_folder, read_at_most
from pipeline.sources.listing import Both, Listing, check_shard
from pipeline.sources.metadata import METADATA_NAMES, Metadata
from pipeline.sources.source import BROKEN, check_positive, check_share, split_of
from pipeline.sources.values import captions_of, json_of, text_of
from pipeline.store.schema import JSON, SourceRow, Split, key_of

SIDECARS = (".txt", ".json")
"""Ends of the files beside an image that hold its texts; their places in this tuple are what a plan stores."""
MAX_TEXT_BYTES = 1 << 26
"""Longest sidecar that is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig(Config):
    """A folder of images with .txt or .json files beside them, or metadata.jsonl, .csv or .parquet at any depth."""

    folder: str
    """The folder, or a URL such as s3://bucket/images; looked through at every depth."""
    rows_per_shard: int = 1024
    """Rows in one shard."""
    holdout_share: float = 0.05
    """Share of images kept for validation; of folders, with `has_folders_whole`."""
    suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".svg")
    """Ends of names, in small letters, that make a file an image."""
    name_column: str = "file_name"
    """Column of a metadata file with the image's path, relative to the metadata file."""
    caption_columns: tuple[str, ...] = ("text", "caption", "captions")
    """Columns of a metadata file, and fields of a .json file, that hold captions, the best first; all others are kept
    as attributes."""
    max_bytes: int = 1 << 28
    """Longest image that is read."""
    map_suffix: str = added_later("")
    """What follows a picture's name in that of its semantic map, an eight-bit PNG, a class a pixel: `_map.png` for
    `a/b_map.png` beside `a/b.jpg`. Empty for none."""
    has_folders_whole: bool = added_later(False)
    """Whether all images of a folder fall to the same split, by the folder's path: for several pictures of one thing.
    """

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("rows_per_shard", self.rows_per_shard)
        check_positive("max_bytes", self.max_bytes)
        check_share(self.holdout_share)
        if any(not suffix.startswith(".") or suffix != suffix.lower() for suffix in self.suffixes):
            raise ValueError(f"suffixes must begin with a dot and be in small letters, got {self.suffixes}")
        if self.map_suffix and (not self.map_suffix.endswith(".png") or self.map_suffix in self.suffixes):
            raise ValueError(f"map_suffix is a name's own end, such as _map.png, got {self.map_suffix!r}")

    def build(self) -> FolderSource:
        """Return the source.

        Raises:
            ValueError: if there is no such folder.
        """
        if not exists(self.folder):
            raise ValueError(f"there is no folder {self.folder}")
        return FolderSource(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One row before it is read.

    Attributes:
        name: the image's path inside the folder; "" for a metadata row that speaks of none.
        num_bytes: sizes of the image and its sidecars, for the digest only.
        sidecars: which of `SIDECARS` are there, by number.
        mentions: the metadata rows that speak of it, as file and place.
        problem: why there is no image.
        said: digest of the metadata row, where there is no image.
    """

    name: str
    num_bytes: tuple[int | None, ...] = field(default=(), compare=False)
    sidecars: tuple[int, ...] = ()
    mentions: tuple[tuple[str, int], ...] = ()
    problem: str = ""
    said: str = ""

    @property
    def key(self) -> str:
        """The row's key."""
        if self.name:
            return key_of(f"file:{_encodable(self.name)}")
        # By what is wrong, not where: rows added above it in the metadata file rename nothing.
        return key_of(f"no-file:{_encodable(self.mentions[0][0])}:{self.said}")

    @property
    def folder(self) -> str:
        """Path of its folder inside the folder; "" for the uppermost."""
        return os.path.dirname(_encodable(self.name or self.mentions[0][0]))


class FolderSource:
    """The rows of a `FolderConfig`, sorted by key."""

    def __init__(self, config: FolderConfig, known: Container[str] = frozenset()) -> None:
        """Keep the configuration, and the keys that are not to be listed; the folder is listed at the first use."""
        self.config = config
        self._known = known

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration without its path, and of the name and size of every image and text."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "folder"}
        entries = [entry for split in Split for entry in self._listing.entries_of_split[split]]
        facts = [[_encodable(entry.name), entry.num_bytes, entry.problem] for entry in entries]
        return digest_of({"config": config, "files": facts, "metadata": self._found.sizes_of_metadata})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        return self._listing.shard_names(split)

    def open_shard_at_row(self, name: str, row: int, payload: str = "") -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on; an image without texts has no captions."""
        entries = _unpacked(name, payload) if payload else self._listing.shard(name)
        wanted = entries[row:]
        rows_of_metadata = {metadata: self._metadata_rows(metadata, wanted) for metadata in _metadata_of(wanted)}
        return (self._row(entry, rows_of_metadata) for entry in wanted)

    def shard_num_rows(self, name: str) -> int:
        """Return how many rows a shard holds."""
        return len(self._listing.shard(name))

    def num_rows(self, split: Split) -> int:
        """Return how many rows a split holds."""
        return len(self._listing.entries_of_split[split])

    def without(self, known: Container[str]) -> FolderSource:
        """Return the source of the images whose keys are not in `known`."""
        return FolderSource(self.config, Both(self._known, known))

    def previous_of(self, name: str) -> str:
        """Return "": images are listed one by one."""
        return ""

    def shard_payload(self, name: str) -> str:
        """Return the shard's names, and where the metadata of each lies."""
        entries = self._listing.shard(name)
        files = list(_metadata_of(entries))
        packed = [_packed(entry, files) for entry in entries]
        return json.dumps({"metadata": files, "rows": packed}, separators=(",", ":"))

    @cached_property
    def _found(self) -> _Found:
        return _look_through(self.config)

    @cached_property
    def _listing(self) -> Listing[_Entry]:
        share = self.config.holdout_share
        whole = self.config.has_folders_whole
        if whole and share and len({entry.folder for entry in self._found.entries}) == 1:
            raise ValueError(
                f"has_folders_whole needs pictures in several folders; all of {self.config.folder} lie in one"
            )
        entries = ((split_of(entry.folder if whole else entry.key, share), entry) for entry in self._found.entries)
        return Listing.of(entries, self.config.rows_per_shard).without(self._known)

    def _metadata_rows(self, metadata: str, entries: Sequence[_Entry]) -> dict[int, Mapping[str, Any]]:
        places = {place for entry in entries for file, place in entry.mentions if file == metadata}
        return self._metadata(metadata).rows_at(places)

    def _metadata(self, name: str) -> Metadata:
        return Metadata(folder=self.config.folder, name=name, name_column=self.config.name_column)

    def _row(self, entry: _Entry, rows_of_metadata: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> SourceRow:
        said = [rows_of_metadata[file].get(place, {}) for file, place in entry.mentions]
        texts: list[Any] = [row[name] for row in said for name in self.config.caption_columns if name in row]
        attributes = {name: json_of(value) for row in said for name, value in row.items() if not self._is_text(name)}
        for sidecar in entry.sidecars:
            lines, facts = self._sidecar(entry.name, SIDECARS[sidecar])
            texts += lines
            attributes |= facts
        payload, problem = (None, entry.problem) if entry.problem else self._payload(entry.name)
        named = {"name": text_of(entry.name)} if entry.name else {"file": text_of(entry.mentions[0][0])}
        attributes |= named | ({BROKEN: text_of(problem)} if problem else {})
        return SourceRow(
            key=entry.key,
            captions=captions_of(texts),
            payload=payload,
            attributes=attributes,
            semantic_map=self._map(entry) if self.config.map_suffix and entry.name else None,
        )

    def _map(self, entry: _Entry) -> bytes:
        """Return the bytes of a row's map, or none where it can't be read."""
        place = Place(folder=self.config.folder, name=_stem(entry.name) + self.config.map_suffix)
        try:
            return read_at_most(place, self.config.max_bytes) or b""
        except (FileNotFoundError, PermissionError):
            return b""

    def _is_text(self, column: str) -> bool:
        return column in self.config.caption_columns or column == self.config.name_column

    def _payload(self, name: str) -> tuple[bytes | None, str]:
        """Return an image's bytes, or what is wrong."""
        try:
            content = read_at_most(Place(folder=self.config.folder, name=name), self.config.max_bytes)
        except (FileNotFoundError, PermissionError) as error:
            return None, f"can't be read: {error.strerror or type(error).__name__}"
        return content, "" if content is not None else f"more than {self.config.max_bytes} bytes"

    def _sidecar(self, image: str, suffix: str) -> tuple[list[Any], dict[str, JSON]]:
        """Return the captions and the attributes of a file beside an image; nothing where it can't be read."""
        try:
            content = read_at_most(Place(folder=self.config.folder, name=_stem(image) + suffix), MAX_TEXT_BYTES)
        except (FileNotFoundError, PermissionError):
            return [], {}
        text = text_of(content)
        if suffix != ".json":
            return list(text.splitlines()), {}
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError):
            return [], {}
        if not isinstance(facts, dict):
            return [], {}
        captions = [facts[name] for name in self.config.caption_columns if name in facts]
        return captions, {name: value for name, value in json_of(facts).items() if not self._is_text(name)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What lies in a folder."""

    entries: Sequence[_Entry]
    sizes_of_metadata: Mapping[str, int | None]


def _look_through(config: FolderConfig) -> _Found:
    """List a folder once and match images, sidecars and metadata rows."""
    sizes = {file.name: file.num_bytes for file in list_folder(config.folder)}
    names = (name for name in sizes if not config.map_suffix or not name.endswith(config.map_suffix))
    images = {
        name: _with_sidecars(name, sizes, config.map_suffix)
        for name in names
        if os.path.splitext(name)[1].lower() in config.suffixes
    }
    metadata = {name: size for name, size in sizes.items() if name.rpartition("/")[2] in METADATA_NAMES}
    strangers: list[_Entry] = []
    for name in metadata:
        for mention in Metadata(folder=config.folder, name=name, name_column=config.name_column).mentions(images):
            where = (mention.metadata, mention.place)
            if mention.image:
                there = images[mention.image]
                images[mention.image] = replace(there, mentions=(*there.mentions, where))
            else:
                strangers.append(_Entry(name="", mentions=(where,), problem=mention.problem, said=mention.said))
    return _Found(entries=[*images.values(), *strangers], sizes_of_metadata=metadata)


def _with_sidecars(image: str, sizes: Mapping[str, int | None], map_suffix: str) -> _Entry:
    there = tuple(number for number, suffix in enumerate(SIDECARS) if _stem(image) + suffix in sizes)
    num_bytes = (sizes[image], *(sizes[_stem(image) + SIDECARS[number]] for number in there))
    if map_suffix:
        num_bytes += (sizes.get(_stem(image) + map_suffix),)
    problem = "can't be read: a link that leads nowhere" if sizes[image] is None else ""
    return _Entry(name=image, num_bytes=num_bytes, sidecars=there, problem=problem)


def _metadata_of(entries: Sequence[_Entry]) -> dict[str, None]:
    return dict.fromkeys(file for entry in entries for file, _ in entry.mentions)


def _packed(entry: _Entry, metadata: Sequence[str]) -> JSON:
    mentions = [[metadata.index(file), place] for file, place in entry.mentions]
    return [entry.name, entry.sidecars, mentions, entry.problem, entry.said]


def _unpacked(name: str, payload: str) -> Sequence[_Entry]:
    packed = json.loads(payload)
    files = packed["metadata"]
    entries = [
        _Entry(
            name=image,
            sidecars=tuple(sidecars),
            mentions=tuple((files[file], place) for file, place in mentions),
            problem=problem,
            said=said,
        )
        for image, sidecars, mentions, problem, said in packed["rows"]
    ]
    check_shard(name, entries)
    return entries


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _encodable(name: str) -> str:
    """Return a file name, which may be no UTF-8 on disk, as text that has a digest."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
