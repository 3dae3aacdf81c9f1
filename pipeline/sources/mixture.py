"""Several sources as one, a share of each.

Which rows are taken is decided by their keys, so rows added to a source change nothing for those that were there. A
row's key is made anew from its source's name and its key there: equal keys of two sources stay two rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TypeAlias

from ldm.config import Config, digest_of
from pipeline.sources.emoji import EmojiConfig
from pipeline.sources.folder import FolderConfig
from pipeline.sources.image_parquet import ImageParquetConfig
from pipeline.sources.scenes import ScenesConfig
from pipeline.sources.source import Source, fraction_of
from pipeline.sources.tables import UrlTableConfig
from pipeline.sources.tars import TarsConfig
from pipeline.store.schema import SourceRow, Split, key_of

PART_MARK = "!"
"""Stands in a shard's name between the source's name and the rest."""

MixedConfig: TypeAlias = EmojiConfig | ScenesConfig | FolderConfig | UrlTableConfig | TarsConfig | ImageParquetConfig
"""A source that may be mixed."""

_KIND_NAMES = {
    EmojiConfig: "emoji",
    ScenesConfig: "scenes",
    FolderConfig: "folder",
    UrlTableConfig: "table",
    TarsConfig: "tars",
    ImageParquetConfig: "image-parquet",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(Config):
    """Several sources at once, a share of each."""

    sources: tuple[MixedConfig, ...] = ()
    """The sources."""
    shares: tuple[float, ...] = ()
    """For each source the fraction of its rows that is taken, above 0 and at most 1; empty takes all of each."""
    names: tuple[str, ...] = ()
    """For each source its name, part of its rows' keys; empty for their kinds, where no kind comes twice."""

    def __post_init__(self) -> None:
        """Refuse what makes no mixture."""
        for field, given in (("shares", self.shares), ("names", self.names)):
            if given and len(given) != len(self.sources):
                raise ValueError(f"{field} must have one entry for each of {len(self.sources)} sources, got {given}")
        if wrong := [share for share in self.shares if not 0 < share <= 1]:
            raise ValueError(f"shares must be above 0 and at most 1, got {wrong[0]}")
        if repeated := [name for name, count in Counter(self.part_names).items() if count > 1]:
            raise ValueError(f"two sources are named {repeated[0]!r}: give names, one for each source")
        if wrong_names := [name for name in self.names if not name or PART_MARK in name or "/" in name]:
            raise ValueError(f"a source's name can't be empty or hold {PART_MARK!r} or '/', got {wrong_names[0]!r}")

    @property
    def part_names(self) -> tuple[str, ...]:
        """The name of each source."""
        return self.names or tuple(_KIND_NAMES[type(source)] for source in self.sources)

    def build(self) -> MixtureSource:
        """Return the source.

        Raises:
            ValueError: if there is nothing to mix.
        """
        if not self.sources:
            raise ValueError("a mixture needs one source at least; give them in a recipe or a --config file")
        shares = self.shares or (1.0,) * len(self.sources)
        parts = zip(self.part_names, self.sources, shares, strict=True)
        return MixtureSource({name: Part.of(name, source.build(), share) for name, source, share in parts})


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One source of a mixture.

    Attributes:
        name: its name.
        source: the source, without the rows that are not taken where it lists them one by one.
        share: the fraction of its rows that is taken.
        is_listed: whether the source lists its rows one by one, and so has left out what is not taken.
    """

    name: str
    source: Source
    share: float
    is_listed: bool

    @classmethod
    def of(cls, name: str, source: Source, share: float, known: Container[str] = frozenset()) -> Part:
        """Return the part of a source that is taken and not in `known`, which holds keys of the mixture."""
        listed = source.without(_Left(name, share, known))
        return cls(name=name, share=share, source=listed, is_listed=listed is not source)

    def num_rows(self, split: Split) -> int | None:
        """Return about how many rows of a split are taken, or None where the source can't tell."""
        count = self.source.num_rows(split)
        return count if self.is_listed or count is None else round(count * self.share)

    def takes(self, key: str) -> bool:
        """Say whether the row that has this key at the source is taken."""
        return fraction_of(f"share:{self.name}:{key}") < self.share

    def key_of(self, key: str) -> str:
        """Return a row's key in the mixture."""
        return key_of(f"{self.name}:{key}")


@dataclass(frozen=True, slots=True)
class _Left:
    """The keys of a source that are left out: those not taken, and those whose key in the mixture is known."""

    name: str
    share: float
    known: Container[str]

    def __contains__(self, key: object) -> bool:
        not_taken = fraction_of(f"share:{self.name}:{key}") >= self.share
        return not_taken or key_of(f"{self.name}:{key}") in self.known


class MixtureSource:
    """The rows of several sources, one source after the other."""

    def __init__(self, parts: dict[str, Part]) -> None:
        """Keep the parts by their names."""
        self.parts = parts

    @cached_property
    def digest(self) -> str:
        """Digest of the sources' digests, names and shares."""
        return digest_of([[part.name, part.share, part.source.digest] for part in self.parts.values()])

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards: `SPLIT/SOURCE!REST`, where the source itself says `SPLIT/REST`."""
        return [
            f"{split.value}/{part.name}{PART_MARK}{inner.partition('/')[2]}"
            for part in self.parts.values()
            for inner in part.source.shard_names(split)
        ]

    def open_shard_at_row(self, name: str, row: int, payload: str = "") -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on, each with its source's name in its attributes."""
        part, inner = self._part_of(name)
        taken = (found for found in part.source.open_shard_at_row(inner, 0, payload) if part.takes(found.key))
        for found in islice(taken, row, None):
            yield replace(found, key=part.key_of(found.key), attributes={**found.attributes, "source": part.name})

    def shard_num_rows(self, name: str) -> int | None:
        """Return how many rows a shard holds, where its source knows."""
        part, inner = self._part_of(name)
        return part.source.shard_num_rows(inner)

    def num_rows(self, split: Split) -> int | None:
        """Return about how many rows a split holds, or None where a source can't tell."""
        counts = [part.num_rows(split) for part in self.parts.values()]
        return None if None in counts else sum(count or 0 for count in counts)

    def without(self, known: Container[str]) -> MixtureSource:
        """Return the mixture without the rows of `known` in the sources that list theirs one by one."""
        parts = self.parts.values()
        return MixtureSource({part.name: Part.of(part.name, part.source, part.share, known) for part in parts})

    def previous_of(self, name: str) -> str:
        """Return the unit of the source that the shard belongs to, under the source's name."""
        part, inner = self._part_of(name)
        unit = part.source.previous_of(inner)
        return f"{part.name}{PART_MARK}{unit}" if unit else ""

    def shard_payload(self, name: str) -> str:
        """Return what the shard's own source says."""
        part, inner = self._part_of(name)
        return part.source.shard_payload(inner)

    def _part_of(self, name: str) -> tuple[Part, str]:
        split, _, rest = name.partition("/")
        part, mark, inner = rest.partition(PART_MARK)
        if not mark or part not in self.parts:
            raise ValueError(f"{name!r} is no shard of a mixture of {', '.join(self.parts)}")
        return self.parts[part], f"{split}/{inner}"
