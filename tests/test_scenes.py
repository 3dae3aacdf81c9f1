"""Laws of composed scenes: layouts and maps say what the picture shows, every process makes the same, and they grow."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.sources.emoji import EmojiStyle
from pipeline.sources.mixture import MixtureConfig
from pipeline.sources.scenes import Placed, ScenesConfig, composed, drawings_of
from pipeline.store.schema import NO_CLASS_PIXEL, SourceRow, Split

CONFIG = ScenesConfig(num_scenes=40, rows_per_shard=16, holdout_share=0.25)


def rows_of(config: ScenesConfig, split: Split | None = None) -> dict[str, SourceRow]:
    source = config.build()
    found = {}
    for part in [split] if split else Split:
        for name in source.shard_names(part):
            rows = list(source.open_shard_at_row(name, 0))
            assert len(rows) == source.shard_num_rows(name)
            found |= {row.key: row for row in rows}
    return found


def image_of(content: bytes | None) -> np.ndarray:
    assert content is not None
    return np.asarray(Image.open(io.BytesIO(content)))


def test_layout_and_map_say_where_each_drawing_is_seen() -> None:
    for row in rows_of(CONFIG).values():
        picture, shown = image_of(row.payload), image_of(row.semantic_map)
        assert picture.shape == (64, 64, 3)
        assert (picture[shown != NO_CLASS_PIXEL] != 255).any(axis=-1).mean() > 0.8  # drawings have white parts too
        # What is half transparent or more shows the ground, so little of it is far from white.
        assert (picture[shown == NO_CLASS_PIXEL].min(axis=-1) > 100).mean() > 0.97
        boxes = row.attributes["layout"]
        assert isinstance(boxes, list)
        assert {CONFIG.classes.index(box[4]) for box in boxes} == set(np.unique(shown)) - {NO_CLASS_PIXEL}
        for left, top, right, low, name in boxes:
            inside = shown == CONFIG.classes.index(name)
            where = np.argwhere(inside)
            assert (where.min(axis=0).tolist(), (where.max(axis=0) + 1).tolist()) == ([top, left], [low, right])
        assert CONFIG.fewest <= len(boxes) <= CONFIG.most
        assert all(box[4] in row.captions[0] for box in boxes)


def test_drawings_do_not_lie_over_each_other() -> None:
    apart = Placed(number=0, left=0, top=0, side=10)
    assert apart.is_apart(replace(apart, left=10))
    assert apart.is_apart(replace(apart, top=10))
    assert not apart.is_apart(replace(apart, left=9, top=9))
    boxes = [row.attributes["layout"] for row in rows_of(CONFIG).values()]
    for scene in boxes:
        assert isinstance(scene, list)
        for number, one in enumerate(scene):
            for other in scene[:number]:
                assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_one_drawing_fills_the_square_it_is_placed_in_and_lies_nowhere_else() -> None:
    drawings = drawings_of(CONFIG, EmojiStyle.TWEMOJI)
    picture, shown = composed([Placed(number=3, left=20, top=8, side=30)], drawings, 64)
    where = np.argwhere(shown == 3)
    assert where.min(axis=0)[1] >= 20
    assert where.max(axis=0)[1] < 50
    assert len(where) > 0.4 * 30 * 30
    outside = np.ones((64, 64), bool)
    outside[8:38, 20:50] = False
    assert (picture[outside] == 255).all()
    assert (shown[outside] == NO_CLASS_PIXEL).all()


def test_every_process_makes_the_same_scenes_and_a_payload_opens_a_shard_of_a_source_that_grew() -> None:
    source, larger = CONFIG.build(), replace(CONFIG, num_scenes=60).build()
    name = source.shard_names(Split.TRAIN)[0]
    own = list(source.open_shard_at_row(name, 3))
    assert [row.key for row in own] == [row.key for row in CONFIG.build().open_shard_at_row(name, 3)]
    opened = list(larger.open_shard_at_row(name, 3, source.shard_payload(name)))
    assert opened == own
    known = set(rows_of(CONFIG))
    added = larger.without(known)
    assert sum(added.num_rows(split) or 0 for split in Split) == 20
    assert rows_of(CONFIG).keys() <= rows_of(replace(CONFIG, num_scenes=60)).keys()


def test_another_seed_style_or_size_gives_other_rows_and_another_digest() -> None:
    keys = set(rows_of(CONFIG))
    for change in ({"seed": 1}, {"styles": (EmojiStyle.OPENMOJI,)}, {"side": 32}, {"most": 3}):
        other = replace(CONFIG, **change)
        assert not keys & set(rows_of(other))
        assert other.build().digest != CONFIG.build().digest
    assert set(rows_of(replace(CONFIG, rows_per_shard=7))) == keys


def test_pictures_of_one_thing_have_a_class_and_scenes_have_none() -> None:
    things = rows_of(replace(CONFIG, fewest=1, most=1, smallest=0.5, largest=0.95, num_scenes=200))
    classes = {row.attributes["class"] for row in things.values()}
    assert classes == set(CONFIG.classes)
    assert {row.attributes["class"] for row in rows_of(CONFIG).values()} == {None}
    mixed = MixtureConfig(sources=(CONFIG, replace(CONFIG, seed=5)), names=("one", "other")).build()
    assert sum(mixed.num_rows(split) or 0 for split in Split) == 80


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fewest": 3, "most": 2}, "fewest <= most"),
        ({"most": 13}, "fewest <= most"),
        ({"smallest": 0.6, "largest": 0.5}, "got 0.6 and 0.5"),
        ({"classes": ("frog", "frog", "tomato", "banana")}, "none twice"),
        ({"styles": ()}, "styles must name one at least"),
        ({"num_scenes": 0}, "num_scenes must be at least 1, got 0"),
    ],
)
def test_what_makes_no_scenes_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_an_unknown_label_and_drawings_without_room_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="twemoji has no drawing of a unicorn pony"):
        replace(CONFIG, classes=("frog", "tomato", "banana", "a unicorn pony")).build()
    crowded = replace(CONFIG, smallest=0.9, largest=1.0).build()
    with pytest.raises(ValueError, match="2 drawings of at least 0.9 of a side find no room"):
        list(crowded.open_shard_at_row(crowded.shard_names(Split.TRAIN)[0], 0))
