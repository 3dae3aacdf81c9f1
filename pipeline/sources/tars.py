"""WebDataset tars made elsewhere, such as img2dataset's: one source shard for each tar and split.

Captions come from a text member and from a field of the JSON member, whose other fields are kept as attributes. A tar
that is damaged gives its good rows, and a row for everything that is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

from ldm.config import Config
from pipeline.sources.cut_files import CutFilesSource
from pipeline.sources.files import (
    Place,
    check_place,
    open_seekable,
    quick_digest,
    size_of,
)
from pipeline.sources.slices import Cut, Slice, SlicedFile
from pipeline.sources.source import BROKEN, DIGEST_LENGTH, Holdout, check_positive, check_share
from pipeline.sources.tar_members import TarMember, read_members
from pipeline.sources.values import captions_of, json_of, text_of
from pipeline.store.schema import JSON, SourceRow, key_of

TAR_SUFFIXES = (".tar",)


@dataclass(frozen=True, kw_only=True, slots=True)
class TarsConfig(Config):
    """WebDataset tars in a folder, or named one by one."""

    folder: str = ""
    """Where the .tar files are: a folder or a URL such as s3://bucket/tars; looked through at every depth."""
    files: tuple[str, ...] = ()
    """The tars one by one, below the folder or as whole URLs; for stores that can't be listed, such as https://."""
    image_suffixes: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Members that may be the image; the first that a row has is taken."""
    caption_suffix: str = "txt"
    """Member with the caption."""
    caption_field: str = "caption"
    """Field of the JSON member with the caption, or a list of them, beside the caption member."""
    max_bytes: int = 1 << 28
    """Longest member that is read."""
    holdout_share: float = 0.01
    """Share of what is kept for validation."""
    holdout: Holdout = Holdout.ROWS
    """What is held out: single rows, for which tars are read twice, or whole tars."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("max_bytes", self.max_bytes)
        check_share(self.holdout_share)
        check_place(self.folder, self.files)
        if not self.image_suffixes:
            raise ValueError("image_suffixes must name one member at least")

    def build(self) -> CutFilesSource:
        """Return the source."""
        return CutFilesSource(self, TarsReader(self), Cut(holdout_share=self.holdout_share, holdout=self.holdout))


@dataclass(frozen=True, slots=True)
class _Group:
    """Members that stand together in a tar under one name: a row."""

    name: str
    members: dict[str, TarMember]
    problems: list[TarMember]


class TarsReader:
    """Reads the rows of a `TarsConfig`."""

    suffixes = TAR_SUFFIXES

    def __init__(self, config: TarsConfig) -> None:
        """Keep the configuration."""
        self.config = config

    def survey(self, name: str) -> SlicedFile:
        """Return a file cut into slices, after a look at what it is; see `FileReader.survey`."""
        with open_seekable(Place(folder=self.config.folder, name=name)) as file:
            digest = quick_digest(file)[:DIGEST_LENGTH]
            size = size_of(file)
        return SlicedFile(name=name, digest=digest, num_rows=0, bounds=(0, max(size, 1)))

    def rows(self, piece: Slice, cut: Cut) -> Iterator[SourceRow]:
        """Yield a tar's rows that belong to the slice's split; of the others only headers are read."""
        with open_seekable(Place(folder=self.config.folder, name=piece.file)) as file:
            piece.check(quick_digest(file)[:DIGEST_LENGTH])
            seen: set[str] = set()
            num_found = 0
            for found in _read_groups(file, self.config.max_bytes):
                num_found += 1
                for part in self._parts(found, seen):
                    if cut.takes(key := _key_of(piece.file, part), piece):
                        yield self._row(file, piece.file, key, part)
            if not num_found and cut.takes(key := _key_of(piece.file, empty := TarMember(offset=0)), piece):
                yield self._row(file, piece.file, key, replace(empty, problem="the tar has no members"))

    def _parts(self, found: _Group | TarMember, seen: set[str]) -> Iterator[_Group | TarMember]:
        """Yield what becomes a row each: a group, and what is wrong with it where its image is sound all the same."""
        if isinstance(found, TarMember):
            yield found
            return
        if found.name in seen:
            first = next(iter((*found.members.values(), *found.problems)))
            yield replace(first, problem=f"{found.name} stands again, apart from its first members")
            return
        seen.add(found.name)
        yield found
        if self._image_of(found) is not None:
            yield from found.problems

    def _row(self, file: IO[bytes], tar: str, key: str, part: _Group | TarMember) -> SourceRow:
        if isinstance(part, TarMember):
            return SourceRow(key=key, captions=(), attributes={"tar": tar, BROKEN: text_of(part.problem)})
        config, members = self.config, part.members
        facts = _json_object(members["json"].content(file)) if "json" in members else {}
        texts = [members[config.caption_suffix].content(file)] if config.caption_suffix in members else []
        image = self._image_of(part)
        problem = "; ".join(member.problem for member in part.problems) or "no member is an image"
        return SourceRow(
            key=key,
            captions=captions_of([*texts, facts.get(config.caption_field, facts.get("captions"))]),
            payload=image.content(file) if image else None,
            attributes={
                **facts,
                "tar": tar,
                "key": text_of(part.name),
                **({} if image else {BROKEN: text_of(problem)}),
            },
        )

    def _image_of(self, group: _Group) -> TarMember | None:
        suffixes = (suffix for suffix in self.config.image_suffixes if suffix in group.members)
        return next((group.members[suffix] for suffix in suffixes), None)


def _read_groups(file: IO[bytes], max_bytes: int) -> Iterator[_Group | TarMember]:
    """Yield the rows of a tar, and each member that belongs to none with what is wrong with it."""
    group: _Group | None = None
    for member in read_members(file):
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            yield replace(member, problem=member.problem or f"{member.name} has no name of the form KEY.SUFFIX")
            continue
        name, suffix = folder + slash + stem, suffix.lower()
        if group is None or group.name != name:
            if group is not None:
                yield group
            group = _Group(name, {}, [])
        problem = member.problem
        if not problem and suffix in group.members:
            problem = f"{member.name} stands twice"
        if not problem and member.num_bytes > max_bytes:
            problem = f"{member.name} has {member.num_bytes} bytes; {max_bytes} are allowed"
        if problem:
            group.problems.append(replace(member, problem=problem))
        else:
            group.members[suffix] = member
    if group is not None:
        yield group


def _key_of(tar: str, part: _Group | TarMember) -> str:
    return key_of(f"tar:{tar}@{part.offset}" if isinstance(part, TarMember) else f"tar:{tar}:{part.name}")


def _json_object(content: bytes) -> dict[str, JSON]:
    """Return a row's JSON member, or nothing where it is broken: the image and its caption may still be good."""
    try:
        facts = json.loads(content.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return {}
    sound: dict[str, JSON] = json_of(facts) if isinstance(facts, dict) else {}
    return sound
