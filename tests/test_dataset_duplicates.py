"""Laws of leaving copies out: by Ray as in one process, across shards and runs, and whatever the shards' size."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pipeline.ingest import duplicates
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import make_dataset, plan_dataset
from pipeline.ingest.duplicates import DuplicateConfig
from pipeline.ingest.exchange import Exchange, shuffle_here
from pipeline.ingest.fates import find_duplicates
from pipeline.ingest.settling import LedgerPlace, find_fallen
from pipeline.plan import missing
from pipeline.run import run, shuffle
from pipeline.sources.dataset import FinishedDatasetConfig
from pipeline.sources.tables import UrlTableConfig
from pipeline.store.manifest import load_manifest
from pipeline.store.verification import verify_dataset
from tests.image_server import LOCAL, image_server
from tests.small_datasets import add_images, contents, counts_of, folder_config, lines_of_dataset, picture, rows_of

NEAR = DuplicateConfig(exact=True, near_distance=4)


@pytest.fixture(scope="module")
def local_ray():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def recoded(content: bytes, quality: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(content)).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures; of 0 a copy, of 1 the same pixels in another file, of 2 two re-encoded ones."""
    folder = tmp_path_factory.mktemp("images")
    add_images(folder, range(12), side=64)
    (folder / "copy.png").write_bytes(picture(0, 64))
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture(1, 64))).save(stream, "BMP")
    (folder / "pixels.bmp").write_bytes(stream.getvalue())
    (folder / "near.jpg").write_bytes(recoded(picture(2, 64), 80))
    (folder / "nearer.jpg").write_bytes(recoded(picture(2, 64), 90))
    for name in ("copy", "pixels", "near", "nearer"):
        (folder / f"{name}.txt").write_text(name)
    return folder


def near_config(root: Path, images: Path, rows_per_shard: int = 4) -> DatasetConfig:
    return folder_config(root, images, rows_per_shard, duplicates=NEAR, min_actors=1, max_actors=2)


@pytest.fixture(scope="module")
def unique(local_ray, images, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unique") / "dataset"
    make_dataset(near_config(root, images))
    return root


def fingerprints(count: int) -> list[pa.Table]:
    dice = np.random.default_rng(count)
    hashes = [int(value) for value in dice.integers(0, 2**63, 40)]
    rows = [
        {
            "generation": int(dice.integers(0, 3)),
            "key": f"{number:024x}",
            "place": f"train/{number % 9:06d}",
            "payload_sha256": f"{dice.integers(0, count):064x}",
            "pixel_sha256": f"{number + 2**40:064x}",
            "perceptual_hash": hashes[dice.integers(0, 40)] ^ (1 << int(dice.integers(0, 63))),
        }
        for number in range(count)
    ]
    for row in rows:  # equal bytes have equal pixels and an equal hash
        same = int(row["payload_sha256"], 16)
        row["pixel_sha256"], row["perceptual_hash"] = f"{same:064x}", hashes[same % 40] ^ (1 << same % 63)
    return [pa.Table.from_pylist(rows[start::5], schema=duplicates.FINGERPRINTS) for start in range(5)]


def test_steps_by_ray_find_what_those_in_this_process_find(local_ray, tmp_path):
    tables = fingerprints(300)
    found = {}
    for each, rows_per_group in ((shuffle_here, 300), (shuffle, 200)):
        files = find_duplicates(tables, 300, NEAR, Exchange(str(tmp_path / each.__module__), each, rows_per_group))
        found[each.__module__] = sorted(str(line) for part in files for line in part.to_pylist())
    here, there = found.values()
    assert len(here) > 50
    assert here == there


def test_shuffle_by_ray_of_nothing_yields_nothing(local_ray):
    empty = [duplicates.FINGERPRINTS.empty_table()] * 2
    step = partial(duplicates.spread, config=NEAR), partial(duplicates.gather, config=NEAR)
    assert list(shuffle(empty, *step, 3)) == []


def test_the_rows_that_fall_do_not_depend_on_how_many_one_process_holds(local_ray, images, tmp_path):
    """All rows in one group of this process; a few in each of Ray's."""
    config = near_config(tmp_path / "dataset", images)
    plan = plan_dataset(config)
    assert plan.prepare is not None
    plan.prepare(missing(plan))
    staging = tmp_path / "dataset" / "staging"
    places = [
        LedgerPlace(root=str(staging), place=f"{path.parent.name}/{path.name.partition('.')[0]}", generation=0)
        for path in sorted(staging.glob("*/*.ledger.parquet"))
    ]
    tables = staging / "steps" / "fallen"
    together = {path.relative_to(tables): path.read_bytes() for path in tables.rglob("*.parquet")}
    find_fallen(config, str(staging), places, 16, shuffle, rows_per_group=10)
    assert len(list((staging / "steps" / "pairs").rglob("*.parquet"))) > 3
    assert {path.relative_to(tables): path.read_bytes() for path in tables.rglob("*.parquet")} == together
    assert sum(map(len, map(pq.read_table, tables.rglob("*.parquet")))) == 4


def test_copies_fall_and_the_first_in_order_stays(unique):
    lines = {line["key"]: line for line in lines_of_dataset(unique)}
    kept = {key for key, line in lines.items() if line["status"] == "ok"}
    assert counts_of(unique) == {"duplicate_bytes": 1, "duplicate_pixels": 1, "near_duplicate": 2, "ok": 12}
    for key, line in lines.items():
        if line["status"] != "ok":
            assert line["duplicate_of"] in kept
            assert line["duplicate_of"] < key
            assert line["thumbnail"]
    assert set(rows_of(unique)) == kept
    assert verify_dataset(str(unique)).problems == ()
    assert not (unique / "staging").exists()


def test_rows_that_stay_are_the_bytes_of_a_dataset_with_its_copies(unique, local_ray, images, tmp_path):
    make_dataset(folder_config(tmp_path / "all", images))
    everything = rows_of(tmp_path / "all")
    assert len(everything) == 16
    assert all(everything[key] == row for key, row in rows_of(unique).items())


@pytest.mark.parametrize("rows_per_shard", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_survivors_do_not_depend_on_the_shards(unique, images, tmp_path, rows_per_shard):
    make_dataset(near_config(tmp_path / "dataset", images, rows_per_shard))
    assert rows_of(tmp_path / "dataset") == rows_of(unique)


def test_copies_of_earlier_runs_fall_whatever_their_keys(local_ray, images, tmp_path):
    """Rows of an earlier generation stay: nothing that is published is taken back."""
    for number in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        for suffix in ("png", "txt"):
            (tmp_path / "images" / f"{number}.{suffix}").write_bytes((images / f"{number}.{suffix}").read_bytes())
    config = near_config(tmp_path / "dataset", tmp_path / "images")
    make_dataset(config)
    before, rows = contents(tmp_path / "dataset"), rows_of(config.root)
    for path in images.iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    make_dataset(config)
    after = contents(tmp_path / "dataset")
    assert all(after[name] == content for name, content in before.items() if name.startswith(("train", "valid")))
    assert rows.keys() < rows_of(config.root).keys()
    assert counts_of(config.root) == {"duplicate_bytes": 1, "duplicate_pixels": 1, "near_duplicate": 2, "ok": 12}
    assert verify_dataset(config.root).problems == ()


@pytest.mark.parametrize(
    "moment", [pytest.param("staged", marks=pytest.mark.slow), "half", pytest.param("lost", marks=pytest.mark.slow)]
)
def test_a_run_killed_between_staging_and_the_end_is_the_unbroken_run(unique, images, tmp_path, moment):
    config = near_config(tmp_path / "dataset", images)
    plan = plan_dataset(config)
    assert plan.prepare is not None
    if moment == "lost":
        make_dataset(config)
        for suffix in ("tar", "index"):
            (tmp_path / "dataset" / "train" / f"000001.{suffix}").unlink()
    else:
        (tmp_path / "dataset").mkdir()
        (tmp_path / "dataset" / "identity.json").write_bytes((unique / "identity.json").read_bytes())
        plan.prepare(missing(plan))
        assert (tmp_path / "dataset" / "staging").exists()
    if moment == "half":
        run(replace(plan_dataset(config), tasks=plan.tasks[:1], finish=None, prepare=None))
    make_dataset(config)
    assert contents(tmp_path / "dataset") == contents(unique)


def test_a_key_that_two_shards_have_stays_in_the_first(local_ray, images, tmp_path):
    """The same address in two files of a listing is the same row."""
    with image_server() as server:
        (tmp_path / "in").mkdir()
        for name in "ab":
            (tmp_path / "in" / f"{name}.csv").write_text(f"URL,TEXT\n{server.url}/photo,{name}\n")
        source = UrlTableConfig(folder=str(tmp_path / "in"), holdout_share=0.0)
        fetch = replace(LOCAL, max_bytes=10**6)
        config = folder_config(
            tmp_path / "dataset", images, source=source, fetch=fetch, duplicates=DuplicateConfig(exact=True)
        )
        make_dataset(config)
    lines = lines_of_dataset(config.root)
    assert [line["status"] for line in lines] == ["ok", "duplicate_key"]
    assert lines[1]["duplicate_of"] == lines[0]["key"]
    assert verify_dataset(config.root).problems == ()


# --- resharding -----------------------------------------------------------------------------------------------------


def reshard_config(root: Path, folder: Path, **fields: object) -> DatasetConfig:
    return DatasetConfig(root=str(root), source=FinishedDatasetConfig(folder=str(folder), **fields))  # type: ignore[arg-type]


def test_a_reshard_passes_every_row_byte_for_byte(unique, tmp_path):
    make_dataset(reshard_config(tmp_path / "dataset", unique, rows_per_shard=5))
    assert rows_of(tmp_path / "dataset") == rows_of(unique)
    manifest = load_manifest(str(tmp_path / "dataset"))
    assert manifest.image_size == load_manifest(str(unique)).image_size
    assert [shard.num_rows for shard in manifest.shards_of(manifest.shards[0].split)][0] == 5
    assert verify_dataset(str(tmp_path / "dataset")).problems == ()


def test_a_subset_by_keys_holds_those_rows_and_the_ledger_of_their_pictures(unique, tmp_path):
    rows = rows_of(unique)
    wanted = sorted(rows)[::3]
    (tmp_path / "keys.txt").write_text("\n".join(wanted))
    make_dataset(reshard_config(tmp_path / "dataset", unique, keys=str(tmp_path / "keys.txt")))
    assert rows_of(tmp_path / "dataset") == {key: rows[key] for key in wanted}
    told = {line["key"]: line for line in lines_of_dataset(unique)}
    for line in lines_of_dataset(tmp_path / "dataset"):
        for name in ("payload_sha256", "pixel_sha256", "perceptual_hash", "num_bytes", "original_width", "caption"):
            assert line[name] == told[line["key"]][name]
