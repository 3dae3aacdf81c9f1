"""Your own pictures on a laptop: a folder with captions beside the pictures, through the emoji recipe's small networks.

`HOME/pictures` (or `--source.folder`) holds pictures with `NAME.txt` beside each, or `metadata.jsonl` / `metadata.csv`.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.recipes import emoji
from jobs.wiring.evaluate import EvaluateConfig
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig
from jobs.wiring.sample import SampleConfig
from jobs.wiring.shard_dataset import ShardDatasetConfig
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import PreviewConfig, TrainLdmConfig
from ldm.storage import join
from ldm.training.tracking_config import TrackingConfig
from pipeline.ingest.duplicates import DuplicateConfig
from pipeline.sources.folder import FolderConfig

PROMPTS = ("a picture",)
"""Drawn where nobody gives `--prompts`."""


def shard_dataset(home: str) -> ShardDatasetConfig:
    """Pictures of a folder with their captions, 64 px on white, exact copies left out."""
    config = emoji.shard_dataset(home)
    source = FolderConfig(folder=join(home, "pictures"))
    return replace(config, source=source, duplicates=DuplicateConfig(exact=True), tracking=_renamed(config.tracking))


def train_autoencoder(home: str) -> TrainAutoencoderConfig:
    """The small KL autoencoder, minutes on two cores."""
    config = emoji.train_autoencoder(home)
    return replace(config, tracking=_renamed(config.tracking))


def precompute_latents(home: str) -> PrecomputeLatentsConfig:
    """Moments of every picture and MiniLM tokens of every caption."""
    config = emoji.precompute_latents(home)
    return replace(config, autoencoder=_autoencoder(home), tracking=_renamed(config.tracking))


def train_ldm(home: str) -> TrainLdmConfig:
    """The small denoiser on two DeepSpeed ZeRO-2 ranks."""
    config = emoji.train_ldm(home)
    preview = PreviewConfig(prompts=PROMPTS, sampler=config.preview.sampler)
    return replace(config, autoencoder=_autoencoder(home), preview=preview, tracking=_renamed(config.tracking))


def evaluate(home: str) -> EvaluateConfig:
    """Reconstruction, denoising loss and Fréchet distance on held-out pictures."""
    config = emoji.evaluate(home)
    return replace(config, tracking=_renamed(config.tracking))


def sample(home: str) -> SampleConfig:
    """A grid of prompts x guidance scales; say `--prompts` "..." "..."."""
    config = emoji.sample(home)
    return replace(config, prompts=PROMPTS, tracking=_renamed(config.tracking))


def _autoencoder(home: str) -> str:
    return join(home, "autoencoder", "model")


def _renamed(tracking: TrackingConfig) -> TrackingConfig:
    return replace(tracking, experiment="folder", model_name="text-to-image")
