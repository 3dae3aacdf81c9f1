"""Laws of every source: each row once, the same rows by the same name in any process, and names that stay."""

from __future__ import annotations

import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.dataset import FinishedDatasetConfig
from pipeline.sources.emoji import EmojiConfig, EmojiStyle
from pipeline.sources.folder import FolderConfig
from pipeline.sources.image_parquet import ImageParquetConfig
from pipeline.sources.mixture import MixtureConfig
from pipeline.sources.source import Holdout, Source, is_held_out
from pipeline.sources.tables import UrlTableConfig
from pipeline.sources.tars import TarsConfig
from pipeline.store.manifest import ShardRecord, claim_root, commit_shard, publish_manifest
from pipeline.store.schema import SourceRow, Split
from pipeline.store.shards import read_rows, write_shard


def all_rows(source: Source, split: Split) -> list[SourceRow]:
    return [row for name in source.shard_names(split) for row in source.open_shard_at_row(name, 0)]


def keys(source: Source) -> dict[Split, list[str]]:
    return {split: [row.key for row in all_rows(source, split)] for split in Split}


def rows_by_name(source: Source) -> dict[str, list[SourceRow]]:
    names = [name for split in Split for name in source.shard_names(split)]
    return {name: list(source.open_shard_at_row(name, 0, source.shard_payload(name))) for name in names}


def make_folder(root, count=40):
    for i in range(count):
        path = root / f"part{i % 3}" / f"{i}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"image {i}".encode())
        if i % 4:
            path.with_suffix(".txt").write_text(f"caption {i}\n\nanother {i}\n")
    return str(root)


def make_table(root, files=2, count=120):
    root.mkdir(parents=True, exist_ok=True)
    for part in range(files):
        rows = [{"URL": f"http://images.example/{part}/{i}.jpg", "TEXT": f"text {i}"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), root / f"part-{part}.parquet", row_group_size=32)
    return str(root)


def make_image_parquet(root, files=2, count=60):
    root.mkdir(parents=True, exist_ok=True)
    for part in range(files):
        rows = [{"image": {"bytes": f"{part} {i}".encode(), "path": None}, "text": f"t{i}"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), root / f"part-{part}.parquet", row_group_size=16)
    return str(root)


def make_tars(root, files=3, count=30):
    for number in range(files):
        rows = [
            {"__key__": f"{number}{i:04d}", "jpg": f"image {number} {i}".encode(), "txt": f"text {i}".encode()}
            for i in range(count)
        ]
        write_shard(str(root), Split.TRAIN, f"{number:05d}", rows)
    return str(root / "train")


def make_dataset(root, shards=3, count=20):
    claim_root(str(root), "dataset", {"of": "test"})
    for number in range(shards):
        split = Split.VALIDATION if number == shards - 1 else Split.TRAIN
        rows = []
        for i in range(count):
            key = f"{i * 7919 % 997:012x}{number:012x}"
            facts = {"captions": [f"c {key}", "more"], "url": None, "attributes": {"number": number}}
            members = {"png": f"pixels {key}".encode(), "txt": b"c", "json": json.dumps(facts).encode()}
            rows.append({"__key__": key, **members})
        files = write_shard(str(root), split, f"{number:06d}", rows)
        commit_shard(str(root), ShardRecord(name=f"{number:06d}", split=split, num_rows=count, files=files))
    publish_manifest(str(root), {"of": "test"}, "dataset", {})
    return str(root)


KINDS = {
    "emoji": lambda root, size: EmojiConfig(rows_per_shard=size * 8),
    "folder": lambda root, size: FolderConfig(folder=make_folder(root / "f"), rows_per_shard=size, holdout_share=0.2),
    "table": lambda root, size: UrlTableConfig(folder=make_table(root / "t"), rows_per_shard=size, holdout_share=0.1),
    "image-parquet": lambda root, size: ImageParquetConfig(
        folder=make_image_parquet(root / "i"), rows_per_shard=size, holdout_share=0.1
    ),
    "image-parquet-files": lambda root, size: ImageParquetConfig(
        folder=make_image_parquet(root / "i"), rows_per_shard=size, holdout_share=0.5, holdout=Holdout.FILES
    ),
    "tars": lambda root, size: TarsConfig(folder=make_tars(root / "w"), holdout_share=0.1),
    "dataset": lambda root, size: FinishedDatasetConfig(folder=make_dataset(root / "d"), rows_per_shard=size),
    "mixture": lambda root, size: MixtureConfig(
        sources=(
            EmojiConfig(rows_per_shard=size * 8, max_labels=60),
            UrlTableConfig(folder=make_table(root / "t"), rows_per_shard=size, holdout_share=0.1),
        ),
        shares=(0.5, 0.25),
    ),
}
NUM_ROWS = {"emoji": 7906, "folder": 40, "table": 240, "image-parquet": 120, "tars": 90, "dataset": 60}


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def test_source_has_every_row_once_and_both_splits(kind, tmp_path):
    source = KINDS[kind](tmp_path, 7).build()
    found = keys(source)
    assert all(found.values())
    every = found[Split.TRAIN] + found[Split.VALIDATION]
    assert len(set(every)) == len(every) == NUM_ROWS.get(kind, len(every))


def test_source_keys_and_splits_do_not_depend_on_the_shard_size(kind, tmp_path):
    by_size = [keys(KINDS[kind](tmp_path / str(size), size).build()) for size in (5, 64)]
    assert [{split: sorted(found) for split, found in one.items()} for one in by_size][0] == {
        split: sorted(found) for split, found in by_size[1].items()
    }


def test_source_opened_at_a_row_goes_on_from_there(kind, tmp_path):
    source = KINDS[kind](tmp_path, 9).build()
    name = source.shard_names(Split.TRAIN)[1]
    whole = list(source.open_shard_at_row(name, 0))
    assert source.shard_num_rows(name) in (None, len(whole))
    for row in (1, len(whole) - 1, len(whole)):
        assert list(source.open_shard_at_row(name, row)) == whole[row:]


def test_source_shard_opens_in_another_process_by_name_or_by_payload(kind, tmp_path):
    config = KINDS[kind](tmp_path, 9)
    planned = config.build()
    rows = rows_by_name(planned)
    payloads = {name: planned.shard_payload(name) for name in rows}
    for name in islice(rows, 0, None, 7):
        assert list(config.build().open_shard_at_row(name, 0)) == rows[name]
        assert list(config.build().open_shard_at_row(name, 2, payloads[name])) == rows[name][2:]


def test_source_config_goes_to_yaml_and_back(kind, tmp_path):
    config = KINDS[kind](tmp_path, 9)
    assert type(config).from_yaml(config.to_yaml()) == config


def test_source_without_the_keys_it_gave_lists_none_of_them(kind, tmp_path):
    source = KINDS[kind](tmp_path, 9).build()
    known = set(keys(source)[Split.TRAIN])
    left = source.without(known)
    is_listed = source.previous_of(source.shard_names(Split.TRAIN)[-1]) == ""
    if is_listed:
        assert keys(left) == {Split.TRAIN: [], Split.VALIDATION: keys(source)[Split.VALIDATION]}
        everything = left.without(set(keys(left)[Split.VALIDATION]))
        assert keys(everything) == {Split.TRAIN: [], Split.VALIDATION: []}
    else:
        assert source.shard_names(Split.TRAIN)[-1] in left.shard_names(Split.TRAIN)


def test_source_named_a_shard_that_it_never_had_refuses(kind, tmp_path):
    source = KINDS[kind](tmp_path, 9).build()
    for name in ("train/000000", "test/x@0123456789ab:0-5", "rubbish"):
        with pytest.raises(ValueError, match="is no shard of|is not a valid Split"):
            list(source.open_shard_at_row(name, 0))


GROW = {
    "folder": (lambda root: make_folder(root / "f", 40), lambda root: make_folder(root / "f", 55)),
    "table": (lambda root: make_table(root / "t", 2), lambda root: make_table(root / "t", 5)),
    "image-parquet": (lambda root: make_image_parquet(root / "i", 2), lambda root: make_image_parquet(root / "i", 4)),
    "tars": (lambda root: make_tars(root / "w", 3), lambda root: make_tars(root / "w", 6)),
    "dataset": (lambda root: make_dataset(root / "d", 3, 20), lambda root: make_dataset(root / "e", 5, 20)),
}


def config_at(kind, folder, size=7):
    match kind:
        case "folder":
            return FolderConfig(folder=folder, rows_per_shard=size, holdout_share=0.2)
        case "table":
            return UrlTableConfig(folder=folder, rows_per_shard=size, holdout_share=0.1)
        case "image-parquet":
            return ImageParquetConfig(folder=folder, rows_per_shard=size, holdout_share=0.1)
        case "tars":
            return TarsConfig(folder=folder, holdout_share=0.1)
        case _:
            return FinishedDatasetConfig(folder=folder, rows_per_shard=size)


@pytest.mark.parametrize("kind", ["folder", "table", "image-parquet", "tars"])
def test_grown_source_keeps_keys_and_a_name_means_the_same_rows_or_is_gone(kind, tmp_path):
    make, grow = GROW[kind]
    before = config_at(kind, make(tmp_path)).build()
    old_rows, old_digest = rows_by_name(before), before.digest
    old_payloads = {name: before.shard_payload(name) for name in old_rows}
    old_splits = {row.key: name.split("/")[0] for name, rows in old_rows.items() for row in rows}
    grown = config_at(kind, grow(tmp_path)).build()
    assert grown.digest != old_digest
    new_rows = rows_by_name(grown)
    assert all(new_rows[name] == rows for name, rows in old_rows.items() if name in new_rows)
    new_splits = {row.key: name.split("/")[0] for name, rows in new_rows.items() for row in rows}
    assert new_splits.items() > old_splits.items()
    # An old plan is still carried out to the letter.
    for name, rows in old_rows.items():
        assert list(grown.open_shard_at_row(name, 0, old_payloads[name])) == rows
    # Only what is new is left to do.
    fresh = grown.without(old_splits)
    todo = [name for split in Split for name in fresh.shard_names(split) if name not in old_rows]
    made = [row.key for name in todo for row in fresh.open_shard_at_row(name, 0)]
    assert sorted(made) == sorted(new_splits.keys() - old_splits.keys())


@pytest.mark.parametrize("kind", ["folder", "table", "image-parquet", "tars", "dataset"])
def test_source_on_object_storage_or_moved_is_the_same(kind, tmp_path, s3_root, s3):
    folder = GROW[kind][0](tmp_path)
    remote = s3_root.replace("_", "-").lower()
    s3.client().put(folder, remote, recursive=True)
    here, there = config_at(kind, folder).build(), config_at(kind, remote).build()
    assert here.digest == there.digest
    assert rows_by_name(here) == rows_by_name(there)


def test_emoji_shards_are_what_they_were():
    source = EmojiConfig().build()
    rows = {split: all_rows(source, split) for split in Split}
    assert {split: source.num_rows(split) for split in Split} == {split: len(found) for split, found in rows.items()}
    assert sum(len(source.shard_names(split)) for split in Split) == 16
    assert [source.shard_num_rows(name) for name in source.shard_names(Split.TRAIN)[:-1]] == [512] * 14
    labels = {split: {row.attributes["label"] for row in found} for split, found in rows.items()}
    assert labels[Split.TRAIN].isdisjoint(labels[Split.VALIDATION])
    assert sum(map(len, labels.values())) == 3953
    assert len(labels[Split.VALIDATION]) / 3953 == pytest.approx(0.05, abs=0.01)
    assert all(row.payload.lstrip().startswith(b"<") for found in rows.values() for row in found)
    assert min(rows[Split.TRAIN], key=lambda row: row.key) == rows[Split.TRAIN][0]


def test_emoji_captions_are_label_style_and_aliases():
    source = EmojiConfig().build()
    by_name = {(row.attributes["label"], row.attributes["style"]): row for s in Split for row in all_rows(source, s)}
    dolphin = by_name["dolphin", "openmoji"]
    assert dolphin.captions == ("dolphin, openmoji style", "dolphin", "flipper")
    assert dolphin.attributes["licence"] == "CC-BY-SA-4.0"
    assert by_name["keycap 1", "twemoji"].attributes["codepoints"] == "0031-20e3"


def test_emoji_styles_share_keys_with_the_whole_set():
    alone = EmojiConfig(styles=(EmojiStyle.TWEMOJI,)).build()
    both = keys(EmojiConfig().build())
    for split, found in keys(alone).items():
        assert set(found) <= set(both[split])


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


def test_finished_dataset_gives_its_members_untouched_in_key_order(tmp_path):
    root = make_dataset(tmp_path / "d")
    written = {
        row["__key__"]: {suffix: content for suffix, content in row.items() if suffix != "__key__"}
        for path in sorted((tmp_path / "d").glob("*/*.tar"))
        for row in read_rows(str(path))
    }
    source = FinishedDatasetConfig(folder=root, rows_per_shard=11).build()
    for split, count in ((Split.TRAIN, 40), (Split.VALIDATION, 20)):
        rows = all_rows(source, split)
        assert [row.key for row in rows] == sorted(row.key for row in rows)
        assert len(rows) == count == source.num_rows(split)
        assert all(row.members == written[row.key] and row.payload is None for row in rows)
        assert rows[0].captions == (f"c {rows[0].key}", "more")
        assert rows[0].attributes == {"number": int(rows[0].key[12:], 16)}


def test_finished_dataset_subset_is_the_rows_of_the_list_and_unknown_keys_are_named(tmp_path):
    root = make_dataset(tmp_path / "d")
    whole = keys(FinishedDatasetConfig(folder=root).build())
    wanted = whole[Split.TRAIN][::3] + whole[Split.VALIDATION][:2]
    (tmp_path / "keys.txt").write_text("\ufeff" + "\r\n".join(reversed(wanted)) + "\n\n" + wanted[0])
    subset = FinishedDatasetConfig(folder=root, keys=str(tmp_path / "keys.txt"), rows_per_shard=4).build()
    assert keys(subset) == {split: [key for key in found if key in wanted] for split, found in whole.items()}
    (tmp_path / "keys.txt").write_text("\n".join([*wanted, "b" * 24, "a" * 24]))
    with pytest.raises(ValueError, match=f"lacks 2 of the keys in .*keys.txt: {'a' * 24}, {'b' * 24}"):
        FinishedDatasetConfig(folder=root, keys=str(tmp_path / "keys.txt")).build().shard_names(Split.TRAIN)


def test_mixture_takes_its_shares_by_key_and_says_whose_a_row_is(tmp_path):
    table = UrlTableConfig(folder=make_table(tmp_path / "t", 1, 2000), holdout_share=0.0)
    taken = {}
    for share in (0.1, 0.3, 1.0):
        rows = all_rows(MixtureConfig(sources=(table,), shares=(share,)).build(), Split.TRAIN)
        assert len(rows) / 2000 == pytest.approx(share, abs=3 * (share * (1 - share) / 2000) ** 0.5)
        assert {row.attributes["source"] for row in rows} == {"table"}
        taken[share] = {row.key for row in rows}
    assert taken[0.1] < taken[0.3] < taken[1.0]


def test_mixture_of_one_source_twice_keeps_both_rows_apart_and_order_changes_nothing(tmp_path):
    emoji = EmojiConfig(max_labels=30)
    one = MixtureConfig(sources=(emoji, emoji), names=("a", "b")).build()
    other = MixtureConfig(sources=(emoji, emoji), names=("b", "a")).build()
    for split in Split:
        assert len({row.key for row in all_rows(one, split)}) == 2 * EmojiConfig(max_labels=30).build().num_rows(split)
        by_key = [sorted(all_rows(source, split), key=lambda row: row.key) for source in (one, other)]
        assert by_key[0] == by_key[1]
        assert one.num_rows(split) == len(by_key[0])


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: EmojiConfig(rows_per_shard=0), "rows_per_shard must be at least 1, got 0"),
        (lambda: EmojiConfig(holdout_share=1.0), "holdout_share must be at least 0 and below 1, got 1.0"),
        (lambda: EmojiConfig(styles=()), "styles must name each of"),
        (lambda: FolderConfig(folder="x", suffixes=("jpg",)), "suffixes must begin with a dot"),
        (lambda: FolderConfig(folder="/absent/folder").build(), "there is no folder /absent/folder"),
        (lambda: UrlTableConfig(), "give a folder that can be listed, or the files"),
        (lambda: UrlTableConfig(files=("a.csv",)), "files without a folder must be whole paths or URLs"),
        (lambda: TarsConfig(folder="x", files=("a.tar", "a.tar")), "files names a.tar twice"),
        (lambda: TarsConfig(folder="x", files=("a.zip",)).build().shard_names(Split.TRAIN), r"ends in none of \.tar"),
        (lambda: TarsConfig(folder="/absent").build().shard_names(Split.TRAIN), r"holds no file that ends in \.tar"),
        (lambda: MixtureConfig(sources=(EmojiConfig(),), shares=(1.5,)), "above 0 and at most 1, got 1.5"),
        (lambda: MixtureConfig(sources=(EmojiConfig(),), shares=(0.5, 0.5)), "one entry for each of 1 sources"),
        (lambda: MixtureConfig(sources=(EmojiConfig(), EmojiConfig())), "two sources are named 'emoji'"),
        (lambda: MixtureConfig(sources=(EmojiConfig(),), names=("a!b",)), "a source's name can't be empty or hold '!'"),
        (lambda: MixtureConfig().build(), "a mixture needs one source at least"),
        (lambda: FinishedDatasetConfig(folder="/absent").build().shard_names(Split.TRAIN), "holds no manifest.json"),
    ],
)
def test_source_config_that_makes_no_dataset_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
