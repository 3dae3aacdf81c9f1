"""Laws of how data lies on disk: equal rows give equal bytes, and what is not recorded does not exist."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import webdataset

from ldm.storage import write_bytes
from pipeline.store.journal import (
    Cause,
    Generation,
    Journal,
    PlannedShard,
    append_generation,
    chains,
    read_journal,
)
from pipeline.store.ledger import LedgerLine, lines_of, read_ledger, write_ledger
from pipeline.store.manifest import (
    FileRecord,
    ShardRecord,
    claim_root,
    commit_shard,
    load_manifest,
    publish_manifest,
    read_records,
    shard_path,
    verify,
)
from pipeline.store.schema import KEY_LENGTH, Split, json_text, key_of
from pipeline.store.shards import read_index, read_row, read_rows, write_shard

IDENTITY = {"source": {"digest": "abc", "styles": ["a", "b"]}, "image_size": 64}


def rows(count: int) -> list[dict]:
    """Rows whose members have every length around a tar block of 512 bytes."""
    generator = np.random.default_rng(count)
    lengths = [0, 1, 511, 512, 513, 2000, 10_240]
    return [
        {
            "__key__": key_of(f"row {i}"),
            "png": generator.bytes(lengths[i % len(lengths)]),
            "txt": f"caption {i}".encode(),
            "moments.npy": generator.bytes(lengths[(3 * i) % len(lengths)]),
        }
        for i in range(count)
    ]


def make_folder(root: str) -> None:
    claim_root(root, "dataset", IDENTITY)
    for split in Split:
        for name in ("000000", "000001"):
            files = write_shard(root, split, name, rows(5))
            record = ShardRecord(
                name=name, split=split, num_rows=5, files=files, counts={"ok": 5, "dns": 1}, source="s"
            )
            commit_shard(root, record)


def test_key_is_a_digest_of_the_identity():
    assert key_of("a") == "ca978112ca1bbdcafac231b3"  # sha256 of "a", first 24 digits
    assert len(key_of("")) == KEY_LENGTH


def test_shard_read_back_gives_equal_rows(tmp_path):
    written = rows(20)
    write_shard(str(tmp_path), Split.TRAIN, "000000", written)
    assert list(read_rows(shard_path(str(tmp_path), Split.TRAIN, "000000", "tar"))) == written


def test_shard_index_points_at_every_member(tmp_path):
    written = rows(20)
    write_shard(str(tmp_path), Split.TRAIN, "000000", written)
    path = shard_path(str(tmp_path), Split.TRAIN, "000000", "tar")
    index = read_index(shard_path(str(tmp_path), Split.TRAIN, "000000", "index"))
    assert index.keys == tuple(row["__key__"] for row in written)
    assert [read_row(path, index, i) for i in range(20)] == written
    with tarfile.open(path) as tar:
        found = [(member.name, member.offset_data, member.size) for member in tar]
    expected = [
        (f"{key}.{suffix}", index.offsets[i, j], index.sizes[i, j])
        for i, key in enumerate(index.keys)
        for j, suffix in enumerate(index.suffixes)
    ]
    assert found == expected


def test_shard_index_asked_for_an_unknown_member_names_the_known_ones(tmp_path):
    write_shard(str(tmp_path), Split.TRAIN, "000000", rows(2))
    index = read_index(shard_path(str(tmp_path), Split.TRAIN, "000000", "index"))
    with pytest.raises(ValueError, match="no member 'jpg'; it has moments.npy, png, txt"):
        index.column("jpg")


def test_shard_is_read_by_plain_webdataset(tmp_path):
    written = rows(7)
    write_shard(str(tmp_path), Split.TRAIN, "000000", written)
    path = shard_path(str(tmp_path), Split.TRAIN, "000000", "tar")
    samples = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [{name: sample[name] for name in written[0]} for sample in samples] == written


def test_two_writers_of_one_shard_give_the_same_bytes(tmp_path):
    first = write_shard(str(tmp_path / "a"), Split.TRAIN, "000000", rows(9))
    second = write_shard(str(tmp_path / "b"), Split.TRAIN, "000000", iter(rows(9)))
    assert first == second
    for suffix, record in first.items():
        content = [(tmp_path / side / "train" / f"000000.{suffix}").read_bytes() for side in "ab"]
        assert content[0] == content[1]
        assert len(content[0]) == record.num_bytes


def test_shard_without_rows_is_a_shard(tmp_path):
    write_shard(str(tmp_path), Split.TRAIN, "000000", [])
    assert list(read_rows(shard_path(str(tmp_path), Split.TRAIN, "000000", "tar"))) == []
    index = read_index(shard_path(str(tmp_path), Split.TRAIN, "000000", "index"))
    assert (index.keys, index.suffixes, index.offsets.shape) == ((), (), (0, 0))


def test_shard_with_unlike_rows_is_refused_and_leaves_nothing(tmp_path):
    unlike = [*rows(2), {"__key__": key_of("x"), "png": b"only"}]
    with pytest.raises(
        ValueError, match=r"has members \('png',\), the shard's rows have \('moments.npy', 'png', 'txt'\)"
    ):
        write_shard(str(tmp_path), Split.TRAIN, "000000", unlike)
    assert list((tmp_path / "train").iterdir()) == []


def test_shard_with_a_repeated_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"key {key_of('row 0')} stands twice"):
        write_shard(str(tmp_path), Split.TRAIN, "000000", [*rows(3), *rows(1)])


def test_truncated_tar_raises_instead_of_ending_early(tmp_path):
    write_shard(str(tmp_path), Split.TRAIN, "000000", rows(8))
    path = tmp_path / "train" / "000000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises((tarfile.ReadError, EOFError)):
        list(read_rows(str(path)))


def test_manifest_round_trip_and_totals(tmp_path):
    root = str(tmp_path / "dataset")
    make_folder(root)
    published = publish_manifest(root, IDENTITY, "dataset", {"total": 20})
    assert load_manifest(root) == published
    assert [published.num_rows(split) for split in Split] == [10, 10]
    assert [shard.name for shard in published.shards_of(Split.VALIDATION)] == ["000000", "000001"]
    assert published.identity == IDENTITY


def test_manifest_digest_depends_on_the_rows_and_not_on_the_place(tmp_path):
    digests = []
    for place, identity in (("a", IDENTITY), ("deep/er/b", IDENTITY), ("c", IDENTITY | {"image_size": 65})):
        root = str(tmp_path / place)
        make_folder(root) if identity is IDENTITY else claim_root(root, "dataset", identity)
        digests.append(publish_manifest(root, identity, "dataset", {}).digest)
    assert digests[0] == digests[1] != digests[2]
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "deep/er/b/manifest.json").read_bytes()


def test_file_without_a_record_does_not_exist(tmp_path):
    root = str(tmp_path)
    make_folder(root)
    write_shard(root, Split.TRAIN, "000002", rows(3))
    assert [record.name for record in read_records(root) if record.split is Split.TRAIN] == ["000000", "000001"]


def test_claim_of_another_dataset_names_every_difference(tmp_path):
    root = str(tmp_path)
    claim_root(root, "dataset", IDENTITY)
    claim_root(root, "dataset", {"image_size": 64, "source": {"styles": ("a", "b"), "digest": "abc"}})
    with pytest.raises(ValueError, match="holds another dataset") as refusal:
        claim_root(root, "dataset", {"source": {"digest": "abd", "styles": ["a", "b"]}, "image_size": 32})
    assert "identity.image_size is 64 there, 32 here" in str(refusal.value)
    assert 'identity.source.digest is "abc" there, "abd" here' in str(refusal.value)
    assert "styles" not in str(refusal.value)


def test_claim_of_a_folder_with_shards_of_unknown_origin_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"holds train but no identity.json"):
        claim_root(str(tmp_path), "dataset", IDENTITY)


def test_unfinished_folder_has_no_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest.json: the job that fills it .* has not ended"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize("damage", ["flip", "delete", "truncate", "record"])
def test_verify_finds_damage(tmp_path, damage):
    root = str(tmp_path)
    make_folder(root)
    publish_manifest(root, IDENTITY, "dataset", {})
    assert verify(root) == []
    path = tmp_path / "train" / "000001.tar"
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(bytes(content))
            expected = "000001.tar has sha256"
        case "delete":
            path.unlink()
            expected = "000001.tar is missing"
        case "truncate":
            path.write_bytes(bytes(content[:-1]))
            expected = "000001.tar has sha256"
        case _:
            record = ShardRecord(name="000001", split=Split.TRAIN, num_rows=4, files={"tar": FileRecord(1, "0")})
            commit_shard(root, record)
            expected = "records are not those of manifest.json"
    problems = verify(root)
    assert len(problems) == 1
    assert expected in problems[0]


def test_manifest_of_another_version_is_refused(tmp_path):
    root = str(tmp_path)
    make_folder(root)
    publish_manifest(root, IDENTITY, "dataset", {})
    newer = (tmp_path / "manifest.json").read_text().replace('"version": 2', '"version": 3')
    write_bytes(str(tmp_path / "manifest.json"), newer.encode())
    with pytest.raises(ValueError, match="schema version 3, this code reads 2"):
        load_manifest(root)


def test_tar_read_from_elsewhere_than_the_local_disk(tmp_path):
    """A tar is the same rows through any file system that fsspec knows."""
    written = rows(4)
    write_shard(str(tmp_path), Split.TRAIN, "000000", written)
    content = (tmp_path / "train" / "000000.tar").read_bytes()
    write_bytes("memory://shards/000000.tar", content)
    assert list(read_rows("memory://shards/000000.tar")) == written
    index = read_index(shard_path(str(tmp_path), Split.TRAIN, "000000", "index"))
    assert read_row("memory://shards/000000.tar", index, 3) == written[3]


def line(number: int, **fields: object) -> LedgerLine:
    return LedgerLine(key=key_of(str(number)), source_row=number, **fields)


def test_ledger_read_back_gives_equal_lines_and_equal_bytes(tmp_path):
    lines = [
        line(0, caption="ネコ 😀", perceptual_hash=2**64 - 1, attributes='{"a": 1}', thumbnail=b"jpeg"),
        line(1, status="http_404", detail="gone", url="http://x/", perceptual_hash=None),
        line(2, status="near_duplicate", duplicate_of=key_of("0"), num_bytes=2**40),
    ]
    records = [write_ledger(str(tmp_path / name), lines) for name in ("a", "b")]
    assert records[0] == records[1]
    assert lines_of(read_ledger(str(tmp_path / "a"))) == lines
    assert read_ledger(str(tmp_path / "a"), ["status"]).column_names == ["status"]
    assert len(read_ledger(str(tmp_path / "a"), ["key"])) == 3


def test_ledger_takes_text_that_no_file_can_hold(tmp_path):
    write_ledger(str(tmp_path / "a"), [line(0, detail="lone \ud800 surrogate")])
    assert lines_of(read_ledger(str(tmp_path / "a")))[0].detail == "lone ? surrogate"


def test_json_of_anything_a_source_says_is_json():
    hostile = {"a": float("nan"), 3: [float("inf"), b"bytes", {"x\ud800": None}], "b": "\udfff"}
    assert json.loads(json_text(hostile)) == {"a": None, "3": [None, "b'bytes'", {"x?": None}], "b": "?"}


def shard(name: str, **fields: object) -> PlannedShard:
    return PlannedShard(split=Split.TRAIN, name=name, source_name=f"train/{fields.pop('rows', name)}:0", **fields)


def generation(number: int, *shards: PlannedShard, **fields: object) -> Generation:
    return Generation(
        number=number, cause=Cause.SOURCE, source_digest=str(number), filters={"min_side": 1}, shards=shards, **fields
    )


def test_journal_read_back_is_what_was_appended(tmp_path):
    generations = (
        generation(0, shard("000000"), shard("000001", source_payload="[1]", num_rows=3)),
        generation(1, shard("000002", rows="000000", retries=("train/000000",), retry="all")),
    )
    for each in generations:
        append_generation(str(tmp_path), each)
    journal = read_journal(str(tmp_path))
    assert journal.generations == generations
    assert len(set(journal.digests)) == 2
    assert [[each.name for each in chain] for chain in chains(journal.shards()).values()] == [
        ["000000", "000002"],
        ["000001"],
    ]


def test_journal_refuses_a_generation_that_another_run_has_appended(tmp_path):
    append_generation(str(tmp_path), generation(0, shard("000000")))
    with pytest.raises(ValueError, match=r"got another plan meanwhile \(000000.json\)"):
        append_generation(str(tmp_path), generation(0, shard("000000")))


def test_shards_that_were_amended_stand_in_the_place_of_the_old_ones():
    journal = Journal(
        (
            generation(0, shard("000000"), shard("000001")),
            generation(1, shard("000002", rows="000000", amends="train/000000"), dropped=("train/000000",)),
            generation(2, shard("000003", rows="000000", amends="train/000002"), dropped=("train/000002",)),
        )
    )
    assert [(number, each.name) for number, each in journal.shards()] == [(0, "000003"), (0, "000001")]
    assert journal.replaced_by() == {"train/000000": "train/000003", "train/000002": "train/000003"}
    assert journal.next_names()[Split.TRAIN] == 4
