"""Laws of sources: every row once, the same rows by the same name, and nothing of a label on both sides."""

from __future__ import annotations

import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.emoji import EmojiConfig, EmojiStyle
from pipeline.sources.folder import FolderConfig
from pipeline.sources.parquet import UrlParquetConfig
from pipeline.sources.source import Source, is_held_out
from pipeline.sources.tars import TarsConfig
from pipeline.store.schema import SourceRow, Split, key_of
from pipeline.store.shards import write_shard


def all_rows(source: Source, split: Split) -> list[SourceRow]:
    return [row for name in source.shard_names(split) for row in source.open_shard_at_row(name, 0)]


def keys(source: Source) -> dict[Split, list[str]]:
    return {split: [row.key for row in all_rows(source, split)] for split in Split}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for i in range(40):
        path = root / f"part{i % 3}" / f"{i}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"image {i}".encode())
        if i % 4:
            path.with_suffix(".txt").write_text(f"caption {i}\n\nanother {i}\n")
    (root / "readme.md").write_text("no image")
    return root


@pytest.fixture
def parquet(tmp_path):
    root = tmp_path / "laion"
    root.mkdir()
    for part, count in enumerate((250, 40)):
        table = pa.table(
            {
                "URL": [f"http://images.example/{part}/{i}.jpg" for i in range(count)],
                "TEXT": [None if i % 10 == 3 else f"text {i}" for i in range(count)],
                "punsafe": [i / count for i in range(count)],
            }
        )
        pq.write_table(table, root / f"part-{part}.parquet", row_group_size=64)
    return root


def test_emoji_source_has_every_drawing_once():
    source = EmojiConfig().build()
    rows = {split: all_rows(source, split) for split in Split}
    assert sum(len(found) for found in rows.values()) == 7906
    assert {split: source.num_rows(split) for split in Split} == {split: len(found) for split, found in rows.items()}
    assert len({row.key for found in rows.values() for row in found}) == 7906
    labels = {split: {row.attributes["label"] for row in found} for split, found in rows.items()}
    assert labels[Split.TRAIN].isdisjoint(labels[Split.VALIDATION])
    assert sum(map(len, labels.values())) == 3953
    assert len(labels[Split.VALIDATION]) / 3953 == pytest.approx(0.05, abs=0.01)
    assert all(row.payload.lstrip().startswith(b"<") for found in rows.values() for row in found)


def test_emoji_captions_are_label_style_and_aliases():
    source = EmojiConfig().build()
    by_name = {(row.attributes["label"], row.attributes["style"]): row for s in Split for row in all_rows(source, s)}
    dolphin = by_name["dolphin", "openmoji"]
    assert dolphin.captions == ("dolphin, openmoji style", "dolphin", "flipper")
    assert dolphin.attributes["licence"] == "CC-BY-SA-4.0"
    assert by_name["keycap 1", "twemoji"].attributes["codepoints"] == "0031-20e3"


def test_emoji_split_and_keys_do_not_depend_on_the_shard_size():
    by_size = [keys(EmojiConfig(rows_per_shard=size).build()) for size in (100, 512)]
    assert by_size[0] == by_size[1]


def test_emoji_styles_share_keys_with_the_whole_set():
    alone = EmojiConfig(styles=(EmojiStyle.TWEMOJI,)).build()
    both = keys(EmojiConfig().build())
    for split, found in keys(alone).items():
        assert set(found) <= set(both[split])


@pytest.mark.parametrize("row", [0, 1, 99, 100])
def test_source_opened_at_a_row_goes_on_from_there(row):
    source = EmojiConfig(rows_per_shard=100).build()
    whole = list(source.open_shard_at_row("train/000007", 0))
    assert len(whole) == source.shard_num_rows("train/000007") == 100
    assert list(source.open_shard_at_row("train/000007", row)) == whole[row:]


def test_source_digest_changes_with_what_changes_the_rows():
    digests = [
        EmojiConfig().build().digest,
        EmojiConfig(rows_per_shard=511).build().digest,
        EmojiConfig(holdout_share=0.06).build().digest,
        EmojiConfig(styles=(EmojiStyle.TWEMOJI,)).build().digest,
    ]
    assert len(set(digests)) == len(digests)
    assert EmojiConfig().build().digest == digests[0]


def test_held_out_share_is_met_over_many_identities():
    share = sum(is_held_out(f"row {i}", 0.1) for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.007)  # three standard deviations of a fair draw


def test_folder_source_reads_images_and_captions(folder):
    source = FolderConfig(folder=str(folder), rows_per_shard=7, holdout_share=0.2).build()
    rows = {row.attributes["name"]: row for split in Split for row in all_rows(source, split)}
    assert len(rows) == 40
    assert rows["part1/1.PNG"].payload == b"image 1"
    assert rows["part1/1.PNG"].captions == ("caption 1", "another 1")
    assert rows["part1/4.PNG"].captions == ()
    assert all(source.num_rows(split) > 0 for split in Split)


def test_folder_source_moved_is_the_same_and_grown_keeps_its_keys(folder, tmp_path):
    before = FolderConfig(folder=str(folder)).build()
    old_keys, old_digest = keys(before), before.digest
    moved = folder.rename(tmp_path / "elsewhere")
    assert FolderConfig(folder=str(moved)).build().digest == old_digest
    (moved / "new.jpg").write_bytes(b"new")
    grown = FolderConfig(folder=str(moved)).build()
    assert grown.digest != old_digest
    added = {split: set(found) - set(old_keys[split]) for split, found in keys(grown).items()}
    assert set.union(*added.values()) == {key_of("file:new.jpg")}


def test_folder_source_without_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no local folder"):
        FolderConfig(folder=str(tmp_path / "absent")).build()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_parquet_source_has_every_row_once_whatever_the_shard_size(parquet, share):
    expected = {
        key_of(f"url:http://images.example/{part}/{i}.jpg") for part, n in ((0, 250), (1, 40)) for i in range(n)
    }
    by_size = []
    for size in (37, 64, 1000):
        source = UrlParquetConfig(folder=str(parquet), rows_per_shard=size, holdout_share=share).build()
        found = keys(source)
        assert sorted(found[Split.TRAIN] + found[Split.VALIDATION]) == sorted(expected)
        by_size.append({split: set(names) for split, names in found.items()})
    assert by_size[0] == by_size[1] == by_size[2]


def test_parquet_source_keeps_captions_and_attributes(parquet):
    config = UrlParquetConfig(folder=str(parquet), attribute_columns=("punsafe",), holdout_share=0.0)
    rows = list(islice(config.build().open_shard_at_row("train/000000", 2), 2))
    assert [row.url for row in rows] == ["http://images.example/0/2.jpg", "http://images.example/0/3.jpg"]
    assert [row.captions for row in rows] == [("text 2",), ()]
    assert rows[0].attributes == {"punsafe": 2 / 250}
    assert rows[0].payload is None


def test_parquet_source_lacking_a_column_names_it(parquet):
    with pytest.raises(ValueError, match=r"part-0.parquet lacks columns \['caption'\]"):
        UrlParquetConfig(folder=str(parquet), caption_column="caption").build().shard_names(Split.TRAIN)


def test_tars_source_reads_tars_made_elsewhere(tmp_path):
    for number in range(5):
        rows = [
            {
                "__key__": f"{number}{i:04d}",
                "jpg": f"image {number} {i}".encode(),
                "txt": f"text {i}".encode(),
                "json": json.dumps({"caption": f"said {i}", "width": 9, "exif": {"a": 1}}).encode(),
            }
            for i in range(3)
        ]
        write_shard(str(tmp_path), Split.TRAIN, f"{number:05d}", rows)
    source = TarsConfig(folder=str(tmp_path / "train"), holdout_share=0.01).build()
    assert [len(source.shard_names(split)) for split in Split] == [4, 1]
    found = all_rows(source, Split.TRAIN) + all_rows(source, Split.VALIDATION)
    assert len({row.key for row in found}) == 15
    first = next(row for row in found if row.attributes["key"] == "20001")
    assert first.payload == b"image 2 1"
    assert first.captions == ("text 1", "said 1")
    assert first.attributes == {"tar": "00002.tar", "key": "20001", "caption": "said 1", "width": 9}


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: EmojiConfig(rows_per_shard=0), "rows_per_shard must be at least 1, got 0"),
        (lambda: EmojiConfig(holdout_share=1.0), "holdout_share must be at least 0 and below 1, got 1.0"),
        (lambda: EmojiConfig(styles=()), "styles must name each of"),
        (lambda: FolderConfig(folder="x", suffixes=("jpg",)), "suffixes must begin with a dot"),
    ],
)
def test_source_config_out_of_range_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
