"""Named runs: for each job, the recipes it knows; the first is the default.

A recipe is a function of the home folder that returns the job's whole configuration.
"""

from __future__ import annotations

from collections.abc import Callable

from jobs.recipes import emoji, folder, laion, paper, reshard, scenes, shipped
from jobs.wiring.evaluate import EvaluateConfig
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig
from jobs.wiring.sample import SampleConfig
from jobs.wiring.shard_dataset import ShardDatasetConfig
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import TrainLdmConfig

SHARD_DATASET: dict[str, Callable[[str], ShardDatasetConfig]] = {
    "emoji": emoji.shard_dataset,
    "folder": folder.shard_dataset,
    "laion": laion.shard_dataset,
    "reshard": reshard.shard_dataset,
    "scenes": scenes.shard_dataset,
    "shipped": shipped.shard_dataset,
    "things": scenes.shard_things,
}
TRAIN_AUTOENCODER: dict[str, Callable[[str], TrainAutoencoderConfig]] = {
    "emoji": emoji.train_autoencoder,
    "folder": folder.train_autoencoder,
    "laion": laion.train_autoencoder,
    "small_f4": shipped.small_f4,
    "small_f8": shipped.small_f8,
    **paper.TRAIN_AUTOENCODER,
}
PRECOMPUTE_LATENTS: dict[str, Callable[[str], PrecomputeLatentsConfig]] = {
    "emoji": emoji.precompute_latents,
    "folder": folder.precompute_latents,
    "laion": laion.precompute_latents,
    "scenes": scenes.precompute_latents,
    "things": scenes.precompute_things,
    **paper.PRECOMPUTE_LATENTS,
}
TRAIN_LDM: dict[str, Callable[[str], TrainLdmConfig]] = {
    "emoji": emoji.train_ldm,
    "folder": folder.train_ldm,
    "laion": laion.train_ldm,
    **scenes.TRAIN_LDM,
    **paper.TRAIN_LDM,
}
EVALUATE: dict[str, Callable[[str], EvaluateConfig]] = {
    "emoji": emoji.evaluate,
    "folder": folder.evaluate,
    "laion": laion.evaluate,
}
SAMPLE: dict[str, Callable[[str], SampleConfig]] = {
    "emoji": emoji.sample,
    "folder": folder.sample,
    "laion": laion.sample,
    **scenes.SAMPLE,
}
