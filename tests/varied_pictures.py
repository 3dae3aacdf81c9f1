"""A dataset of pictures of several shapes that tell where their pixels came from, and latents of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.ingest.picture import ImageFormat, PictureConfig, ResizeMode
from pipeline.latent_config import LatentsConfig
from pipeline.latent_plan import plan_latents
from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.store.manifest import Manifest, load_manifest
from pipeline.store.schema import Row, Split
from pipeline.store.shards import read_rows
from tests.small_datasets import folder_config, made
from tests.tiny_latents import carry_out, latents_config, write_autoencoder

SIZES = ((64, 48), (48, 64), (40, 40), (80, 40), (44, 76))
NUM_IMAGES = 25


def gradient(width: int, height: int) -> Image.Image:
    """Return a picture whose red tells the column and whose green the row, in shares of its sides."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    red, green = np.meshgrid(x, y)
    return Image.fromarray(np.uint8(np.stack([red * 255, green * 255, np.full_like(red, 99)], -1).round()))


def add_pictures(folder: Path) -> None:
    """Write pictures of several shapes, each with a class and a box around its right lower quarter."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(NUM_IMAGES):
        width, height = SIZES[number % len(SIZES)]
        dice = np.random.default_rng(number)
        pixels = np.asarray(gradient(width, height)).astype(int) + dice.integers(0, 4, (height, width, 3))
        Image.fromarray(np.uint8(pixels.clip(0, 255))).save(folder / f"{number}.png")
        box = [width / 2, height / 2, width, height, "corner"]
        line = {"file_name": f"{number}.png", "text": f"picture {number}", "kind": "ab"[number % 2], "layout": [box]}
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def dataset_in(folder: Path, resize: ResizeMode) -> None:
    """Make a dataset of such pictures as `folder/dataset`, and a random autoencoder beside it."""
    add_pictures(folder / "pictures")
    picture = PictureConfig(
        image_size=32, image_format=ImageFormat.PNG, resize=resize, bucket_step=8, min_side=8, upscales=False
    )
    made(folder_config(folder / "dataset", folder / "pictures", rows_per_shard=9, picture=picture))
    write_autoencoder(folder / "autoencoder")


def cache(folder: Path, root: Path, **fields: object) -> tuple[LatentsConfig, Manifest]:
    config = latents_config(folder, root=str(root / "latents"), **({"image_size": 32} | fields))
    return config, carry_out(plan_latents(config))


def loader_of(config: LatentsConfig, **fields: object) -> LatentLoader:
    read_tokens = fields.pop("read_tokens", None)
    rank, world = fields.pop("rank", 0), fields.pop("world", 1)
    settings: dict[str, object] = {"root": config.root, "batch_size": 4, "num_streams": 4, "block_rows": 3}
    loader_config = LoaderConfig(**(settings | fields))  # type: ignore[arg-type]
    return LatentLoader(load_manifest(config.root), loader_config, rank, world, read_tokens)  # type: ignore[arg-type]


def source_rows(folder: Path, split: Split = Split.TRAIN) -> dict[str, Row]:
    tars = sorted((folder / "dataset" / split.value).glob("*.tar"))
    return {row["__key__"]: row for tar in tars for row in read_rows(str(tar))}


def cached_rows(config: LatentsConfig, suffix: str = ".tar", split: Split = Split.TRAIN) -> list[Row]:
    tars = sorted(path for path in Path(config.root, split.value).iterdir() if path.name.endswith(suffix))
    return [row for tar in tars for row in read_rows(str(tar))]
