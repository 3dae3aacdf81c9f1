"""Laws of what a latent cache can hold: shapes, sizes, several crops, token ids, and columns beside the moments."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from ldm.conditioning.conditioner import TextUse
from ldm.conditioning.text import TextEncoderConfig
from pipeline import shard_cache
from pipeline.bucket_order import BucketOrder
from pipeline.crops import crop_boxes, cut, original_box
from pipeline.encoder import Encoder
from pipeline.images import decode_pixels, image_of_pixels
from pipeline.ingest.picture import PictureConfig, ResizeMode
from pipeline.latent_config import CropConfig, CropShape, LatentsConfig, TextStorage
from pipeline.latent_plan import plan_latents, token_reader
from pipeline.latent_report import write_latent_report
from pipeline.latent_shard import moments_name
from pipeline.latent_verification import verify_latents
from pipeline.loader import LatentLoader
from pipeline.order import Order, rank_positions, rows_at
from pipeline.store.manifest import Manifest, load_manifest, verify
from pipeline.store.schema import Split
from tests.tiny_latents import latents_config, write_autoencoder, write_dataset
from tests.varied_pictures import cache, cached_rows, dataset_in, loader_of, source_rows


@pytest.fixture(scope="module")
def short_side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short_side")
    dataset_in(folder, ResizeMode.SHORT_SIDE)
    return folder


# Buckets


BUCKETS = CropConfig(shape=CropShape.BUCKETS, bucket_step=8)


@pytest.fixture(scope="module")
def bucketed(short_side: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentsConfig, Manifest]:
    return cache(short_side, tmp_path_factory.mktemp("bucketed"), crop=BUCKETS, flip=True)


def test_buckets_every_tar_has_one_shape_and_every_row_its_nearest(short_side: Path, bucketed) -> None:
    config, manifest = bucketed
    facts = {key: json.loads(row["json"]) for key, row in source_rows(short_side).items()}
    seen: list[str] = []
    for tar in Path(config.root, "train").glob("*.tar"):
        width, height = map(int, tar.name.split(".")[1].split("x"))
        for row in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            assert row["moments.npy"].shape == (4, height // 2, width // 2)
            stored = facts[row["__key__"]]["width"] / facts[row["__key__"]]["height"]
            shapes = [tuple(shape["size"]) for shape in manifest.summary["shapes"]]
            assert abs(np.log(width / height / stored)) <= min(abs(np.log(w / h / stored)) for w, h in shapes) + 1e-9
            seen.append(row["__key__"])
    assert sorted(seen) == sorted(facts)
    assert len({tuple(shape["size"]) for shape in manifest.summary["shapes"]}) == 3
    assert verify(config.root) == []
    assert verify_latents(config, 1.0).problems == ()


def test_buckets_loader_gives_batches_of_one_shape_and_every_row_once(bucketed) -> None:
    config, manifest = bucketed
    num_rows = manifest.num_rows(Split.TRAIN)
    loader = loader_of(config, batch_size=1, num_streams=1)
    for epoch in range(3):
        batches = list(islice(loader.batches(epoch * num_rows), num_rows))
        assert len({batch.keys[0] for batch in batches}) == num_rows == loader.num_rows
    shapes = Counter(batch.moments.shape[1:] for batch in islice(loader_of(config).batches(), 40))
    assert len(shapes) == 3


@pytest.mark.parametrize("world", [2, 4])
def test_buckets_global_batches_are_the_same_on_every_number_of_ranks_and_from_any_start(bucketed, world: int) -> None:
    config, _ = bucketed
    alone = list(islice(loader_of(config).batches(), 15))
    ranks = [list(islice(loader_of(config, rank=rank, world=world).batches(20), 10)) for rank in range(world)]
    for number, whole in enumerate(alone[5:15]):
        assert sorted(whole.keys) == sorted(key for rank in ranks for key in rank[number].keys)
        assert sorted(whole.samples.tolist()) == sorted(s for rank in ranks for s in rank[number].samples.tolist())
        moments = {key: row for rank in ranks for key, row in zip(rank[number].keys, rank[number].moments, strict=True)}
        assert all(torch.equal(moments[key], row) for key, row in zip(whole.keys, whole.moments, strict=True))


def test_buckets_loader_refuses_to_begin_amid_a_batch(bucketed) -> None:
    with pytest.raises(ValueError, match="6 samples seen are no multiple of batch_size 4"):
        next(loader_of(bucketed[0]).batches(6))


def test_buckets_held_out_rows_come_in_spans_of_one_shape(bucketed) -> None:
    config, manifest = bucketed
    loader = loader_of(config, split=Split.VALIDATION, batch_size=1, num_streams=1)
    spans = list(loader.spans(0, loader.num_rows, 3))
    keys = [key for span in spans for key in loader.rows(*span).keys]
    assert sorted(keys) == sorted(source_rows_of_validation(config))
    assert [stop - start for start, stop in spans] != [3] * len(spans)
    with pytest.raises(ValueError, match="rows of one batch have one shape"):
        loader.rows(0, loader.num_rows)
    captions = loader.captions(0, loader.num_rows)
    assert len(set(captions)) == len(keys)


def source_rows_of_validation(config: LatentsConfig) -> list[str]:
    return list(source_rows(Path(config.dataset).parent, Split.VALIDATION))


def bucket_order(sizes: list[int], batch_size: int, num_streams: int = 2) -> BucketOrder:
    orders = [Order(shard_sizes=(size,), seed=5, num_streams=num_streams, block_rows=4) for size in sizes]
    return BucketOrder(buckets=tuple(orders), batch_size=batch_size, seed=5)


@pytest.mark.parametrize("sizes", [[7, 12, 40], [1, 100], [3, 3, 3], [64, 64], [2, 1, 1, 50, 9]])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_bucket_order_takes_each_bucket_in_step_and_each_of_its_batches_once(sizes, batch_size) -> None:
    order = bucket_order(sizes, batch_size)
    taken = Counter[int]()
    for number in range(5 * sum(sizes) // batch_size):
        place = order.place_of(number * batch_size)
        assert place.first == taken[place.bucket] * batch_size  # in its own order, none left out
        taken[place.bucket] += 1
        epoch = number * batch_size // sum(sizes)
        for bucket, size in enumerate(sizes):
            due = (epoch * size / batch_size, (epoch + 2) * size / batch_size)
            assert due[0] - 1 <= taken[bucket] <= due[1] + 1


def test_bucket_order_rows_come_once_before_any_comes_twice() -> None:
    order = bucket_order([7, 12, 40], 4)
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for number in range(60):
        place = order.place_of(4 * number)
        rows = rows_at(order.buckets[place.bucket], rank_positions(place.first, place.first + 4, 0, 1))
        seen[place.bucket] += zip(rows.shards.tolist(), rows.rows.tolist(), strict=True)
    for bucket, size in enumerate((7, 12, 40)):
        assert len(set(seen[bucket][:size])) == size
        assert len(set(seen[bucket][size : 2 * size])) == size


def test_bucket_order_of_one_bucket_is_that_of_its_rows() -> None:
    order = bucket_order([37], 4)
    assert [order.place_of(start) for start in (0, 4, 7, 400)] == [(0, 0), (0, 4), (0, 7), (0, 400)]


def test_buckets_under_a_limit_of_copies_are_read_as_without_one(
    bucketed, s3, s3_root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes of one shard are deleted one by one, and their common text apart from them."""
    monkeypatch.setattr("pipeline.loader.WINDOW_ROWS", 4)
    monkeypatch.setattr(shard_cache, "ROOM_SECONDS", 0.5)
    config, manifest = bucketed
    s3.client().put(config.root, s3_root.removeprefix("s3://"), recursive=True)
    remote = replace(loader_of(config).config, root=s3_root, cache_folder=str(tmp_path))
    sizes = [sum(shard.files[name].num_bytes for name in shard.files) for shard in manifest.shards_of(Split.TRAIN)]
    limited = LatentLoader(load_manifest(s3_root), replace(remote, cache_bytes=int(0.8 * sum(sizes))))
    here = loader_of(config)
    for one, other in zip(islice(limited.batches(), 40), islice(here.batches(), 40), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.moments, other.moments)


# Where crops lie


@pytest.mark.parametrize("resize", list(ResizeMode))
def test_crops_are_said_in_pixels_of_the_original(tmp_path: Path, resize: ResizeMode) -> None:
    """The picture's colours tell where a pixel came from; so do the columns."""
    dataset_in(tmp_path, resize)
    shape = CropShape.BUCKETS if resize is ResizeMode.BUCKETS else CropShape.SQUARE
    config, _ = cache(tmp_path, tmp_path, image_size=32, crop=CropConfig(shape=shape, bucket_step=8), flip=True)
    picture = PictureConfig(image_size=32, resize=resize, bucket_step=8)
    for row in source_rows(tmp_path).values():
        facts = json.loads(row["json"])
        pixels = decode_pixels(row["png"])
        size = (32, 32) if shape is CropShape.SQUARE else (facts["width"], facts["height"])
        for box in crop_boxes(row["__key__"], facts["width"], facts["height"], size, 3):
            crop = cut(pixels, box, size)
            left, top, right, bottom = original_box(box, facts, picture)
            for share in (0.3, 0.5, 0.7):
                y, x = int(share * size[1]), int(share * size[0])
                if tuple(crop[y, x]) == (255, 255, 255):  # padding
                    continue
                at_x = (left + (x + 0.5) / size[0] * (right - left)) / facts["original_width"]
                at_y = (top + (y + 0.5) / size[1] * (bottom - top)) / facts["original_height"]
                assert abs(crop[y, x, 0] / 255 - at_x) < 0.03
                assert abs(crop[y, x, 1] / 255 - at_y) < 0.03
    told = {row["__key__"]: json.loads(row["json"]) for row in cached_rows(config)}
    for batch in islice(loader_of(config, batch_size=1, num_streams=1).batches(), 40):
        fact = told[batch.keys[0]]
        top, left, height, width = batch.columns["crop"][0].tolist()
        assert batch.columns["size"][0].tolist() == fact["size"]
        mirrored = [top, fact["size"][1] - left - width, height, width]
        assert fact["crops"][0] in (
            pytest.approx([top, left, height, width], abs=1e-3),
            pytest.approx(mirrored, abs=1e-3),
        )


# Several crops


def test_crops_several_are_encoded_and_drawn(short_side: Path, tmp_path: Path) -> None:
    config, _ = cache(short_side, tmp_path, crop=CropConfig(count=3), flip=True)
    rows = {row["__key__"]: row for row in cached_rows(config)}
    encoder, sources = Encoder(config), source_rows(short_side)
    key = next(key for key, row in sources.items() if json.loads(row["json"])["width"] == 64)
    pixels = decode_pixels(sources[key]["png"])
    for crop, left in enumerate((0, 16, 32)):
        expected = encoder.encode(image_of_pixels([pixels[:, left : left + 32]]))[0].numpy()
        np.testing.assert_allclose(np.load(io.BytesIO(rows[key][moments_name(crop)])), expected, atol=2e-3)
    seen = Counter[tuple[str, float]]()
    for batch in islice(loader_of(config).batches(), 200):
        for place, name in enumerate(batch.keys):
            stored = [
                np.load(io.BytesIO(rows[name][moments_name(crop, flipped)]))
                for crop in range(3)
                for flipped in (False, True)
            ]
            found = [number for number, form in enumerate(stored) if np.array_equal(form, batch.moments[place].numpy())]
            crops = json.loads(rows[name]["json"])["crops"]
            assert any(batch.columns["crop"][place, 2:].tolist() == pytest.approx(crops[f // 2][2:]) for f in found)
            seen[name, float(batch.columns["crop"][place, 1])] += 1
    assert len({left for name, left in seen if name == key}) == 3  # from either side, the ends meet
    assert verify_latents(config, 0.5).problems == ()


def test_crops_of_squares_are_refused_where_all_would_be_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset")
    write_autoencoder(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match="3 crops of one would be the same; .* picture.resize short-side"):
        plan_latents(latents_config(tmp_path, crop=CropConfig(count=3)))


def test_square_crops_of_pictures_in_buckets_are_refused(tmp_path: Path) -> None:
    dataset_in(tmp_path, ResizeMode.BUCKETS)
    with pytest.raises(ValueError, match="come in buckets, the flattest 24 px high: take crop.shape buckets"):
        plan_latents(latents_config(tmp_path, image_size=32))
    plan_latents(latents_config(tmp_path, image_size=16))


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"crop": CropConfig(shape=CropShape.BUCKETS, bucket_step=12)}, "multiple of crop.bucket_step 12, got 32"),
        ({"crop": CropConfig(more_sizes=(64,))}, "image_size 64 is more than the dataset's 32"),
        ({"crop": CropConfig(more_sizes=(15,))}, "multiple of 2, got 15"),
        ({"crop": CropConfig(shape=CropShape.BUCKETS, bucket_step=16)}, "step 16 at 32 px are only the square"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(short_side: Path, fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_latents(latents_config(short_side, **({"image_size": 32} | fields)))


# Several sizes


def test_sizes_lie_side_by_side_and_the_loader_reads_one(short_side: Path, tmp_path: Path) -> None:
    config, manifest = cache(short_side, tmp_path, crop=CropConfig(more_sizes=(16, 24)))
    with pytest.raises(ValueError, match="made at 16, 24, 32 px, several: name one with image_size"):
        loader_of(config)
    with pytest.raises(ValueError, match="not image_size 20"):
        loader_of(config, image_size=20)
    for size in (16, 24, 32):
        loader = loader_of(config, image_size=size)
        assert loader.num_rows == manifest.num_rows(Split.TRAIN)
        assert next(loader.batches()).moments.shape == (4, 4, size // 2, size // 2)
    encoder, source = Encoder(config), next(iter(source_rows(short_side).values()))
    width, height = Image.open(io.BytesIO(source["png"])).size
    box = crop_boxes("row", width, height, (16, 16), 1)[0]
    small = Image.open(io.BytesIO(source["png"])).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC, box=box)
    stored = np.load(io.BytesIO(cached_rows(config, ".16.tar")[0]["moments.npy"]))
    expected = encoder.encode(image_of_pixels([np.asarray(small)]))[0].numpy()
    np.testing.assert_allclose(stored, expected, atol=2e-3)
    assert "Shapes" in Path(write_latent_report(config)).read_text()


# Token ids only


def test_online_text_is_embedded_at_loading_as_it_would_have_been_at_encoding(short_side: Path, tmp_path: Path) -> None:
    embedded, _ = cache(short_side, tmp_path / "embedded")
    online, manifest = cache(short_side, tmp_path / "online", text_storage=TextStorage.ONLINE)
    assert manifest.identity["text_storage"] == "online"
    with pytest.raises(ValueError, match="holds token ids, not embeddings: its loader needs a reader of tokens"):
        loader_of(online)
    read_tokens = token_reader(manifest, TextEncoderConfig(max_tokens=16), TextUse.FROZEN, torch.device("cpu"))
    theirs, ours = loader_of(embedded), loader_of(online, read_tokens=read_tokens)
    for one, other in zip(islice(theirs.batches(), 12), islice(ours.batches(), 12), strict=True):
        assert one.keys == other.keys
        assert one.condition.states is not None
        assert other.condition.states is not None
        torch.testing.assert_close(other.condition.states, one.condition.states, atol=2e-3, rtol=0)
        assert torch.equal(one.condition.mask, other.condition.mask)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.null_condition(2).states, theirs.null_condition(2).states, atol=2e-3, rtol=0)
    sizes = [sum(f.stat().st_size for f in Path(c.root).rglob("*.text.safetensors")) for c in (online, embedded)]
    assert sizes[0] < sizes[1] / 10
    assert verify_latents(online, 1.0).problems == ()


def test_online_text_is_the_same_to_the_bit_from_any_start(short_side: Path, tmp_path: Path) -> None:
    config, manifest = cache(short_side, tmp_path, text_storage=TextStorage.ONLINE)
    read_tokens = token_reader(manifest, TextEncoderConfig(max_tokens=16), TextUse.FROZEN, torch.device("cpu"))
    whole = list(islice(loader_of(config, read_tokens=read_tokens).batches(), 90))
    for start in (1, 37, 80):
        late = next(loader_of(config, read_tokens=read_tokens).batches(4 * start))
        assert late.condition.states.numpy().tobytes() == whole[start].condition.states.numpy().tobytes()
