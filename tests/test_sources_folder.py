"""Laws of folders: texts find their images, odd names are only names, and nothing outside the folder is opened."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.folder import FolderConfig
from pipeline.sources.source import is_held_out
from pipeline.store.schema import Split
from tests.test_sources_bad import GOOD, read


def image_folder(root, metadata=None, name="metadata.jsonl"):
    (root / "f/sub").mkdir(parents=True)
    (root / "secret.jpg").write_bytes(b"secret")
    for image in ("f/a.jpg", "f/sub/b.jpg"):
        (root / image).write_bytes(GOOD)
    if metadata is not None:
        (root / "f" / name).write_bytes(metadata)
    return FolderConfig(folder=str(root / "f"), rows_per_shard=2)


NAMED = {
    "parent": ("../secret.jpg", "leads out of the folder"),
    "parent by a detour": ("sub/../../secret.jpg", "leads out of the folder"),
    "absolute": ("/etc/passwd.jpg", "leads out of the folder"),
    "URL": ("file:///etc/passwd.jpg", "leads out of the folder"),
    "chained URL": ("zip://x.jpg::http://169.254.169.254/a", "leads out of the folder"),
    "newline": ("a\n.jpg", "there is no image"),
    "10 kB": ("n" * 10_000 + ".jpg", "a file name of 10004 characters"),
    "unicode": ("\u05d0\U0001f600.jpg", "there is no image"),
    "NUL": ("a.jpg\0.png", "there is no image"),
    "empty": ("", "the row has no file_name"),
    "null": (None, "the row has no file_name"),
    "a number": (3, "there is no image '3'"),
    "a list": (["a.jpg"], "the row has no file_name"),
    "no image": ("metadata.jsonl", "there is no image"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_metadata_that_names_no_image_of_the_folder_is_a_row_that_says_why(kind, tmp_path):
    named, problem = NAMED[kind]
    said = [
        {"file_name": "a.jpg", "text": "A"},
        {"file_name": named, "text": "X"},
        {"file_name": "sub/b.jpg", "text": "B"},
    ]
    config = image_folder(tmp_path, "".join(json.dumps(row) + "\n" for row in said).encode())
    source = config.build()
    rows = {row.attributes.get("name", ""): row for row in read(source)}
    assert len(rows) == 3
    assert (rows["a.jpg"].captions, rows["a.jpg"].payload) == (("A",), GOOD)
    assert (rows["sub/b.jpg"].captions, rows["sub/b.jpg"].payload) == (("B",), GOOD)
    assert (rows[""].payload, rows[""].url, rows[""].captions) == (None, None, ("X",))
    assert problem in rows[""].attributes["broken"]
    names = [name for split in Split for name in source.shard_names(split)]
    again = [row for name in names for row in config.build().open_shard_at_row(name, 0, source.shard_payload(name))]
    assert again == read(source)


METADATA = {
    "metadata.jsonl": b'{"file_name": "b.jpg", "text": ["one", "two"], "licence": "PD"}\n',
    "metadata.csv": b'file_name,text,caption,licence\nb.jpg,"one","two",PD\n',
    "metadata.parquet": None,
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_any_format_and_depth_speaks_of_its_own_folder(name, tmp_path):
    config = image_folder(tmp_path)
    if METADATA[name] is None:
        row = {"file_name": "b.jpg", "text": ["one", "two"], "licence": "PD"}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "f/sub" / name)
    else:
        (tmp_path / "f/sub" / name).write_bytes(METADATA[name])
    (tmp_path / "f/sub/b.txt").write_text("three\n\n  \ntwo\n")
    (tmp_path / "f/sub/b.json").write_text('{"caption": "four", "score": 2, "deep": {"a": NaN}}')
    rows = {row.attributes["name"]: row for row in read(config.build())}
    assert rows["sub/b.jpg"].captions == ("one", "two", "three", "four")
    assert rows["sub/b.jpg"].attributes == {"licence": "PD", "score": 2, "deep": {"a": None}, "name": "sub/b.jpg"}
    assert rows["a.jpg"].captions == ()


def test_metadata_without_the_column_of_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metadata.csv lacks columns \['file_name'\]; it has \['image', 'text'\]"):
        image_folder(tmp_path, b"image,text\na.jpg,x\n", "metadata.csv").build().shard_names(Split.TRAIN)


def test_metadata_broken_line_is_a_row_of_its_own(tmp_path):
    rows = read(image_folder(tmp_path, b'{"file_name": "a.jpg"}\n{"file_name": "b\n').build())
    assert sorted(row.attributes.get("broken", "")[:7] for row in rows) == ["", "", "no JSON"]


NAMES = [
    "a\nb.jpg",
    "\u05d0\U0001f600.jpg",
    "n" * 200 + ".jpg",
    "a b%20?*#[1].jpg",
    "x::y.jpg",
    "-rf.jpg",
    "\udcff.jpg",
    "~.JPG",
]


@pytest.mark.parametrize("name", NAMES)
def test_folder_with_an_odd_file_name_gives_that_file(name, tmp_path):
    config = image_folder(tmp_path)
    with open(os.path.join(os.fsencode(tmp_path), b"f", os.fsencode(name)), "wb") as file:
        file.write(b"odd")
    source = config.build()
    names = [shard for split in Split for shard in source.shard_names(split)]
    rows = [row for shard in names for row in config.build().open_shard_at_row(shard, 0, source.shard_payload(shard))]
    assert rows == read(source)
    assert sorted(row.payload for row in rows) == [GOOD, GOOD, b"odd"]


def test_folder_with_links_pipes_and_loops_counts_each_path_once(tmp_path):
    config = image_folder(tmp_path)
    (tmp_path / "f/link.jpg").symlink_to(tmp_path / "f/a.jpg")
    (tmp_path / "f/nowhere.jpg").symlink_to(tmp_path / "absent.jpg")
    (tmp_path / "f/round.jpg").symlink_to(tmp_path / "f/round.jpg")
    (tmp_path / "f/loop").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "f/pipe.jpg")
    (tmp_path / "f/folder.jpg").mkdir()
    rows = {row.attributes["name"]: row for row in read(config.build())}
    assert {name for name, row in rows.items() if row.payload == GOOD} == {"a.jpg", "sub/b.jpg", "link.jpg"}
    broken = {name: row.attributes["broken"] for name, row in rows.items() if row.payload is None}
    assert sorted(broken) == ["nowhere.jpg", "round.jpg"]
    assert all(said.startswith("can't be read") for said in broken.values())


def test_folder_image_over_the_limit_or_gone_since_the_plan_says_so(tmp_path):
    image_folder(tmp_path)
    config = FolderConfig(folder=str(tmp_path / "f"), max_bytes=len(GOOD), holdout_share=0.0)
    (tmp_path / "f/big.jpg").write_bytes(GOOD + b"!")
    source = config.build()
    (name,) = source.shard_names(Split.TRAIN)
    payload = source.shard_payload(name)
    (tmp_path / "f/a.jpg").unlink()
    rows = {row.attributes["name"]: row for row in config.build().open_shard_at_row(name, 0, payload)}
    assert rows["sub/b.jpg"].payload == GOOD
    assert rows["big.jpg"].attributes["broken"] == "more than 4 bytes"
    assert rows["a.jpg"].attributes["broken"] == "can't be read: No such file or directory"


def test_folder_held_out_whole_has_each_of_its_folders_in_one_split(tmp_path):
    for label in range(60):
        (tmp_path / f"label {label}").mkdir()
        for style in ("a", "b", "c"):
            (tmp_path / f"label {label}" / f"{style}.jpg").write_bytes(GOOD)
    config = FolderConfig(folder=str(tmp_path), holdout_share=0.3)
    labels = labels_of_splits(replace(config, has_folders_whole=True))
    assert not labels[Split.TRAIN] & labels[Split.VALIDATION]
    assert 5 < len(labels[Split.VALIDATION]) < 35
    assert labels[Split.VALIDATION] == {f"label {n}" for n in range(60) if is_held_out(f"label {n}", 0.3)}
    scattered = labels_of_splits(config)
    assert scattered[Split.TRAIN] & scattered[Split.VALIDATION]


def test_folder_held_out_whole_with_all_pictures_in_one_folder_is_refused(tmp_path):
    config = replace(image_folder(tmp_path), has_folders_whole=True)
    (tmp_path / "f/sub/b.jpg").rename(tmp_path / "f/b.jpg")
    with pytest.raises(ValueError, match="needs pictures in several folders; all of .* lie in one"):
        config.build().num_rows(Split.TRAIN)


def labels_of_splits(config):
    source = config.build()
    return {
        split: {
            row.attributes["name"].partition("/")[0]
            for name in source.shard_names(split)
            for row in source.open_shard_at_row(name, 0)
        }
        for split in Split
    }
