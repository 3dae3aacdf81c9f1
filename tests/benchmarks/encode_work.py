"""What the encode benchmarks encode: packaged emoji at 64 px, or pictures like photographs at any size, and encoders.

Captions of emoji are the recipe's, two or three a row; a photograph has one of about a dozen words. Autoencoders have
random weights, which cost what trained ones cost, so the gate's floor is out of the way; the gate still does its work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch
from emoji import EMOJI_DATA

from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.conditioning.text import TextEncoderConfig
from ldm.interop.diffusers import save_autoencoder
from ldm.precision import Precision
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.transforms import ImageFormat, PictureConfig
from pipeline.latent_config import Device, LatentsConfig
from pipeline.latent_gate import GateConfig
from pipeline.sources.emoji import EmojiConfig
from pipeline.sources.folder import FolderConfig
from pipeline.store.manifest import load_manifest, shard_path
from pipeline.store.schema import Split
from tests.benchmarks.photos import make_photos
from tests.small_datasets import made

TEXT = TextEncoderConfig(max_tokens=24)
"""The emoji recipe's: the packaged MiniLM."""
FULL_SHARD_ROWS = 1024
"""Rows of a shard by default. Ours here are smaller, and the gate decodes the same share of them."""
NUM_SHARDS = 2
PHOTO_ASPECT = 1.5


class Pictures(StrEnum):
    """What is encoded."""

    EMOJI = "emoji"
    """Drawings of the emoji recipe, PNG of 64 px, two or three captions a row."""
    PHOTOS = "photos"
    """Crops of pictures with the spectrum of photographs, JPEG of quality 95, one caption a row."""


class Network(StrEnum):
    """Which autoencoder encodes, with random weights."""

    EMOJI_F4 = "emoji_f4"
    KL_F8 = "kl_f8"

    @property
    def config(self) -> AutoencoderConfig:
        """Its shape."""
        return zoo.kl_f8() if self is Network.KL_F8 else zoo.emoji_f4()


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One kind of work of the benchmark: what is encoded, by what, and in which batches."""

    pictures: Pictures
    image_size: int
    rows: int
    network: Network
    batch_size: int = 32
    precision: Precision = Precision.FP32
    device: Device = Device.CPU
    threads: int = 2

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.network.value} {self.pictures.value} {self.image_size} px"

    def make(self, home: Path) -> LatentsConfig:
        """Make dataset and autoencoder in a folder of their own; return the config of their latents."""
        folder = home / self.name.replace(" ", "-")
        made(self._dataset(folder))
        torch.manual_seed(0)
        save_autoencoder(Autoencoder(self.network.config), str(folder / "autoencoder"))
        return LatentsConfig(
            root=str(folder / "latents"),
            dataset=str(folder / "dataset"),
            autoencoder=str(folder / "autoencoder"),
            text=TEXT,
            image_size=self.image_size,
            batch_size=self.batch_size,
            gate=self._gate(),
            device=self.device,
            precision=self.precision,
            num_cpus=float(self.threads),
        )

    @property
    def _shard_rows(self) -> int:
        return self.rows // NUM_SHARDS

    def _gate(self) -> GateConfig:
        decoded = max(1, round(GateConfig().rows * self._shard_rows / FULL_SHARD_ROWS))
        return GateConfig(rows=decoded, min_psnr=-100.0, std_range=(0.0, 1e9), max_mean=1e9)

    def _dataset(self, folder: Path) -> DatasetConfig:
        root, side = str(folder / "dataset"), self.image_size
        if self.pictures is Pictures.EMOJI:
            labels = -(-self.rows // 2)  # two styles of each
            source = EmojiConfig(max_labels=labels, holdout_share=0.0, rows_per_shard=self._shard_rows)
            picture = PictureConfig(image_size=side, image_format=ImageFormat.PNG)
            return DatasetConfig(root=root, source=source, picture=picture)
        _write_photos(folder / "photos", side, self.rows)
        photos = FolderConfig(folder=str(folder / "photos"), holdout_share=0.0, rows_per_shard=self._shard_rows)
        return DatasetConfig(root=root, source=photos, picture=PictureConfig(image_size=side))


def cpu_works() -> list[Work]:
    """Return what is encoded on two cores; the last line of a benchmark speaks of the first."""
    small = Network.EMOJI_F4
    return [
        Work(pictures=Pictures.PHOTOS, image_size=256, rows=256, network=small),
        Work(pictures=Pictures.EMOJI, image_size=64, rows=1024, network=small),
    ]


def gpu_works() -> list[Work]:
    """Return what is encoded on a GPU; the last line of a benchmark speaks of the first."""
    work = Work(
        pictures=Pictures.PHOTOS,
        image_size=256,
        rows=8192,
        network=Network.KL_F8,
        batch_size=64,
        precision=Precision.BF16,
        device=Device.CUDA,
    )
    return [work, replace(work, image_size=512, rows=2048, batch_size=32)]


def tars_of(dataset: str) -> list[str]:
    """Return the paths of a dataset's tars, in order."""
    shards = load_manifest(dataset).shards_of(Split.TRAIN)
    return [shard_path(dataset, Split.TRAIN, shard.name, "tar") for shard in shards if shard.num_rows]


def _write_photos(folder: Path, side: int, num_rows: int) -> None:
    """Write pictures a little larger than the crop, each with its caption beside it."""
    megapixels = PHOTO_ASPECT * (1.1 * side) ** 2 / 1e6
    dice = random.Random(0)
    names = sorted(fact["en"].strip(":").replace("_", " ") for fact in EMOJI_DATA.values())
    for photo in make_photos(folder, [megapixels], num_rows):
        first, second, third = dice.sample(names, 3)
        photo.path.with_suffix(".txt").write_text(f"a photograph of {first} and {second} in front of {third}")
