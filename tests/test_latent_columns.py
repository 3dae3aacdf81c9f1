"""Laws of the columns beside the moments: what a crop shows of a row is what a batch holds, mirrored with it."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.conditioning.masks import random_mask
from ldm.types import LatentBatch
from pipeline.crops import crop_boxes, cut
from pipeline.encoder import Encoder
from pipeline.images import decode_pixels, image_of_pixels, image_suffix
from pipeline.ingest.picture import ResizeMode
from pipeline.latent_columns import ColumnsBuilder
from pipeline.latent_config import ColumnsConfig, CropConfig
from pipeline.latent_plan import plan_latents
from pipeline.latent_shard import masked_name, moments_name
from pipeline.latent_verification import verify_latents
from pipeline.store.schema import Row, Split
from pipeline.store.shards import write_shard
from tests.tiny_latents import carry_out, image_row, latents_config, write_autoencoder, write_dataset
from tests.varied_pictures import cache, cached_rows, dataset_in, loader_of, source_rows


@pytest.fixture(scope="module")
def short_side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short_side")
    dataset_in(folder, ResizeMode.SHORT_SIDE)
    return folder


def test_columns_class_and_boxes_reach_the_batch_as_the_crop_shows_them(short_side: Path, tmp_path: Path) -> None:
    columns = ColumnsConfig(
        class_attribute="kind", classes=("b", "a"), boxes_attribute="layout", box_classes=("edge", "corner")
    )
    config, manifest = cache(short_side, tmp_path, columns=columns, flip=True)
    assert manifest.identity["columns"]["classes"] == ["b", "a"]
    attributes = {key: json.loads(row["json"])["attributes"] for key, row in source_rows(short_side).items()}
    lefts = set()
    for batch in islice(loader_of(config).batches(), 30):
        for place, key in enumerate(batch.keys):
            assert int(batch.columns["class_id"][place]) == ("b", "a").index(attributes[key]["kind"])
            boxes = batch.columns["boxes"][place]
            assert boxes.shape == (32, 5)
            assert (boxes[1:, 0] == -1).all()
            number, left, top, right, bottom = boxes[0].tolist()
            assert number == 1
            assert (top, bottom) == pytest.approx((0.5, 1), abs=0.02)  # half a pixel of an odd margin
            assert (left, right) in (pytest.approx((0.5, 1), abs=0.02), pytest.approx((0, 0.5), abs=0.02))
            lefts.add(left < 0.25)
    assert lefts == {True, False}


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"class_attribute": "kind", "classes": ("x", "a")}, "row [0-9a-f]{24}: class 'b' is not one of a, x"),
        ({"class_attribute": "kind"}, "class '[ab]' is not a number, or give the classes' names"),
        ({"boxes_attribute": "kind"}, r"a box is \[left, top, right, bottom, class\] .* got '[ab]'"),
    ],
)
def test_columns_that_are_not_what_the_config_says_are_refused(short_side, tmp_path, columns, named) -> None:
    with pytest.raises(ValueError, match=named):
        cache(short_side, tmp_path, columns=ColumnsConfig(**columns))


def test_columns_attribute_that_no_row_has_is_refused_before_anything_is_encoded(short_side, tmp_path) -> None:
    for columns in (ColumnsConfig(class_attribute="knid"), ColumnsConfig(boxes_attribute="knid")):
        with pytest.raises(ValueError, match="no row has an attribute 'knid'; their attributes: kind, layout"):
            cache(short_side, tmp_path / columns.digest(), columns=columns)
    assert not list(tmp_path.rglob("*.tar"))


def test_columns_rows_without_a_class_have_none() -> None:
    builder = ColumnsBuilder(ColumnsConfig(class_attribute="kind"))
    facts = [{"width": 8, "height": 8, "attributes": {"kind": 3}}, {"width": 8, "height": 8}]
    builder.check(("a", "b"), facts)
    told = [builder.add(row, "ab"[row], fact, [(0.0, 0.0, 8.0, 8.0)]) for row, fact in enumerate(facts)]
    assert [fact["class"] for fact in told] == [3, -1]


def test_columns_are_those_of_the_very_crop_whose_moments_come(short_side: Path, tmp_path: Path) -> None:
    """Moments tell which crop was drawn and whether it is mirrored; everything else must agree."""
    columns = ColumnsConfig(boxes_attribute="layout", box_classes=("corner",), low_res_factor=4)
    config, _ = cache(short_side, tmp_path, columns=columns, crop=CropConfig(count=3), flip=True)
    rows = {row["__key__"]: row for row in cached_rows(config)}
    told = {key: json.loads(row["json"]) for key, row in rows.items()}
    forms = {
        (key, crop, flipped): np.load(io.BytesIO(row[moments_name(crop, flipped)]))
        for key, row in rows.items()
        for crop in range(3)
        for flipped in (False, True)
    }
    drawn = set()
    for batch in islice(loader_of(config).batches(), 60):
        for place, key in enumerate(batch.keys):
            moments = batch.moments[place].numpy()
            alike = [form for form in forms if form[0] == key and np.array_equal(forms[form], moments)]
            if len(alike) != 1:  # crops of a square picture are one
                continue
            _, crop, flipped = alike[0]
            drawn.add((crop, flipped))
            top, left, height, width = told[key]["crops"][crop]
            left = told[key]["size"][1] - left - width if flipped else left
            assert batch.columns["crop"][place].tolist() == pytest.approx([top, left, height, width], abs=1e-3)
            small = np.load(io.BytesIO(rows[key]["low_res.npy" if not crop else f"low_res{crop}.npy"]))
            small = small[..., ::-1] if flipped else small
            assert np.array_equal(np.float32(small) / 127.5 - 1, batch.columns["low_res"][place].numpy())
            layout = [
                [number, 1 - right, y, 1 - x, bottom] if flipped else [number, x, y, right, bottom]
                for number, x, y, right, bottom in told[key]["boxes"][crop]
            ]
            found = batch.columns["boxes"][place]
            assert found[: len(layout)].flatten().tolist() == pytest.approx(np.float32(layout).flatten().tolist())
            assert (found[len(layout) :, 0] == -1).all()
    assert len(drawn) == 6


def test_columns_low_resolution_copy_is_that_of_the_crop(short_side: Path, tmp_path: Path) -> None:
    config, _ = cache(
        short_side, tmp_path, columns=ColumnsConfig(low_res_factor=4), crop=CropConfig(count=2), flip=True
    )
    sources = source_rows(short_side)
    for batch in islice(loader_of(config).batches(), 10):
        assert batch.columns["low_res"].shape == (4, 3, 8, 8)
        for place, key in enumerate(batch.keys):
            pixels = decode_pixels(sources[key]["png"])
            height, width = pixels.shape[:2]
            small = [
                np.asarray(Image.fromarray(np.ascontiguousarray(cut(pixels, box, (32, 32)))).resize((8, 8), 3))
                for box in crop_boxes(key, width, height, (32, 32), 2)
            ]
            forms = [image_of_pixels([form])[0] for one in small for form in (one, one[:, ::-1])]
            assert any(torch.equal(form, batch.columns["low_res"][place]) for form in forms)


def test_columns_masked_moments_are_those_of_the_image_with_grey_under_the_mask(
    short_side: Path, tmp_path: Path
) -> None:
    config, _ = cache(short_side, tmp_path, columns=ColumnsConfig(num_masks=2, mask_seed=3), flip=True)
    encoder, sources = Encoder(config), source_rows(short_side)
    rows = {row["__key__"]: row for row in cached_rows(config)}
    key = min(rows)
    pixels = decode_pixels(sources[key]["png"])
    image = image_of_pixels([cut(pixels, crop_boxes(key, *pixels.shape[1::-1], (32, 32), 1)[0], (32, 32))])
    dice = np.random.default_rng([3, int(key, 16)])
    masks = [random_mask(dice, 32, 32) for _ in range(2)]
    assert not np.array_equal(*masks)
    for number, mask in enumerate(masks):
        hidden = image * torch.from_numpy(~mask).float()
        expected = encoder.encode(hidden)[0].numpy()
        np.testing.assert_allclose(np.load(io.BytesIO(rows[key][masked_name(number, 0, False)])), expected, atol=2e-3)
    drawn = set()
    for batch in islice(loader_of(config).batches(), 60):
        check_masks(batch, rows)
        drawn |= {
            mask.numpy().tobytes() for name, mask in zip(batch.keys, batch.columns["mask"], strict=True) if name == key
        }
    assert len(drawn) == 4  # two masks, plain and mirrored
    assert verify_latents(config, 0.5).problems == ()


def check_masks(batch: LatentBatch, rows: dict[str, Row]) -> None:
    assert batch.columns["mask"].shape == (4, 1, 16, 16)
    for place, key in enumerate(batch.keys):
        found = False
        for number in range(2):
            mask = np.load(io.BytesIO(rows[key]["mask.npy" if not number else "mask1.npy"]))
            for flipped in (False, True):
                moments = np.load(io.BytesIO(rows[key][masked_name(number, 0, flipped)]))
                same = np.array_equal(moments, batch.columns["masked_moments"][place].numpy())
                shown = mask[:, ::-1] if flipped else mask
                found |= same and np.array_equal(shown, batch.columns["mask"][place, 0].numpy())
                plain = np.load(io.BytesIO(rows[key][moments_name(0, flipped)]))
                assert not same or np.array_equal(plain, batch.moments[place].numpy())
        assert found


def test_columns_semantic_map_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", sizes=(6,))
    write_autoencoder(tmp_path / "autoencoder")
    for split, numbers in ((Split.TRAIN, range(6)), (Split.VALIDATION, range(6, 10))):
        rows = []
        for number in numbers:
            row = image_row(number)
            pixels = decode_pixels(row["png"])
            file = io.BytesIO()
            Image.fromarray(pixels[..., 0] // 32).save(file, "PNG")
            rows.append(row | {"map.png": file.getvalue()})
        write_shard(str(tmp_path / "dataset"), split, "000000", rows)
    config, _ = cache(tmp_path, tmp_path, image_size=16, columns=ColumnsConfig(map_member="map.png"), flip=True)
    reds = {row["__key__"]: decode_pixels(row["png"])[..., 0] // 32 for row in source_rows(tmp_path).values()}
    flips, stored = set(), {row["__key__"]: row for row in cached_rows(config)}
    for batch in islice(loader_of(config).batches(), 12):
        for place, key in enumerate(batch.keys):
            shown = batch.columns["semantic_map"][place].numpy()
            plain = np.load(io.BytesIO(stored[key]["moments.npy"]))
            is_plain = np.array_equal(plain, batch.moments[place].numpy())
            assert np.array_equal(shown, reds[key] if is_plain else reds[key][:, ::-1])
            flips.add(is_plain)
    assert flips == {True, False}
    lacking = latents_config(tmp_path, root=str(tmp_path / "more"), columns=ColumnsConfig(map_member="seg.png"))
    with pytest.raises(ValueError, match="has no member 'seg.png'"):
        carry_out(plan_latents(lacking))


def test_image_suffix_is_never_the_map() -> None:
    assert image_suffix(("json", "map.png", "png")) == "png"


def test_masks_hide_between_a_twentieth_and_six_tenths_and_differ() -> None:
    masks = [random_mask(np.random.default_rng(seed), 48, 64) for seed in range(200)]
    shares = [mask.mean() for mask in masks]
    assert 0.05 <= min(shares) < 0.15
    assert 0.5 < max(shares) <= 0.6
    assert len({mask.tobytes() for mask in masks}) == 200
    assert masks[0].shape == (48, 64)
    assert np.array_equal(masks[3], random_mask(np.random.default_rng(3), 48, 64))
