"""Laws of semantic maps: a map goes where its picture goes, and a row without a fit one is left out with its reason."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.picture import ImageFormat, PictureConfig, ResizeMode
from pipeline.latent_config import ColumnsConfig
from pipeline.sources.folder import FolderConfig
from pipeline.store.schema import NO_CLASS_PIXEL
from tests.small_datasets import counts_of, lines_of_dataset, made, rows_of
from tests.tiny_latents import write_autoencoder
from tests.varied_pictures import cache, loader_of

COLOURS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0]], np.uint8)
SIZES = ((96, 64), (64, 96), (64, 64), (128, 64))
TURNED = 6
"""The EXIF orientation of a picture whose stored rows are its columns."""


def write_pair(folder: Path, name: str, size: tuple[int, int], seed: int, *, is_turned: bool = False) -> None:
    """Write a picture of 16-pixel blocks in four colours, and the map that says which block is of which."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(f"blocks {name}")
    blocks = np.random.default_rng(seed).integers(0, 4, (size[1] // 16, size[0] // 16))
    numbers = np.kron(blocks, np.ones((16, 16), int)).astype(np.uint8)
    palette = Image.fromarray(numbers)
    palette.putpalette(bytes(range(255, -1, -1)) * 3)  # its colours say nothing of its numbers
    palette.save(folder / f"{name}_map.png")
    picture = Image.fromarray(COLOURS[numbers])
    if not is_turned:
        picture.save(folder / f"{name}.png")
        return
    exif = Image.Exif()
    exif[0x0112] = TURNED
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / f"{name}.png", exif=exif)


def dataset(folder: Path, resize: ResizeMode) -> Path:
    """Make the dataset of a folder's pictures and maps."""
    picture = PictureConfig(
        image_size=32, image_format=ImageFormat.PNG, resize=resize, bucket_step=16, background="#ffffff"
    )
    source = FolderConfig(folder=str(folder / "pictures"), rows_per_shard=4, holdout_share=0.3, map_suffix="_map.png")
    made(DatasetConfig(root=str(folder / "dataset"), source=source, picture=picture))
    return folder / "dataset"


def image_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("resize", ResizeMode)
def test_map_shows_the_class_of_what_the_finished_picture_shows(tmp_path: Path, resize: ResizeMode) -> None:
    for number, size in enumerate(SIZES):
        write_pair(tmp_path / "pictures", f"plain{number}", size, number)
        write_pair(tmp_path / "pictures", f"turned{number}", size, number + 10, is_turned=True)
    root = dataset(tmp_path, resize)
    assert counts_of(root) == {"ok": 8}  # a map is no picture of its own
    for row in rows_of(root).values():
        picture, numbers = image_of(row["png"]).astype(int), image_of(row["map.png"])
        assert numbers.shape == picture.shape[:2]
        nearest = np.abs(picture[:, :, None] - COLOURS).sum(-1)
        is_inside = nearest.min(-1) < 30  # a pixel over a border between blocks is of both
        assert is_inside.mean() > 0.2
        assert np.array_equal(numbers[is_inside], nearest.argmin(-1)[is_inside])
        is_ground = (picture == 255).all(-1)
        assert (numbers[is_ground] == NO_CLASS_PIXEL).all()
        assert is_ground.any() == (resize is ResizeMode.PAD and numbers.max() == NO_CLASS_PIXEL)


def test_picture_without_a_fit_map_is_left_out_with_its_reason(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for number in range(4):
        write_pair(pictures, f"p{number}", (64, 64), number)
    (pictures / "p0_map.png").unlink()
    Image.new("L", (32, 64)).save(pictures / "p1_map.png")
    Image.new("RGB", (64, 64)).save(pictures / "p2_map.png")
    content = (pictures / "p3_map.png").read_bytes()
    (pictures / "p3_map.png").write_bytes(content[: len(content) // 2])
    write_pair(pictures, "good", (64, 64), 9)
    root = dataset(tmp_path, ResizeMode.CENTRE_CROP)
    assert counts_of(root) == {"ok": 1, "no_map": 1, "bad_map": 3}
    details = {str(line["detail"]) for line in lines_of_dataset(root) if line["status"] == "bad_map"}
    assert {"L 32x64 for a picture of 64x64", "RGB 64x64 for a picture of 64x64"} < details


def test_map_reaches_the_batch_and_padding_is_no_class(tmp_path: Path) -> None:
    for number in range(12):
        write_pair(tmp_path / "pictures", f"p{number}", SIZES[number % 4], number)
    dataset(tmp_path, ResizeMode.PAD)
    write_autoencoder(tmp_path / "autoencoder")
    config, _ = cache(tmp_path, tmp_path, columns=ColumnsConfig(map_member="map.png"))
    maps = [batch.columns["semantic_map"] for batch in islice(loader_of(config).batches(), 6)]
    assert torch.cat(maps).unique().tolist() == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["map", ".png"])
def test_map_suffix_that_names_no_map_or_every_picture_is_refused(suffix: str) -> None:
    with pytest.raises(ValueError, match="map_suffix is a name's own end, such as _map.png"):
        FolderConfig(folder="x", map_suffix=suffix)
