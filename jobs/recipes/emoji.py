"""The embedded default: emoji drawings and their names, small enough for a laptop's CPU, through the whole pipeline.

64-pixel drawings in two styles → 16x16x4 latents → a 4.6 M parameter denoiser on MiniLM tokens, two ZeRO-2 ranks.
"""

from __future__ import annotations

from jobs.command_line import kept_here
from jobs.wiring.evaluate import EvaluateConfig
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig
from jobs.wiring.sample import SampleConfig
from jobs.wiring.shard_dataset import ShardDatasetConfig
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import PreviewConfig, TrainLdmConfig
from ldm.autoencoder import zoo as autoencoders
from ldm.conditioning.text import TextEncoderConfig
from ldm.diffusion.schedule import ScheduleConfig
from ldm.evaluation.protocol import EvaluationProtocol
from ldm.samplers.sample import SamplerConfig
from ldm.samplers.steppers import StepperKind
from ldm.storage import join
from ldm.training.diffusion_task import ObjectiveConfig
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.local_launch import LaunchConfig
from ldm.training.loop import LoopConfig
from ldm.training.optim import Decay, OptimConfig
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.tracking_config import TrackingConfig
from ldm.unet import zoo as unets
from pipeline.generate_config import BulkConfig
from pipeline.ingest.transforms import ImageFormat, PictureConfig
from pipeline.sources.emoji import EmojiConfig

AUTOENCODER = "shipped:small_f4"
"""What encodes and decodes; `train_autoencoder` trains another one, `HOME/autoencoder/model`."""
TEXT = TextEncoderConfig(max_tokens=24)
SAMPLER = SamplerConfig(stepper=StepperKind.DPM_SOLVER_PP_2M, num_steps=20)
PROMPTS = (
    "red heart, twemoji style",
    "red heart, openmoji style",
    "green apple, twemoji style",
    "cat face, twemoji style",
    "grinning face, twemoji style",
    "sun with face, openmoji style",
    "a yellow star",
    "a blue circle",
)


def shard_dataset(home: str) -> ShardDatasetConfig:
    """7,906 emoji drawings in two styles, 64 px on white, held out by label."""
    return ShardDatasetConfig(
        root=join(home, "dataset"),
        record=_record(home, "dataset"),
        source=EmojiConfig(),
        picture=PictureConfig(image_size=64, image_format=ImageFormat.PNG),
        tracking=_tracking(home),
    )


def train_autoencoder(home: str) -> TrainAutoencoderConfig:
    """A KL autoencoder of factor 4 with ST-LPIPS and PatchGAN terms, minutes on two cores."""
    return TrainAutoencoderConfig(
        root=join(home, "autoencoder"),
        record=_record(home, "autoencoder"),
        dataset=join(home, "dataset"),
        autoencoder=autoencoders.emoji_f4(),
        loss=ReconstructionConfig(
            perceptual_weight=0.15,
            perceptual_rows=2,
            adversarial_weight=0.05,
            adversarial_start=7_920,
            discriminator_channels=24,
            discriminator_layers=2,
        ),
        optim=OptimConfig(lr=2e-3, beta1=0.5, beta2=0.9, weight_decay=0.0, warmup_samples=500, decay=Decay.COSINE),
        ema=EmaConfig(half_life_samples=20_000),
        loop=LoopConfig(
            total_samples=8_800, log_every=320, validate_every=2_400, picture_every=4_800, checkpoint_every=1_600
        ),
        launch=LaunchConfig(num_workers=2, cpus_per_worker=1),
        tracking=_tracking(home),
        batch_size=16,
    )


def precompute_latents(home: str) -> PrecomputeLatentsConfig:
    """Moments of every drawing and MiniLM tokens of every name."""
    return PrecomputeLatentsConfig(
        root=join(home, "latents"),
        dataset=join(home, "dataset"),
        autoencoder=AUTOENCODER,
        text=TEXT,
        image_size=64,
        record=_record(home, "latents"),
        tracking=_tracking(home),
    )


def train_ldm(home: str) -> TrainLdmConfig:
    """A 4.6 M parameter denoiser on two DeepSpeed ZeRO-2 ranks, minutes on two cores."""
    return TrainLdmConfig(
        root=join(home, "ldm"),
        record=_record(home, "ldm"),
        latents=join(home, "latents"),
        autoencoder=AUTOENCODER,
        text=TEXT,
        unet=unets.emoji(),
        objective=ObjectiveConfig(schedule=ScheduleConfig(start=0.00085, end=0.012)),
        optim=OptimConfig(lr=1.5e-3, warmup_samples=1_500, decay=Decay.COSINE),
        ema=EmaConfig(half_life_samples=20_000),
        engine=EngineConfig(kind=EngineKind.DEEPSPEED),
        loop=LoopConfig(
            total_samples=19_200, log_every=640, validate_every=4_800, picture_every=9_600, checkpoint_every=2_560
        ),
        launch=LaunchConfig(num_workers=2, cpus_per_worker=1),
        preview=PreviewConfig(prompts=PROMPTS, sampler=SAMPLER),
        tracking=_tracking(home),
        batch_size=32,
    )


def evaluate(home: str) -> EvaluateConfig:
    """Reconstruction, denoising loss and Fréchet distance on held-out names."""
    return EvaluateConfig(
        root=join(home, "ldm"),
        record=_record(home, "ldm"),
        dataset=join(home, "dataset"),
        latents=join(home, "latents"),
        protocol=EvaluationProtocol(num_images=64, sampler=SAMPLER, guidance_scale=2.0),
        launch=LaunchConfig(num_workers=1, cpus_per_worker=2),
        tracking=_tracking(home),
    )


def sample(home: str) -> SampleConfig:
    """A grid of prompts x guidance scales."""
    return SampleConfig(
        root=join(home, "samples"),
        record=_record(home, "ldm"),
        model=join(home, "ldm", "model"),
        prompts=PROMPTS,
        bulk=BulkConfig(root=join(home, "generated"), record=_record(home, "generated")),
        guidance=(1.0, 2.0, 4.0),
        sampler=SAMPLER,
        launch=LaunchConfig(num_workers=1, cpus_per_worker=2),
        tracking=_tracking(home),
    )


def _record(home: str, name: str) -> str:
    """The record stays on this machine, whatever the home is."""
    return join(kept_here(home), "records", name)


def _tracking(home: str) -> TrackingConfig:
    return TrackingConfig(
        uri=f"sqlite:///{kept_here(home)}/mlflow.db", experiment="emoji", model_name="emoji-text-to-image"
    )
