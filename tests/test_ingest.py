"""Laws of ingest: every input row has a line, a shard is the same bytes whenever it is made, bad rows stop nothing."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.storage import read_bytes
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import plan_dataset
from pipeline.ingest.filters import FilterConfig
from pipeline.ingest.rules import Rule
from pipeline.ingest.stage import IngestStage
from pipeline.ingest.transforms import ImageFormat, PictureConfig
from pipeline.sources.emoji import EmojiConfig
from pipeline.sources.folder import FolderConfig
from pipeline.sources.tables import UrlTableConfig
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows
from tests.image_server import LOCAL, image_server

PNG_32 = PictureConfig(image_size=32, image_format=ImageFormat.PNG)


def png(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def server():
    with image_server() as running:
        yield running


def ledger_of(root, split, name="000000") -> list[dict]:
    return pq.read_table(root / split.value / f"{name}.ledger.parquet").to_pylist()


def test_stage_writes_a_ledger_line_for_every_input_row(tmp_path, server):
    urls = [f"{server.url}/{path}" for path in ("photo", "status/404", "other", "photo", "cut", "third")]
    texts = ["a photo", "gone", "", "again", "cut", "x" * 1001]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"URL": urls, "TEXT": texts}), tmp_path / "in" / "part.parquet")
    source = UrlTableConfig(folder=str(tmp_path / "in"), holdout_share=0.0)
    config = DatasetConfig(root=str(tmp_path / "out"), source=source, picture=PictureConfig(image_size=32), fetch=LOCAL)
    plan = plan_dataset(config)
    record = IngestStage(config, config.root)(plan.tasks[0])
    lines = ledger_of(tmp_path / "out", Split.TRAIN)
    assert [line["status"] for line in lines] == [
        "ok",
        "http_404",
        "no_caption",
        "duplicate_key",
        "cut_off",
        "caption_length",
    ]
    assert record.counts == dict.fromkeys(sorted(line["status"] for line in lines), 1)
    assert record.num_rows == 1
    (row,) = read_rows(str(tmp_path / "out" / "train" / "000000.tar"))
    facts = json.loads(row["json"])
    assert row["txt"] == b"a photo"
    assert (facts["url"], facts["original_width"], facts["width"]) == (urls[0], 64, 32)
    assert facts["sha256"] == hashlib.sha256(row["jpg"]).hexdigest()
    assert record.files["tar"].sha256 == hashlib.sha256(read_bytes(str(tmp_path / "out/train/000000.tar"))).hexdigest()


def test_stage_run_twice_gives_the_same_bytes(tmp_path):
    records = []
    for place in ("a", "b"):
        source = EmojiConfig(rows_per_shard=20)
        config = DatasetConfig(root=str(tmp_path / place), source=source, picture=PNG_32)
        plan = plan_dataset(config)
        records.append([IngestStage(config, config.root)(plan.tasks[i]) for i in (0, -1)])
    assert records[0] == records[1]
    assert records[0][0].counts == {"ok": 20}


def test_stage_rejects_small_images_under_their_reason(tmp_path):
    (tmp_path / "in").mkdir()
    for side in (16, 40):
        (tmp_path / "in" / f"{side}.png").write_bytes(png(side))
        (tmp_path / "in" / f"{side}.txt").write_text(f"{side} pixels")
    source = FolderConfig(folder=str(tmp_path / "in"), holdout_share=0.0)
    config = DatasetConfig(root=str(tmp_path), source=source, picture=PNG_32, filters=FilterConfig(min_side=32))
    record = IngestStage(config, config.root)(plan_dataset(config).tasks[0])
    assert record.counts == {"ok": 1, "too_small": 1}


def test_stage_writes_what_it_knows_of_each_row_into_its_line(tmp_path, server):
    rows = {
        "URL": [f"{server.url}/photo", f"{server.url}/other", f"{server.url}/status/410", None],
        "TEXT": ["call +1 202 555 0143 for <b>this</b> cat", "unsafe", "gone", "nowhere"],
        "punsafe": [0.1, 0.9, 0.2, 0.3],
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in" / "part.parquet")
    source = UrlTableConfig(folder=str(tmp_path / "in"), attribute_columns=("punsafe",), holdout_share=0.0)
    filters = FilterConfig(rules=(Rule(column="punsafe", at_most=0.5),))
    config = DatasetConfig(root=str(tmp_path / "out"), source=source, picture=PNG_32, filters=filters, fetch=LOCAL)
    IngestStage(config, config.root)(plan_dataset(config).tasks[0])
    good, unsafe, gone, nowhere = ledger_of(tmp_path / "out", Split.TRAIN)
    assert [line["source_row"] for line in (good, unsafe, gone, nowhere)] == [0, 1, 2, 3]
    assert [line["status"] for line in (unsafe, gone, nowhere)] == ["filter_punsafe", "http_410", "no_image"]
    assert sorted(server.seen) == ["/photo", "/status/410"]  # what a filter knows from the listing is never fetched
    (row,) = read_rows(str(tmp_path / "out" / "train" / "000000.tar"))
    assert row["txt"].decode() == good["caption"]
    assert "555" not in good["caption"]
    assert "<b>" not in good["caption"]
    assert sum(json.loads(good["scrubbed"]).values()) >= 2
    assert good["caption_chars"] == len(good["caption"])
    photo = json.loads(row["json"])
    assert good["payload_sha256"] == photo["payload_sha256"]
    assert good["num_bytes"] == photo["num_bytes"] > 0
    assert (good["original_width"], good["original_height"]) == (64, 64)
    assert json.loads(good["attributes"]) == {"punsafe": 0.1}
    assert len(good["pixel_sha256"]) == 64
    assert good["perceptual_hash"] is not None


def test_plan_identity_holds_no_place_and_everything_that_decides_the_rows(tmp_path):
    config = DatasetConfig(root=str(tmp_path / "somewhere"), source=EmojiConfig(), picture=PictureConfig(image_size=64))
    identity = plan_dataset(config).identity
    for change in (
        {"root": str(tmp_path / "elsewhere"), "max_actors": 3, "num_cpus": 2.0},
        {"source": EmojiConfig(rows_per_shard=9)},
    ):
        assert plan_dataset(replace(config, **change)).identity == identity
    for change in (
        {"picture": PictureConfig(image_size=32)},
        {"picture": PictureConfig(image_size=64, quality=90)},
        {"source": EmojiConfig(holdout_share=0.1)},
    ):
        assert plan_dataset(replace(config, **change)).identity != identity
    assert "somewhere" not in json.dumps(identity)


def test_plan_of_an_empty_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FolderConfig has no rows"):
        plan_dataset(DatasetConfig(root=str(tmp_path / "out"), source=FolderConfig(folder=str(tmp_path))))


def test_dataset_config_survives_yaml():
    filters = FilterConfig(rules=(Rule(column="punsafe", at_most=0.5),))
    config = DatasetConfig(
        root="x", source=FolderConfig(folder="y"), picture=PNG_32, filters=filters, min_actors=1, max_actors=2
    )
    assert DatasetConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_cpus": 0}, "num_cpus must be above 0, got 0"),
        ({"min_actors": 0}, "min_actors must be at least 1, got 0"),
        ({"min_actors": 3, "max_actors": 2}, "max_actors must be at least min_actors 3, got 2"),
    ],
)
def test_dataset_config_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(root="x", source=EmojiConfig(), **change)
