"""Every kind of bad input in one dataset: each ends in the ledger under its reason, and the rows beside it come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.ingest.filters import FilterConfig
from pipeline.store.verification import verify_dataset
from tests.bad_images import BAD_IMAGES
from tests.small_datasets import counts_of, folder_config, lines_of_dataset, made, picture, rows_of

GOOD = {
    "plain": b"a plain caption",
    "nul": b"a\x00b cat",
    "lone surrogate": b"surrogate \xed\xa0\x80 in utf-8",
    "broken utf-8": b"caf\xe9 in latin-1",
    "control characters": b"bell \x07 and escape \x1b[31m",
    "right to left": "قطة على سجادة".encode(),
    "override": "gnp.\u202egnp a".encode(),
    "zero width": "ca\u200bt".encode(),
    "byte order mark": b"\xef\xbb\xbfa cat",
    "emoji": "👩‍🚀 in space".encode(),
    "html": b"<script>alert('x')</script> a cat",
    "address": b"write to cat@example.com about the cat",
    "carriage returns": b"a cat\r\nanother caption\r\n",
    "decomposed": "cafe\u0301".encode(),
}
BAD = {
    "empty": (b"", "no_caption"),
    "spaces": (b" \t\r\n ", "no_caption"),
    "only an address": (b"cat@example.com", "no_caption"),
    "one megabyte": (b"cat " * 250_000, "caption_length"),
    "one endless word": (b"a" * 1_000_000, "caption_length"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    images = folder / "images"
    images.mkdir()
    for number, (name, bad) in enumerate(BAD_IMAGES.items()):
        (images / f"image {name}.jpg").write_bytes(bad.content)
        (images / f"image {name}.txt").write_text(f"bad image number {number}")
    captions = GOOD | {name: caption for name, (caption, _) in BAD.items()}
    for number, (name, caption) in enumerate(captions.items()):
        (images / f"caption {name}.png").write_bytes(picture(number))
        (images / f"caption {name}.txt").write_bytes(caption)
    filters = FilterConfig(max_caption_chars=500, max_aspect=1e6)
    made(folder_config(folder / "dataset", images, rows_per_shard=50, filters=filters))
    return folder / "dataset"


@pytest.fixture(scope="module")
def line_of(dataset: Path) -> dict[str, dict[str, object]]:
    """The ledger's lines by the names of their files."""
    lines = lines_of_dataset(dataset)
    return {json.loads(str(line["attributes"]))["name"].rpartition(".")[0]: line for line in lines}


def test_every_input_has_its_line_and_every_good_one_its_row(dataset, line_of):
    assert len(line_of) == len(BAD_IMAGES) + len(GOOD) + len(BAD)
    assert len(BAD_IMAGES) >= 60
    kept = {line["key"] for line in line_of.values() if line["status"] == "ok"}
    assert set(rows_of(dataset)) == kept
    assert sum(counts_of(dataset).values()) == len(line_of)
    assert verify_dataset(str(dataset)).problems == ()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_ends_under_its_reason(line_of, name):
    assert line_of[f"image {name}"]["status"] == BAD_IMAGES[name].outcome


@pytest.mark.parametrize("name", BAD)
def test_bad_caption_ends_under_its_reason(line_of, name):
    assert line_of[f"caption {name}"]["status"] == BAD[name][1]


@pytest.mark.parametrize("name", GOOD)
def test_odd_caption_is_kept_as_text_that_can_be_read(dataset, line_of, name):
    line = line_of[f"caption {name}"]
    assert line["status"] == "ok"
    row = rows_of(dataset)[str(line["key"])]
    text, facts = row["txt"].decode(), json.loads(row["json"])
    assert text == facts["captions"][0] == line["caption"]
    assert text.isprintable() or name == "emoji"
    assert "example.com" not in text
    assert "<" not in text
