"""Cluster scale: LAION addresses and captions in object storage, CLIP text, the kl-f8 autoencoder, ZeRO-2 in bf16.

`--home s3://bucket/path` holds everything; `HOME/metadata` holds the LAION parquet files. The denoiser is Stable
Diffusion 1's, at 256 pixels.
"""

from __future__ import annotations

from jobs.command_line import kept_here
from jobs.wiring.evaluate import EvaluateConfig, GateConfig
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig
from jobs.wiring.sample import SampleConfig
from jobs.wiring.shard_dataset import ShardDatasetConfig
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import PreviewConfig, TrainLdmConfig
from ldm.autoencoder import zoo as autoencoders
from ldm.conditioning.text import TextEncoderConfig, TextEncoderKind
from ldm.diffusion.schedule import ScheduleConfig
from ldm.evaluation.protocol import EvaluationProtocol
from ldm.losses.perceptual import PerceptualConfig, PerceptualKind
from ldm.precision import Precision
from ldm.samplers.sample import SamplerConfig
from ldm.samplers.steppers import StepperKind
from ldm.storage import join
from ldm.training.diffusion_task import ObjectiveConfig
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.local_launch import LaunchConfig
from ldm.training.loop import LoopConfig
from ldm.training.optim import OptimConfig
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.tracking_config import TrackingConfig
from ldm.unet import zoo as unets
from pipeline.generate_config import BulkConfig
from pipeline.ingest.duplicates import DuplicateConfig
from pipeline.ingest.filters import FilterConfig, laion_safety
from pipeline.ingest.transforms import PictureConfig
from pipeline.sources.tables import UrlTableConfig, laion_columns

AUTOENCODER = "hf://stabilityai/sd-vae-ft-mse"
"""Any folder, checkpoint, URL, hub name or registered model; this one is kl-f8, fetched from the hub."""
TEXT = TextEncoderConfig(kind=TextEncoderKind.CLIP, path="openai/clip-vit-large-patch14", max_tokens=77)
SAMPLER = SamplerConfig(stepper=StepperKind.DPM_SOLVER_PP_2M, num_steps=25)
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "an oil painting of a lighthouse in a storm",
    "a bowl of ramen on a wooden table, top view",
    "a watercolour of a fox in the snow",
)
TRACKING = TrackingConfig(uri="http://mlflow:5000", experiment="laion", model_name="laion-text-to-image")
VGG_WEIGHTS = "weights/vgg16-397923af.pth"
"""torchvision's VGG-16, which a person puts under the home folder once."""
WORKERS = 8


def shard_dataset(home: str) -> ShardDatasetConfig:
    """LAION parquet of addresses and captions → 256 px jpg tars in object storage, safe and without copies."""
    return ShardDatasetConfig(
        root=join(home, "dataset"),
        record=join(kept_here(home), "records", "dataset"),
        source=UrlTableConfig(folder=join(home, "metadata"), attribute_columns=laion_columns()),
        picture=PictureConfig(image_size=256),
        filters=FilterConfig(rules=laion_safety(), min_side=256, max_aspect=3.0, min_caption_chars=5),
        duplicates=DuplicateConfig(exact=True),
        tracking=TRACKING,
    )


def train_autoencoder(home: str) -> TrainAutoencoderConfig:
    """The paper's kl-f8 from scratch; most runs take the pretrained one instead."""
    return TrainAutoencoderConfig(
        root=join(home, "autoencoder"),
        record=join(kept_here(home), "records", "autoencoder"),
        dataset=join(home, "dataset"),
        autoencoder=autoencoders.kl_f8(),
        loss=ReconstructionConfig(
            perceptual=PerceptualConfig(kind=PerceptualKind.LPIPS_VGG, trunk_weights=join(home, VGG_WEIGHTS)),
            adversarial_start=600_000,
        ),
        optim=OptimConfig(lr=1.08e-4, beta1=0.5, beta2=0.9, weight_decay=0.0),
        ema=EmaConfig(half_life_samples=500_000),
        engine=EngineConfig(precision=Precision.BF16),
        loop=LoopConfig(
            total_samples=20_000_000,
            log_every=5_000,
            validate_every=200_000,
            picture_every=200_000,
            checkpoint_every=200_000,
        ),
        launch=LaunchConfig(num_workers=WORKERS, cpus_per_worker=8, gpus_per_worker=1),
        tracking=TRACKING,
        batch_size=96,
        cache_folder="/tmp/ldm-cache",
    )


def precompute_latents(home: str) -> PrecomputeLatentsConfig:
    """kl-f8 moments and CLIP-L tokens, one GPU for each worker."""
    return PrecomputeLatentsConfig(
        root=join(home, "latents"),
        dataset=join(home, "dataset"),
        autoencoder=AUTOENCODER,
        text=TEXT,
        image_size=256,
        batch_size=64,
        precision=Precision.BF16,
        num_cpus=8,
        record=join(kept_here(home), "records", "latents"),
        tracking=TRACKING,
    )


def train_ldm(home: str) -> TrainLdmConfig:
    """Stable Diffusion 1's denoiser on eight GPUs, ZeRO-2, bf16."""
    return TrainLdmConfig(
        root=join(home, "ldm"),
        record=join(kept_here(home), "records", "ldm"),
        latents=join(home, "latents"),
        autoencoder=AUTOENCODER,
        text=TEXT,
        unet=unets.sd1(),
        objective=ObjectiveConfig(schedule=ScheduleConfig(start=0.00085, end=0.012), validation_rows=4096),
        optim=OptimConfig(lr=1e-4, warmup_samples=10_000 * 2048),
        ema=EmaConfig(half_life_samples=10_000_000),
        engine=EngineConfig(kind=EngineKind.DEEPSPEED, precision=Precision.BF16, micro_batch_size=64),
        loop=LoopConfig(
            total_samples=1_126_400_000,
            log_every=50 * 2048,
            validate_every=1_000 * 2048,
            picture_every=5_000 * 2048,
            checkpoint_every=1_000 * 2048,
        ),
        launch=LaunchConfig(num_workers=WORKERS, cpus_per_worker=8, gpus_per_worker=1, max_failures=20),
        preview=PreviewConfig(prompts=PROMPTS, sampler=SAMPLER, guidance=7.5),
        tracking=TRACKING,
        batch_size=2048,
        num_streams=256,
        cache_folder="/tmp/ldm-cache",
    )


def evaluate(home: str) -> EvaluateConfig:
    """10,000 held-out captions, and the denoising loss."""
    return EvaluateConfig(
        root=join(home, "ldm"),
        record=join(kept_here(home), "records", "ldm"),
        dataset=join(home, "dataset"),
        latents=join(home, "latents"),
        protocol=EvaluationProtocol(num_images=10_000, image_size=256, sampler=SAMPLER, guidance_scale=3.0),
        gate=GateConfig(min_psnr_db=23.0, min_loss_drop=0.8),
        validation_rows=4096,
        launch=LaunchConfig(num_workers=1, cpus_per_worker=8, gpus_per_worker=1),
        tracking=TRACKING,
    )


def sample(home: str) -> SampleConfig:
    """A grid of prompts x guidance scales."""
    return SampleConfig(
        root=join(home, "samples"),
        record=join(kept_here(home), "records", "ldm"),
        model=join(home, "ldm", "model"),
        prompts=PROMPTS,
        bulk=BulkConfig(root=join(home, "generated"), record=join(kept_here(home), "records", "generated")),
        sampler=SAMPLER,
        launch=LaunchConfig(num_workers=1, cpus_per_worker=8, gpus_per_worker=1),
        tracking=TRACKING,
    )
