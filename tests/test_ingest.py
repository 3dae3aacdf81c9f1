"""Laws of ingest: any bytes give a picture or a named reason, and the ledger has a line for every row."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.storage import read_bytes
from pipeline.ingest.filters import FilterConfig, kept_captions, reject_shape
from pipeline.ingest.stage import DatasetConfig, IngestStage, plan_dataset
from pipeline.ingest.transforms import ImageFormat, Picture, decode, encode
from pipeline.sources.emoji import EmojiConfig
from pipeline.sources.folder import FolderConfig
from pipeline.sources.parquet import UrlParquetConfig
from pipeline.store.schema import Reject, Split
from pipeline.store.shards import read_rows
from tests.image_server import LOCAL, PHOTO, image_server


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def plain(colour, size=(8, 8), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def pixels(content: bytes, image_size: int = 8, background: str = "#ffffff") -> np.ndarray:
    picture = decode(content, image_size, background, 10**6)
    assert isinstance(picture, Picture), picture
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image).astype(int)


def reason(content: bytes, max_pixels: int = 10**6) -> str:
    outcome = decode(content, 8, "#ffffff", max_pixels)
    assert isinstance(outcome, Reject)
    return outcome.reason


# --- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image, expected",
    [
        (plain((10, 20, 30)), (10, 20, 30)),
        (plain(77, mode="L"), (77, 77, 77)),
        (plain(1, mode="1"), (255, 255, 255)),
        (plain((10, 20, 30)).quantize(4), (10, 20, 30)),
        (plain((90, 255), mode="LA"), (90, 90, 90)),
        (plain((255, 0, 0, 0), mode="RGBA"), (0, 0, 255)),
        (plain((255, 0, 0, 255), mode="RGBA"), (255, 0, 0)),
        (plain((200, 100, 0, 51), mode="RGBA"), (40, 20, 204)),  # a fifth of the colour, four fifths of blue
    ],
)
def test_decode_of_any_png_mode_is_rgb_over_the_background(image, expected):
    assert (pixels(encoded(image, "PNG"), background="#0000ff") == expected).all()


def test_decode_of_a_transparent_palette_shows_the_background():
    image = plain((10, 20, 30)).quantize(4)
    content = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    assert (pixels(content, background="#00ff00") == (0, 255, 0)).all()


def test_decode_of_sixteen_bits_keeps_the_upper_eight():
    levels = np.array([[0, 257 * 128], [257 * 200, 65535]], dtype=np.uint16).repeat(4, 0).repeat(4, 1)
    found = pixels(encoded(Image.fromarray(levels), "PNG"))[::4, ::4, 0]
    assert found.tolist() == [[0, 128], [200, 255]]
    dark = np.full((8, 8), 255, dtype=np.uint16)  # nearly black, not white
    assert pixels(encoded(Image.fromarray(dark), "PNG")).max() == 0


def test_decode_of_cmyk_is_rgb():
    assert np.abs(pixels(encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95)) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_the_image_upright_by_exif(orientation):
    upright = np.zeros((12, 8, 3), dtype=np.uint8)
    upright[2:6, :4] = 255
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.rot90(np.fliplr(a), 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(np.fliplr(a), -1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif), 8, "#000000", 10**6)
    assert (np.asarray(picture.image) == upright[2:10]).all()  # the centre square
    assert (picture.original_width, picture.original_height) == (8, 12)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (33, 32), (1000, 1000), (3, 5)])
def test_decode_gives_the_centre_square(size):
    image = Image.new("RGB", size, "red")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste((0, 0, 255), (left, top, left + side, top + side))
    found = pixels(encoded(image, "PNG"), image_size=16)
    assert found.shape == (16, 16, 3)
    assert (found[8, 8] == (0, 0, 255)).all()


def test_decode_of_a_large_jpeg_at_reduced_scale_is_the_full_decode_resized():
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    content = encoded(coarse.resize((1600, 1600), Image.Resampling.BICUBIC), "JPEG", quality=95)
    full = Image.open(io.BytesIO(content)).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    picture = decode(content, 64, "#ffffff", 10**7)
    assert (picture.original_width, picture.original_height) == (1600, 1600)
    error = np.square(np.asarray(picture.image).astype(int) - np.asarray(full).astype(int)).mean()
    assert 10 * np.log10(255**2 / error) > 45


def test_decode_draws_svg_with_its_transparency_over_the_background():
    square = (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="1" height="2" fill="#ff0000"/></svg>'
    )
    found = pixels(square, 8, "#00ff00")
    assert (found[:, :4] == (255, 0, 0)).all()
    assert (found[:, 4:] == (0, 255, 0)).all()


def test_decode_draws_a_long_svg_at_full_height():
    long = (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><rect width="40" height="20" fill="blue"/></svg>'
    )
    assert (pixels(long, 16) == (0, 0, 255)).all()


DRAWING = encoded(Image.fromarray(np.random.default_rng(2).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "PNG")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not_an_image"),
        (PHOTO[: len(PHOTO) // 2], "truncated"),
        (DRAWING[: len(DRAWING) // 2], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/hostname'/></svg>", "svg_refers_outside"),
        (b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "b">]><svg/>', "svg_refers_outside"),
        (b"<svg", "undecodable"),
        (
            b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 1"><rect width="9" height="1"/></svg>',
            "svg_too_long",
        ),
        (encoded(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "TIFF"), "unsupported_mode"),
    ],
)
def test_decode_of_bad_bytes_names_the_reason(content, expected):
    assert reason(content) == expected


def test_decode_refuses_a_bomb_before_decoding_it():
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 200_000
    assert reason(bomb) == "too_many_pixels"
    assert reason(encoded(plain("red", (40, 25)), "PNG"), max_pixels=999) == "too_many_pixels"
    assert isinstance(decode(encoded(plain("red", (40, 25)), "PNG"), 8, "#ffffff", 1000), Picture)


@pytest.mark.parametrize("original", [PHOTO, DRAWING], ids=["jpeg", "png"])
def test_decode_of_damaged_bytes_never_raises(original):
    generator = np.random.default_rng(3)
    for _ in range(300):
        damaged = bytearray(original)
        for place in generator.integers(0, len(damaged), 6):
            damaged[place] = generator.integers(0, 256)
        assert isinstance(
            decode(bytes(damaged[: generator.integers(1, len(damaged))]), 8, "#fff", 10**6), Picture | Reject
        )


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_encode_gives_equal_bytes_for_equal_pixels_and_png_loses_nothing(image_format):
    coarse = Image.fromarray(np.random.default_rng(4).integers(0, 255, (6, 6, 3), dtype=np.uint8))
    picture = coarse.resize((64, 64), Image.Resampling.BICUBIC)
    content = encode(picture, image_format, 90)
    assert content == encode(picture.copy(), image_format, 90)
    again = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    difference = np.abs(again - np.asarray(picture)).mean()
    assert difference == 0 if image_format is ImageFormat.PNG else 0 < difference < 5


# --- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height, expected", [(64, 64, None), (63, 900, "too_small"), (64, 193, "too_long"), (192, 64, None)]
)
def test_filter_of_shape_names_the_reason(width, height, expected):
    outcome = reject_shape(width, height, FilterConfig(min_side=64, max_aspect=3.0))
    assert (outcome.reason if outcome else None) == expected


def test_filter_of_captions_cleans_and_keeps_order():
    config = FilterConfig(min_caption_chars=3, max_caption_chars=10, max_captions=2)
    assert kept_captions([" a  cat ", "ab", "a cat", "x" * 11, "dog", "bird"], config) == ("a cat", "dog")
    assert kept_captions([" ", ""], config).reason == "no_caption"
    assert kept_captions(["ab"], config).reason == "caption_length"


@pytest.fixture
def server():
    with image_server() as running:
        yield running


# --- stage ----------------------------------------------------------------------------------------------------------


def ledger_of(root, split, name="000000") -> list[dict]:
    return pq.read_table(root / split.value / f"{name}.ledger.parquet").to_pylist()


def test_stage_writes_a_ledger_line_for_every_input_row(tmp_path, server):
    urls = [f"{server.url}/{path}" for path in ("photo", "status/404", "other", "photo", "cut", "third")]
    texts = ["a photo", "gone", "", "again", "cut", "x" * 1001]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"URL": urls, "TEXT": texts}), tmp_path / "in" / "part.parquet")
    source = UrlParquetConfig(folder=str(tmp_path / "in"), holdout_share=0.0)
    config = DatasetConfig(root=str(tmp_path / "out"), source=source, image_size=32, fetch=LOCAL)
    plan = plan_dataset(config)
    record = IngestStage(config)(plan.tasks[0])
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
        config = DatasetConfig(root=str(tmp_path / place), source=source, image_size=32, image_format=ImageFormat.PNG)
        plan = plan_dataset(config)
        records.append([IngestStage(config)(plan.tasks[i]) for i in (0, -1)])
    assert records[0] == records[1]
    assert records[0][0].counts == {"ok": 20}


def test_stage_rejects_small_images_under_their_reason(tmp_path):
    (tmp_path / "in").mkdir()
    for side in (16, 40):
        (tmp_path / "in" / f"{side}.png").write_bytes(encoded(plain("red", (side, side)), "PNG"))
        (tmp_path / "in" / f"{side}.txt").write_text(f"{side} pixels")
    source = FolderConfig(folder=str(tmp_path / "in"), holdout_share=0.0)
    config = DatasetConfig(root=str(tmp_path), source=source, image_size=32, filters=FilterConfig(min_side=32))
    record = IngestStage(config)(plan_dataset(config).tasks[0])
    assert record.counts == {"ok": 1, "too_small": 1}


def test_plan_identity_holds_no_place_and_everything_that_decides_the_rows(tmp_path):
    config = DatasetConfig(root="/somewhere", source=EmojiConfig(), image_size=64)
    identity = plan_dataset(config).identity
    assert plan_dataset(replace(config, root="s3://else/where", num_actors=3, num_cpus=2.0)).identity == identity
    for change in (
        {"image_size": 32},
        {"quality": 90},
        {"background": "#000000"},
        {"source": EmojiConfig(rows_per_shard=9)},
    ):
        assert plan_dataset(replace(config, **change)).identity != identity
    assert "somewhere" not in json.dumps(identity)


def test_plan_of_an_empty_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FolderConfig has no rows"):
        plan_dataset(DatasetConfig(root="x", source=FolderConfig(folder=str(tmp_path))))


def test_dataset_config_survives_yaml():
    config = DatasetConfig(root="x", source=FolderConfig(folder="y"), image_format=ImageFormat.WEBP, num_actors=2)
    assert DatasetConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 0}, "image_size must be above 0, got 0"),
        ({"quality": 101}, "quality must be from 1 to 100, got 101"),
        ({"num_actors": 0}, "num_actors must be at least 1, got 0"),
        ({"background": "#ffffff80"}, "background must be a colour without transparency"),
        ({"background": "white-ish"}, "unknown color specifier"),
    ],
)
def test_dataset_config_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(root="x", source=EmojiConfig(), **change)
