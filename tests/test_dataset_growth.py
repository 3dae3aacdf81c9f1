"""Laws of growing a dataset: what is there never changes, and a row is made once, however its source is cut."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.ingest.dataset import Request, plan_dataset
from pipeline.ingest.filters import FilterConfig
from pipeline.ingest.retrying import Retry
from pipeline.ingest.transforms import PictureConfig
from pipeline.plan import missing
from pipeline.sources.tables import UrlTableConfig
from pipeline.store.journal import Cause, read_journal
from pipeline.store.manifest import load_manifest
from pipeline.store.verification import verify_dataset
from tests.image_server import LOCAL, image_server
from tests.small_datasets import (
    add_images,
    contents,
    counts_of,
    facts_of,
    folder_config,
    lines_of_dataset,
    made,
    picture,
    rows_of,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    add_images(tmp_path / "images", range(20))
    return tmp_path / "images"


def shard_files(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(root).items() if name.startswith(("train", "validation"))}


def table_config(root: Path, folder: Path, rows_per_shard: int = 4, **fields: object):
    source = UrlTableConfig(folder=str(folder), rows_per_shard=rows_per_shard, holdout_share=0.2)
    fetch = replace(LOCAL, max_bytes=10**6, num_attempts=1)
    return folder_config(root, folder, source=source, fetch=fetch, **fields)


def write_table(path: Path, urls: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["URL", "TEXT"])
        writer.writerows([url, f"caption of {url}"] for url in urls)


def test_rows_added_to_a_folder_go_into_new_shards_and_change_no_byte_of_the_old(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    before, keys = shard_files(tmp_path / "dataset"), set(rows_of(config.root))
    add_images(images, range(20, 29))
    report = made(config)
    after = shard_files(tmp_path / "dataset")
    assert {name: after[name] for name in before} == before
    assert (report.num_rows, report.num_skipped) == (9, len(before) // 4)
    assert keys < set(rows_of(config.root))
    assert len(rows_of(config.root)) == 29
    assert verify_dataset(config.root).problems == ()


def test_a_run_without_anything_new_changes_nothing(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    before = contents(tmp_path / "dataset")
    assert missing(plan_dataset(config)) == []
    assert made(config).num_shards == 0
    assert contents(tmp_path / "dataset") == before


@pytest.mark.parametrize("rows_per_shard", [1, 3, 100])
def test_another_shard_size_makes_no_row_again(images, tmp_path, rows_per_shard):
    made(folder_config(tmp_path / "dataset", images))
    before = contents(tmp_path / "dataset")
    report = made(folder_config(tmp_path / "dataset", images, rows_per_shard=rows_per_shard))
    assert report.num_shards == 0
    assert contents(tmp_path / "dataset") == before


def test_keys_and_pictures_are_the_same_in_shards_of_any_size(images, tmp_path):
    roots = [tmp_path / str(size) for size in (1, 4, 100)]
    for root in roots:
        made(folder_config(root, images, rows_per_shard=int(root.name)))
    rows = [rows_of(root) for root in roots]
    assert rows[0] == rows[1] == rows[2]
    assert len({load_manifest(str(root)).digest for root in roots}) == 3


def test_a_moved_folder_is_the_same_source(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    moved = images.rename(tmp_path / "elsewhere")
    assert made(folder_config(tmp_path / "dataset", moved)).num_shards == 0


def test_a_run_that_planned_and_was_killed_makes_what_it_had_planned(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images)
    plan = plan_dataset(config)
    assert plan.prepare is not None
    made(folder_config(tmp_path / "unbroken", images))
    (tmp_path / "dataset").mkdir()
    plan.prepare(missing(plan))
    (tmp_path / "dataset" / "identity.json").write_bytes((tmp_path / "unbroken" / "identity.json").read_bytes())
    assert len(read_journal(config.root).generations) == 1
    made(config)
    assert contents(tmp_path / "dataset") == contents(tmp_path / "unbroken")


def test_rows_added_while_a_run_lay_killed_come_after_what_was_planned(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    (tmp_path / "dataset" / "train" / "000001.tar").unlink()
    add_images(images, range(20, 23))
    report = made(config)
    assert report.num_shards >= 2
    assert [generation.cause for generation in read_journal(config.root).generations] == [Cause.SOURCE] * 2
    assert len(rows_of(config.root)) == 23
    assert verify_dataset(config.root).problems == ()


def test_lines_added_to_a_table_are_the_only_ones_made(tmp_path):
    with image_server() as server:
        urls = [f"{server.url}/photo/{number}" for number in range(30)]
        write_table(tmp_path / "in" / "a.csv", urls[:14])
        config = table_config(tmp_path / "dataset", tmp_path / "in")
        made(config)
        before, seen = shard_files(tmp_path / "dataset"), len(server.seen)
        assert seen == 14
        write_table(tmp_path / "in" / "a.csv", [*urls[20:23], *urls[:14]])  # the same file, other content
        write_table(tmp_path / "in" / "b.csv", urls[14:20])
        made(config)
        assert sorted(server.seen[seen:]) == sorted(f"/photo/{number}" for number in range(14, 23))
    after = shard_files(tmp_path / "dataset")
    assert {name: after[name] for name in before} == before
    assert len(rows_of(config.root)) == 23
    assert verify_dataset(config.root).problems == ()
    assert made(config).num_shards == 0


def test_a_table_cut_otherwise_is_not_made_again(tmp_path):
    with image_server() as server:
        write_table(tmp_path / "in" / "a.csv", [f"{server.url}/photo/{number}" for number in range(12)])
        made(table_config(tmp_path / "dataset", tmp_path / "in"))
        seen = len(server.seen)
        report = made(table_config(tmp_path / "dataset", tmp_path / "in", rows_per_shard=5))
        assert (report.num_shards, len(server.seen)) == (0, seen)


def test_planned_shards_whose_table_changed_before_they_were_made_are_dropped_and_their_rows_made(tmp_path):
    with image_server() as server:
        urls = [f"{server.url}/photo/{number}" for number in range(12)]
        write_table(tmp_path / "in" / "a.csv", urls)
        config = table_config(tmp_path / "dataset", tmp_path / "in")
        made(config)
        (tmp_path / "dataset" / "train" / "000001.tar").unlink()
        write_table(tmp_path / "in" / "a.csv", [*urls, f"{server.url}/photo/new"])
        made(config)
    assert read_journal(config.root).dropped == {"train/000001"}
    assert len(rows_of(config.root)) == 13
    assert verify_dataset(config.root).problems == ()


# --- retry ----------------------------------------------------------------------------------------------------------


def test_retry_of_transient_failures_makes_only_those_rows_into_new_shards(tmp_path):
    with image_server() as server:
        paths = [*(f"photo/{number}" for number in range(9)), "flaky/503?n=1", "flaky/503?n=2", "status/404", "cut/1"]
        write_table(tmp_path / "in" / "a.csv", [f"{server.url}/{path}" for path in paths])
        config = table_config(tmp_path / "dataset", tmp_path / "in")
        made(config)
        assert counts_of(config.root) == {"cut_off": 1, "http_404": 1, "http_503": 2, "ok": 9}
        before, seen = shard_files(tmp_path / "dataset"), len(server.seen)
        report = made(config, Request(retry=Retry.TRANSIENT))
        assert sorted(server.seen[seen:]) == ["/cut/1", "/flaky/503?n=1", "/flaky/503?n=2"]
    assert report.num_shards > 0
    after = shard_files(tmp_path / "dataset")
    assert {name: after[name] for name in before} == before
    # flaky answers with bytes that are no image the second time: the latest line counts.
    assert counts_of(config.root) == {"cut_off": 1, "http_404": 1, "not_an_image": 2, "ok": 9}
    assert sum(counts_of(config.root).values()) == len(paths)
    assert verify_dataset(config.root).problems == ()


def test_retry_of_all_failures_takes_those_that_came_to_be_good(images, tmp_path):
    (images / "3.png").write_bytes(b"broken")
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    assert counts_of(config.root) == {"not_an_image": 1, "ok": 19}
    (images / "3.png").write_bytes(picture(3))
    assert made(config, Request(retry=Retry.TRANSIENT)).num_shards == 0
    report = made(config, Request(retry=Retry.ALL))
    assert (report.num_rows, report.num_shards) == (1, 1)
    assert counts_of(config.root) == {"ok": 20}
    assert read_journal(config.root).generations[1].cause is Cause.RETRY
    before = contents(tmp_path / "dataset")
    assert made(config, Request(retry=Retry.ALL)).num_shards == 0
    assert contents(tmp_path / "dataset") == before
    assert verify_dataset(config.root).problems == ()


def test_retry_again_and_again_follows_the_latest_line(images, tmp_path):
    for number in (3, 4, 5):
        (images / f"{number}.png").write_bytes(b"broken")
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    for number, left in ((3, 2), (4, 1), (5, 0)):
        (images / f"{number}.png").write_bytes(picture(number))
        made(config, Request(retry=Retry.ALL))
        assert counts_of(config.root).get("not_an_image", 0) == left
    assert counts_of(config.root) == {"ok": 20}
    assert len(rows_of(config.root)) == 20


# --- other filters --------------------------------------------------------------------------------------------------


def test_other_filters_are_refused_with_what_they_would_change_and_nothing_is_touched(images, tmp_path):
    add_images(images, range(20, 26), side=40)
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    before = contents(tmp_path / "dataset")
    with pytest.raises(ValueError, match=r"in all 6 rows would leave, up to 0 could come in\n.*--refilter"):
        made(replace(config, filters=FilterConfig(min_side=44)))
    assert contents(tmp_path / "dataset") == before


def test_refilter_remakes_only_the_shards_that_change_and_copies_what_stays(images, tmp_path):
    (images / "0.png").write_bytes(picture(0, side=40))
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    before, rows = shard_files(tmp_path / "dataset"), rows_of(config.root)
    small = next(key for key, facts in facts_of(config.root).items() if facts["original_width"] == 40)
    narrow = replace(config, filters=FilterConfig(min_side=44))
    report = made(narrow, Request(refilter=True))
    assert report.num_shards == 1
    assert rows_of(config.root) == {key: row for key, row in rows.items() if key != small}
    after = shard_files(tmp_path / "dataset")
    assert len(before.keys() - after.keys()) == len(after.keys() - before.keys()) == 4
    assert {name: after[name] for name in before.keys() & after.keys()} == {
        name: before[name] for name in before.keys() & after.keys()
    }
    assert counts_of(config.root) == {"ok": 19, "too_small": 1}
    assert verify_dataset(config.root).problems == ()
    assert made(narrow).num_shards == 0


def test_refilter_back_lets_rows_come_in_again(images, tmp_path):
    (images / "0.png").write_bytes(picture(0, side=40))
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    rows = rows_of(config.root)
    made(replace(config, filters=FilterConfig(min_side=44)), Request(refilter=True))
    made(config, Request(refilter=True))
    assert rows_of(config.root) == rows
    assert counts_of(config.root) == {"ok": 20}
    assert verify_dataset(config.root).problems == ()


def test_refiltered_and_retried_shards_go_together(images, tmp_path):
    (images / "0.png").write_bytes(picture(0, side=40))
    (images / "1.png").write_bytes(b"broken")
    (images / "2.png").write_bytes(b"broken")
    config = folder_config(tmp_path / "dataset", images, rows_per_shard=100)
    made(config)
    (images / "1.png").write_bytes(picture(1, side=40))
    made(config, Request(retry=Retry.ALL))
    narrow = replace(config, filters=FilterConfig(min_side=44))
    made(narrow, Request(refilter=True))
    assert counts_of(config.root) == {"not_an_image": 1, "ok": 17, "too_small": 2}
    (images / "2.png").write_bytes(picture(2))
    made(narrow, Request(retry=Retry.ALL))
    assert counts_of(config.root) == {"ok": 18, "too_small": 2}
    assert verify_dataset(config.root).problems == ()


# --- identity -------------------------------------------------------------------------------------------------------


def test_another_picture_is_another_dataset(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    with pytest.raises(ValueError, match=r"holds another dataset[^$]*identity.picture.quality is 95 there, 90 here"):
        made(replace(config, picture=PictureConfig(image_size=32, quality=90)))


def test_thumbnails_are_kept_for_four_rejected_pictures_of_a_shard_chosen_by_key(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images, rows_per_shard=100, filters=FilterConfig(min_side=49))
    made(config)
    for split in ("train", "validation"):
        lines = [line for line in lines_of_dataset(config.root) if str(line["shard"]).startswith(split)]
        shown = [line["key"] for line in lines if line["thumbnail"]]
        assert sorted(shown) == sorted(line["key"] for line in lines)[:4]


def test_a_source_that_lost_rows_changes_nothing(images, tmp_path):
    config = folder_config(tmp_path / "dataset", images)
    made(config)
    before = contents(tmp_path / "dataset")
    (images / "3.png").unlink()
    assert made(config).num_shards == 0
    assert contents(tmp_path / "dataset") == before
