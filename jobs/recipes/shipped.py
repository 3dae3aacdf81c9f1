"""How the shipped autoencoders are made: `HOME/pictures` as infra/shipped_autoencoders/gather_pictures.py lays it out.

python -m jobs.shard_dataset shipped --home HOME
python -m jobs.train_autoencoder small_f4 --home HOME
python -m jobs.train_autoencoder small_f8 --home HOME
"""

from __future__ import annotations

from dataclasses import replace

from jobs.command_line import kept_here
from jobs.recipes import emoji
from jobs.wiring.shard_dataset import ShardDatasetConfig
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from ldm.autoencoder import zoo
from ldm.autoencoder.model import AutoencoderConfig
from ldm.storage import join
from ldm.training.local_launch import LaunchConfig
from ldm.training.loop import LoopConfig
from ldm.training.optim import Decay, OptimConfig
from ldm.training.reconstruction_config import ReconstructionConfig
from pipeline.images import ImageCropConfig
from pipeline.ingest.transforms import ImageFormat, PictureConfig
from pipeline.sources.folder import FolderConfig


def shard_dataset(home: str) -> ShardDatasetConfig:
    """Drawings in four styles, clip art and photographs at 128 px; all drawings of a label are held out together."""
    config = emoji.shard_dataset(home)
    return replace(
        config,
        source=FolderConfig(folder=join(home, "pictures", "train"), has_folders_whole=True),
        picture=PictureConfig(image_size=128, image_format=ImageFormat.PNG),
    )


def small_f4(home: str) -> TrainAutoencoderConfig:
    """The shipped autoencoder of factor 4."""
    return _training(home, "small_f4", zoo.small_f4())


def small_f8(home: str) -> TrainAutoencoderConfig:
    """The shipped autoencoder of factor 8."""
    return _training(home, "small_f8", zoo.small_f8())


def _training(home: str, name: str, network: AutoencoderConfig) -> TrainAutoencoderConfig:
    """Squares of 64 to 128 px, shrunk to 64: the same drawing as a whole and as a part, sharp and soft."""
    config = emoji.train_autoencoder(home)
    return replace(
        config,
        root=join(home, name),
        record=join(kept_here(home), "records", name),
        autoencoder=network,
        loss=ReconstructionConfig(perceptual_weight=0.1, perceptual_rows=1, adversarial_weight=0.0),
        optim=OptimConfig(lr=1.5e-3, beta1=0.9, beta2=0.99, weight_decay=0.0, warmup_samples=1_000, decay=Decay.COSINE),
        crop=ImageCropConfig(image_size=64, min_side=64),
        loop=LoopConfig(
            total_samples=80_000, log_every=800, validate_every=16_000, picture_every=40_000, checkpoint_every=8_000
        ),
        launch=LaunchConfig(num_workers=1, cpus_per_worker=1),
        batch_size=8,
    )
