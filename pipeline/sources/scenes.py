"""Scenes composed of a few emoji drawings, with their boxes and semantic maps: data for every condition, no download.

Order: number of a scene → classes, sizes and places, drawn from (seed, number) → drawings from an installed package →
one picture, the layout that bounds what is seen of each, and a map of which pixel shows which.

Letters: y pixel row, x pixel column.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ldm.config import Config, digest_of
from pipeline.ingest.svg import draw
from pipeline.sources.emoji import EmojiStyle, package_versions, svg_of_label
from pipeline.sources.listing import Both, Listing, unpacked
from pipeline.sources.source import check_positive, check_share, split_of
from pipeline.store.schema import JSON, NO_CLASS_PIXEL, Reject, SourceRow, Split, key_of

MAX_TRIES = 64
"""Places that are tried for a drawing before the scene does without it."""
LEAST_OPACITY = 128
"""A pixel at least as opaque as this shows the drawing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenesConfig(Config):
    """Scenes composed of emoji drawings: layouts, semantic maps and classes without a download."""

    num_scenes: int = 8_000
    """Scenes in all."""
    side: int = 64
    """Pixels of a scene's side."""
    classes: tuple[str, ...] = (
        "tomato",
        "banana",
        "evergreen tree",
        "blue heart",
        "eggplant",
        "tangerine",
        "soccer ball",
        "frog",
        "pig face",
        "sunflower",
        "mushroom",
        "sailboat",
    )
    """Labels of the emoji that they are made of; a place in this list is a class's number."""
    styles: tuple[EmojiStyle, ...] = (EmojiStyle.TWEMOJI,)
    """Sets of drawings; a scene is of one."""
    fewest: int = 2
    """Drawings in a scene, at least."""
    most: int = 4
    """Drawings in a scene, at most; each of another class."""
    smallest: float = 0.3
    """Side of a drawing in shares of the scene's, at least."""
    largest: float = 0.45
    """Side of a drawing in shares of the scene's, at most."""
    seed: int = 0
    """Seed of classes, sizes and places."""
    rows_per_shard: int = 512
    """Rows in one shard."""
    holdout_share: float = 0.05
    """Share of scenes kept for validation."""

    def __post_init__(self) -> None:
        """Refuse what makes no scenes."""
        for name in ("num_scenes", "side", "fewest", "rows_per_shard"):
            check_positive(name, getattr(self, name))
        check_share(self.holdout_share)
        if not self.fewest <= self.most <= len(self.classes) < NO_CLASS_PIXEL:
            raise ValueError(
                f"fewest <= most <= number of classes < {NO_CLASS_PIXEL} is needed, "
                f"got {self.fewest}, {self.most} and {len(self.classes)}"
            )
        if not 0 < self.smallest <= self.largest <= 1:
            raise ValueError(f"0 < smallest <= largest <= 1 is needed, got {self.smallest} and {self.largest}")
        for name in ("classes", "styles"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name one at least, and none twice, got {getattr(self, name)}")

    def build(self) -> ScenesSource:
        """Return the source.

        Raises:
            ValueError: if a class is no emoji of these styles, naming it.
        """
        return ScenesSource(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One drawing of a scene.

    Attributes:
        number: its class.
        left: leftmost pixel column of the square that it is drawn in.
        top: uppermost pixel row.
        side: pixels of that square's side.
    """

    number: int
    left: int
    top: int
    side: int

    def is_apart(self, other: Placed) -> bool:
        """Say whether two drawings' squares have no pixel in common."""
        across = self.left + self.side <= other.left or other.left + other.side <= self.left
        return across or self.top + self.side <= other.top or other.top + other.side <= self.top


@dataclass(frozen=True, slots=True)
class _Scene:
    number: int
    key: str


class ScenesSource:
    """The rows of a `ScenesConfig`, sorted by key."""

    def __init__(self, config: ScenesConfig, known: Container[str] = frozenset()) -> None:
        """Keep the configuration, and the keys that are not to be listed."""
        self.config = config
        self._known = known
        self._drawings = {style: drawings_of(config, style) for style in config.styles}

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration, the packages' versions and the drawings."""
        versions = package_versions(self.config.styles)
        files = [[path.name for path in paths] for paths in self._drawings.values()]
        return digest_of({"config": self.config.to_dict(), "versions": versions, "files": files})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        return self._listing.shard_names(split)

    def open_shard_at_row(self, name: str, row: int, payload: str = "") -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on; a row's payload is a PNG."""
        scenes = unpacked(name, payload, self._unpack) if payload else self._listing.shard(name)
        return (self._row(scene) for scene in islice(scenes, row, None))

    def shard_num_rows(self, name: str) -> int:
        """Return how many rows a shard holds."""
        return len(self._listing.shard(name))

    def num_rows(self, split: Split) -> int:
        """Return how many rows a split holds."""
        return len(self._listing.entries_of_split[split])

    def without(self, known: Container[str]) -> ScenesSource:
        """Return the source of the scenes whose keys are not in `known`."""
        return ScenesSource(self.config, Both(self._known, known))

    def previous_of(self, name: str) -> str:
        """Return "": scenes are listed one by one."""
        return ""

    def shard_payload(self, name: str) -> str:
        """Return the numbers of the shard's scenes."""
        return self._listing.payload(name, lambda scene: scene.number)

    def _row(self, scene: _Scene) -> SourceRow:
        config = self.config
        dice = np.random.default_rng((config.seed, scene.number))
        style = config.styles[int(dice.integers(len(config.styles)))]
        placed = _placed(dice, config)
        picture, shown = composed(placed, self._drawings[style], config.side)
        names = [config.classes[each.number] for each in placed]
        said = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        return SourceRow(
            key=scene.key,
            captions=(f"{said}, {style.value} style", said) if len(config.styles) > 1 else (said,),
            payload=_png(picture),
            semantic_map=_png(shown),
            attributes={
                "layout": [[*_bounds(shown == each.number), config.classes[each.number]] for each in placed],
                "class": names[0] if len(names) == 1 else None,
                "style": style.value,
            },
        )

    def _unpack(self, packed: JSON) -> _Scene:
        assert isinstance(packed, int)
        return self._scene(packed)

    def _scene(self, number: int) -> _Scene:
        # What it is made of is in its name: scenes of another configuration are others.
        made = replace(self.config, num_scenes=1, rows_per_shard=1, holdout_share=0.0)
        return _Scene(number, key_of(f"scene:{digest_of(made.to_dict())}:{number}"))

    @cached_property
    def _listing(self) -> Listing[_Scene]:
        scenes = (self._scene(number) for number in range(self.config.num_scenes))
        split = ((split_of(scene.key, self.config.holdout_share), scene) for scene in scenes)
        return Listing.of(split, self.config.rows_per_shard).without(self._known)


def composed(
    placed: Sequence[Placed], drawings: Sequence[Path], side: int
) -> tuple[UInt8[np.ndarray, "y x 3"], UInt8[np.ndarray, "y x"]]:
    """Return a scene on white, and the class of each of its pixels (255 for none).

    Args:
        placed: what is drawn where; what comes later lies above.
        drawings: the SVG of each class.
        side: pixels of the scene's side.
    """
    picture = Image.new("RGB", (side, side), "white")
    shown = np.full((side, side), NO_CLASS_PIXEL, np.uint8)
    for each in placed:
        drawing = _drawn(drawings[each.number], each.side)
        picture.paste(drawing, (each.left, each.top), drawing)
        opaque = np.asarray(drawing.getchannel("A")) >= LEAST_OPACITY
        shown[each.top : each.top + opaque.shape[0], each.left : each.left + opaque.shape[1]][opaque] = each.number
    return np.asarray(picture), shown


def _placed(dice: np.random.Generator, config: ScenesConfig) -> list[Placed]:
    """Return the drawings of a scene; beyond the fewest, one that finds no place beside the others is left out.

    Raises:
        ValueError: if the fewest find no room.
    """
    count = int(dice.integers(config.fewest, config.most + 1))
    for _ in range(MAX_TRIES):
        placed = _tried(dice, config, count)
        if len(placed) >= config.fewest:
            return placed
    raise ValueError(f"{config.fewest} drawings of at least {config.smallest:g} of a side find no room in a scene")


def _tried(dice: np.random.Generator, config: ScenesConfig, count: int) -> list[Placed]:
    placed: list[Placed] = []
    for number in dice.permutation(len(config.classes))[:count]:
        for _ in range(MAX_TRIES):
            side = max(1, round(float(dice.uniform(config.smallest, config.largest)) * config.side))
            left, top = (int(place) for place in dice.integers(0, config.side - side + 1, 2))
            found = Placed(number=int(number), left=left, top=top, side=side)
            if all(found.is_apart(other) for other in placed):
                placed.append(found)
                break
    return placed


def drawings_of(config: ScenesConfig, style: EmojiStyle) -> list[Path]:
    """Return the SVG of each class in a style.

    Raises:
        ValueError: if a class is no emoji of the style, naming it.
    """
    paths = svg_of_label(style)
    if unknown := [label for label in config.classes if label not in paths]:
        raise ValueError(f"{style.value} has no drawing of {', '.join(unknown)}: classes are labels of emoji")
    return [paths[label] for label in config.classes]


@lru_cache(maxsize=4_096)
def _drawn(path: Path, side: int) -> Image.Image:
    drawn = draw(path.read_bytes(), side, side)
    assert not isinstance(drawn, Reject), f"{path} is a package's own"
    return drawn.convert("RGBA")


def _bounds(shown: np.ndarray) -> list[JSON]:
    """Return left, top, right and bottom of the pixels that show a drawing."""
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
