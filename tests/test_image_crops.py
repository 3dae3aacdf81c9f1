"""Which square of a picture trains the autoencoder: drawn ones hang on the seed alone, held-out ones are whole."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.wiring.train_autoencoder import check_inputs
from pipeline.images import ImageBatch, ImageCropConfig, ImageLoader, ImageLoaderConfig, decode_pixels, image_of_pixels
from pipeline.store.manifest import load_manifest
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows
from tests.tiny_latents import write_dataset
from tests.tiny_stage1 import KL, stage1_config

SIDE = 48
DRAWN = ImageCropConfig(image_size=16, min_side=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, image_size=SIDE)
    return folder


def loader(dataset: Path, crop: ImageCropConfig, rank: int = 0, world: int = 1, **fields: object) -> ImageLoader:
    settings: dict[str, object] = {"batch_size": 4, "num_streams": 4, "block_rows": 3, **fields}
    config = ImageLoaderConfig(root=str(dataset), crop=crop, **settings)  # type: ignore[arg-type]
    return ImageLoader(load_manifest(str(dataset)), config, rank, world)


def pixels_of(dataset: Path, split: Split) -> dict[str, np.ndarray]:
    tars = sorted((dataset / split.value).glob("*.tar"))
    return {row["__key__"]: decode_pixels(row["png"]) for tar in tars for row in read_rows(str(tar))}


def by_position(batches: list[ImageBatch]) -> dict[int, bytes]:
    return {
        int(batch.samples[row]): batch.images[row].numpy().tobytes()
        for batch in batches
        for row in range(len(batch.keys))
    }


@pytest.mark.parametrize("max_cached_bytes", [0, 1 << 30])
def test_drawn_squares_do_not_depend_on_ranks_start_or_cache(dataset: Path, max_cached_bytes: int) -> None:
    whole = by_position(list(islice(loader(dataset, DRAWN).batches(), 10)))
    assert len(set(whole.values())) == 40  # a picture's second square is another one
    shares = [
        batch
        for rank in range(2)
        for batch in islice(loader(dataset, DRAWN, rank, 2, max_cached_bytes=max_cached_bytes).batches(4), 9)
    ]
    assert by_position(shares) == {position: row for position, row in whole.items() if position >= 4}
    assert by_position(list(islice(loader(dataset, DRAWN, seed=1).batches(), 10))) != whole


def test_drawn_squares_of_one_side_are_windows_of_their_pictures_or_their_mirror_images(dataset: Path) -> None:
    pictures = pixels_of(dataset, Split.TRAIN)
    crop = ImageCropConfig(image_size=16, min_side=16, max_side=16)
    corners = set()
    for batch in islice(loader(dataset, crop).batches(), 9):
        for key, image in zip(batch.keys, batch.images, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(pictures[key], (16, 16), axis=(0, 1))
            forms = [image_of_pixels([form]) for form in _rounded(image.numpy())]
            wanted = [((form[0].numpy() + 1) * 127.5).round().astype(np.uint8) for form in forms]
            found = [np.argwhere((windows == form).all(axis=(2, 3, 4))) for form in wanted]
            (place,) = [tuple(place) for places in found for place in places]
            corners.add(place)
    assert len(corners) > 25  # of 36 draws from 33 x 33 corners
    assert min(map(min, corners)) <= 4
    assert max(map(max, corners)) >= 28


def _rounded(image: np.ndarray) -> list[np.ndarray]:
    pixels = ((image + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    return [pixels, pixels[:, ::-1]]


def test_sides_are_drawn_evenly_by_their_logarithm_and_squares_stay_inside() -> None:
    side = 120
    rows, columns = np.mgrid[0:side, 0:side]
    ramp = np.stack([2 * columns, 2 * rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)  # colours say the place
    crop = ImageCropConfig(image_size=15, min_side=15)
    spans = []
    for position in range(400):
        square = crop.drawn(ramp, side, 0, position).astype(float)
        assert square.shape == (15, 15, 3)
        across, down = square[7, -2, 0] - square[7, 1, 0], square[-2, 7, 1] - square[1, 7, 1]
        assert across == pytest.approx(down, abs=3)  # a square, not stretched
        spans.append(across / 2 * 15 / 12)
    octaves = np.histogram(np.log2(np.array(spans) / 15), bins=[-0.2, 1, 2, 3.2])[0]
    assert octaves.sum() == 400
    assert octaves.min() > 133 - 4 * math.sqrt(400 * 2 / 9)  # four deviations


def test_a_long_picture_is_drawn_from_anywhere_and_held_out_at_its_centre() -> None:
    long = np.zeros((20, 60, 3), np.uint8)
    long[:, :, 0] = np.arange(60) * 4
    crop = ImageCropConfig(image_size=10, min_side=20, max_side=20)
    means = [crop.drawn(long, 20, 0, position)[..., 0].mean() for position in range(60)]
    assert min(means) < 60
    assert max(means) > 170
    assert crop.centred(long, 20)[..., 0].mean() == pytest.approx(4 * 29.5, abs=1)


def test_held_out_rows_are_whole_pictures_shrunk(dataset: Path) -> None:
    batch = loader(dataset, DRAWN, split=Split.VALIDATION).rows(0, 4)
    pictures = pixels_of(dataset, Split.VALIDATION)
    for key, image in zip(batch.keys, batch.images, strict=True):
        small = Image.fromarray(pictures[key]).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image.numpy(), image_of_pixels([np.asarray(small)])[0].numpy())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 32, "min_side": 16}, "min_side 16 can't be shrunk to image_size 32"),
        ({"min_side": 16}, "min_side 16 can't be shrunk to image_size 0"),
        ({"max_side": 16}, "max_side 16 needs a min_side from 1 to it, got 0"),
        ({"image_size": 8, "min_side": 32, "max_side": 16}, "max_side 16 needs a min_side from 1 to it, got 32"),
        ({"image_size": -1}, "sides can't be negative"),
    ],
)
def test_impossible_squares_are_refused_with_their_numbers(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageCropConfig(**fields)


def test_pictures_of_any_shape_are_held_out_at_their_centre_square() -> None:
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[..., 0] = np.arange(60) * 4
    crop = ImageCropConfig(image_size=20)
    for picture in (wide, wide.transpose(1, 0, 2)):
        small = crop.centred(np.ascontiguousarray(picture), 48)
        assert small.shape == (20, 20, 3)
        assert small[..., 0].mean() == pytest.approx(4 * 29.5, abs=1)


def test_pictures_that_are_too_small_are_refused_with_their_size() -> None:
    small = np.zeros((12, 30, 3), np.uint8)
    with pytest.raises(ValueError, match="a picture of 12 px is too small for squares of 16 px"):
        DRAWN.centred(small, 48)
    with pytest.raises(ValueError, match="a picture of 12 px is too small for squares of 16 px"):
        DRAWN.drawn(small, 48, 0, 0)


def test_stage_1_refuses_squares_larger_than_the_pictures_and_sides_that_do_not_divide(
    dataset: Path, tmp_path: Path
) -> None:
    config = replace(stage1_config(tmp_path, KL), dataset=str(dataset))
    with pytest.raises(ValueError, match="pictures of 48 px are too small for image_size 64 and min_side 64"):
        check_inputs(replace(config, crop=ImageCropConfig(image_size=64, min_side=64)))
    with pytest.raises(ValueError, match="images of 15 px are no multiple of the autoencoder's factor 2"):
        check_inputs(replace(config, crop=ImageCropConfig(image_size=15)))


def test_a_training_on_drawn_squares_has_another_identity_and_one_without_keeps_its_own(
    dataset: Path, tmp_path: Path
) -> None:
    plain, manifest = stage1_config(tmp_path, KL), load_manifest(str(dataset))
    drawn = replace(plain, crop=DRAWN)
    assert "crop" not in plain.identity(manifest)
    assert "crop" not in plain.to_dict()
    assert drawn.identity(manifest)["crop"] == DRAWN.to_dict()
    assert drawn.loader(Split.TRAIN).crop == DRAWN
