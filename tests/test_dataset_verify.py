"""Laws of reading a dataset back: whatever was damaged is named, and a sound dataset has no problem."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.storage import write_bytes
from pipeline.store.ledger import LEDGER_SUFFIX, lines_of, read_ledger, write_ledger
from pipeline.store.manifest import FileRecord, commit_shard, load_manifest, publish_manifest, read_records, shard_path
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows, write_shard
from pipeline.store.verification import verify_dataset
from tests.small_datasets import add_images, folder_config, made

TRAIN, NAME = Split.TRAIN, "000001"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    add_images(folder / "images", range(14))
    made(folder_config(folder / "dataset", folder / "images"))
    return folder / "dataset"


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "dataset"))


def path_of(root: Path, suffix: str) -> Path:
    return Path(shard_path(str(root), TRAIN, NAME, suffix))


def republish(root: Path, files: dict[str, FileRecord], **fields: object) -> None:
    """Make records and manifest agree with damaged files, so that only reading them can tell."""
    (record,) = [record for record in read_records(str(root)) if (record.split, record.name) == (TRAIN, NAME)]
    raw = record.to_dict() | fields
    raw["files"] |= {suffix: {"num_bytes": file.num_bytes, "sha256": file.sha256} for suffix, file in files.items()}
    commit_shard(str(root), type(record).from_dict(raw))
    manifest = load_manifest(str(root))
    publish_manifest(str(root), manifest.identity, manifest.kind, manifest.summary)


def flip_a_bit(root: Path) -> None:
    content = bytearray(path_of(root, "tar").read_bytes())
    content[len(content) // 2] ^= 1
    path_of(root, "tar").write_bytes(bytes(content))


def truncate(root: Path) -> None:
    path_of(root, "tar").write_bytes(path_of(root, "tar").read_bytes()[:700])


def lose_the_ledger(root: Path) -> None:
    path_of(root, LEDGER_SUFFIX).unlink()


def exchange_the_index(root: Path) -> None:
    other = (root / "train" / "000000.index").read_bytes()
    path_of(root, "index").write_bytes(other)


def lose_a_row_everywhere_but_in_the_ledger(root: Path) -> None:
    rows = list(read_rows(str(path_of(root, "tar"))))[1:]
    republish(root, write_shard(str(root), TRAIN, NAME, rows))


def lose_a_ledger_line(root: Path) -> None:
    lines = lines_of(read_ledger(str(path_of(root, LEDGER_SUFFIX))))[1:]
    republish(root, {LEDGER_SUFFIX: write_ledger(str(path_of(root, LEDGER_SUFFIX)), lines)})


def exchange_a_picture(root: Path) -> None:
    rows = list(read_rows(str(path_of(root, "tar"))))
    rows[0]["jpg"], rows[1]["jpg"] = rows[1]["jpg"], rows[0]["jpg"]
    republish(root, write_shard(str(root), TRAIN, NAME, rows))


def put_a_row_into_two_shards(root: Path) -> None:
    extra = next(iter(read_rows(str(root / "train" / "000000.tar"))))
    rows = list(read_rows(str(path_of(root, "tar"))))
    republish(root, write_shard(str(root), TRAIN, NAME, [*rows, extra]))


def miscount(root: Path) -> None:
    republish(root, {}, counts={"ok": 3, "dns": 1}, num_rows=3)


def change_a_plan(root: Path) -> None:
    plan = root / "plans" / "000000.json"
    plan.write_text(plan.read_text().replace('"number": 0', '"number":  0'))


def lose_a_record(root: Path) -> None:
    path_of(root, "record.json").unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_bit, "000001.tar has sha256"),
    (truncate, "000001.tar has sha256"),
    (truncate, "train/000001: cannot be read"),
    (lose_the_ledger, "000001.ledger.parquet is missing"),
    (exchange_the_index, "the index does not point at"),
    (lose_a_row_everywhere_but_in_the_ledger, "the ledger has 4 kept rows, the tar 3"),
    (lose_a_ledger_line, "the ledger has 3 kept rows, the tar 4"),
    (lose_a_ledger_line, "the ledger counts {'ok': 3}, the manifest {'ok': 4}"),
    (exchange_a_picture, "is not the one that its JSON names"),
    (put_a_row_into_two_shards, "1 keys stand in more than one row"),
    (miscount, "the manifest says 3 rows, the ledger 4"),
    (change_a_plan, "the plans are not those of the manifest"),
    (lose_a_record, "the shards' records are not those of manifest.json"),
]


def test_a_sound_dataset_has_no_problem(sound):
    found = verify_dataset(str(sound))
    assert found.problems == ()
    assert found.num_rows == 14


@pytest.mark.parametrize("damage, sentence", DAMAGES)
def test_damage_is_named(dataset, damage, sentence):
    damage(dataset)
    problems = verify_dataset(str(dataset)).problems
    assert any(sentence in problem for problem in problems), problems


@pytest.mark.parametrize("where", ["tar", "index", LEDGER_SUFFIX, "record.json"])
@pytest.mark.parametrize("place", [0.01, 0.5, 0.99])
def test_no_byte_can_change_unseen(dataset, where, place):
    path = path_of(dataset, where)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    write_bytes(str(path), bytes(content))
    assert verify_dataset(str(dataset)).problems
