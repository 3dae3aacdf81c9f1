"""What the encode benchmarks encode: packaged emoji at 64 px, or pictures like photographs at any size, and encoders.

Captions of emoji are the recipe's, two or three a row; a photograph has one of about a dozen words. Autoencoders have
random weights, which cost what trained ones cost, so the gate's floor is out of the way; the gate still does its work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from emoji import EMOJI_DATA

from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.conditioning.text import TextEncoderConfig
from ldm.interop.diffusers import save_autoencoder
from pipeline.encode import Device, LatentsConfig, Precision
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.transforms import ImageFormat, PictureConfig
from pipeline.latent_gate import GateConfig
from pipeline.sources.emoji import EmojiConfig
from pipeline.sources.folder import FolderConfig
from pipeline.store.manifest import load_manifest, shard_path
from pipeline.store.schema import Split
from tests.benchmarks.photos import make_photos
from tests.small_datasets import made

TEXT = TextEncoderConfig(max_tokens=24)
"""The emoji recipe's: the packaged MiniLM."""
UNJUDGED = GateConfig(min_psnr=-100.0, std_range=(0.0, 1e9), max_mean=1e9)
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
            gate=UNJUDGED,
            device=self.device,
            precision=self.precision,
            num_cpus=float(self.threads),
        )

    def _dataset(self, folder: Path) -> DatasetConfig:
        root, side = str(folder / "dataset"), self.image_size
        if self.pictures is Pictures.EMOJI:
            labels = -(-self.rows // 2)  # two styles of each
            source = EmojiConfig(max_labels=labels, holdout_share=0.0)
            picture = PictureConfig(image_size=side, image_format=ImageFormat.PNG)
            return DatasetConfig(root=root, source=source, picture=picture)
        _write_photos(folder / "photos", side, self.rows)
        photos = FolderConfig(folder=str(folder / "photos"), holdout_share=0.0)
        return DatasetConfig(root=root, source=photos, picture=PictureConfig(image_size=side))


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
