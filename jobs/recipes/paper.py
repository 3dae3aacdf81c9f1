"""The models of the latent diffusion paper under their authors' names (Rombach et al. 2022, tables 8 and 12 to 15).

Each has its network, schedule, what it is told, batch, learning rate and length from its configuration or its table.
What the paper gives as steps stands here as samples, steps times batch; moving averages of 0.9999 a step have a half-
life of 6,931 batches. Where the released network is not the table's, batch and length are the table's all the same:
inpainting_big (its 215 M model), bsr_sr (169 M), text2img256 (the one on LAION). Rows of a forward on one GPU are
ours.

Every model reads `HOME/dataset` through the autoencoder in `HOME/autoencoder/model`. With one --home for all of them:
`jobs.train_autoencoder vq_f4`, then `jobs.precompute_latents cin256_v2`, `jobs.train_ldm cin256_v2`; or name another
autoencoder by `--autoencoder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from jobs.command_line import kept_here
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import TrainLdmConfig
from ldm.autoencoder import zoo as autoencoders
from ldm.autoencoder.codebook import CodebookConfig, CommitmentForm
from ldm.autoencoder.model import AutoencoderConfig
from ldm.conditioning.conditioner import LAYOUT_TRANSFORMER, ConditioningConfig, TextUse
from ldm.conditioning.text import TextEncoderConfig, TextEncoderKind
from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.diffusion.schedule import ScheduleConfig
from ldm.losses.diffusion import ErrorNorm
from ldm.losses.perceptual import PerceptualConfig, PerceptualKind
from ldm.precision import Precision
from ldm.storage import join
from ldm.training.diffusion_task import ObjectiveConfig
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.local_launch import LaunchConfig
from ldm.training.loop import LoopConfig
from ldm.training.optim import OptimConfig
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.unet import zoo
from ldm.unet.model import UNetConfig
from pipeline.latent_config import ColumnsConfig, Degradation, TextStorage

EMA_HALF_LIFE_STEPS = round(math.log(0.5) / math.log(0.9999))
WARMUP_STEPS = 10_000
NO_TEXT = ConditioningConfig(text=TextUse.NONE)
TOKENS = TextEncoderConfig(max_tokens=77)
"""The packaged MiniLM has the tokenizer of BERT, which is all of it that a trained transformer needs."""
CLIP_L = TextEncoderConfig(kind=TextEncoderKind.CLIP, path="openai/clip-vit-large-patch14", max_tokens=77)
STABLE_DIFFUSION = ScheduleConfig(start=0.00085, end=0.012)
LANDSCAPE_CLASSES = 182
MAX_STREAMS = 256
GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperModel:
    """One row of the paper's tables.

    Attributes:
        unet: the network.
        lr: learning rate, as used: the paper's base rate times its batch where it was scaled by it.
        batch_size: rows of a batch over all GPUs.
        steps: length of the training.
        schedule: the noise schedule.
        told: what the network is told.
        columns: what the cache holds for that beside moments and text.
        text: the text encoder of the cache.
        norm: how far an output is from its target.
        image_size: side of the pictures.
        warmup_steps: steps over which the rate rises.
        micro_batch_size: rows of one forward on one GPU; 0 takes its whole share.
    """

    unet: Callable[[], UNetConfig]
    lr: float
    batch_size: int
    steps: int
    schedule: ScheduleConfig = ScheduleConfig(start=0.0015, end=0.0195)
    told: ConditioningConfig = NO_TEXT
    columns: ColumnsConfig = ColumnsConfig()
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    norm: ErrorNorm = ErrorNorm.L2
    image_size: int = 256
    warmup_steps: int = 0
    micro_batch_size: int = 0

    @property
    def num_streams(self) -> int:
        """Canonical streams, as many as a run may have GPUs: a divisor of the batch, of eights where it has any."""
        eights = 8 if self.batch_size % 8 == 0 else 1
        rest = self.batch_size // eights
        return eights * max(part for part in range(1, rest + 1) if rest % part == 0 and eights * part <= MAX_STREAMS)

    @property
    def num_workers(self) -> int:
        """GPUs of a usual machine that share the streams evenly."""
        return max(number for number in range(1, GPUS_OF_A_MACHINE + 1) if self.num_streams % number == 0)


def _trained_text(depth: int) -> ConditioningConfig:
    return ConditioningConfig(text=TextUse.TRAINED, text_transformer=TokenTransformerConfig(depth=depth))


_WIDE = ScheduleConfig(start=0.0015, end=0.0205)
_CLASSES = ConditioningConfig(text=TextUse.NONE, num_classes=1000)
_CLASS_COLUMN = ColumnsConfig(class_attribute="class")
_MAP = ConditioningConfig(text=TextUse.NONE, map_classes=LANDSCAPE_CLASSES)
_MAP_COLUMN = ColumnsConfig(map_member="map.png")

MODELS: dict[str, PaperModel] = {
    "celebahq_ldm_vq_4": PaperModel(unet=zoo.celebahq_ldm_vq_4, lr=9.6e-5, batch_size=48, steps=410_000),
    "ffhq_ldm_vq_4": PaperModel(unet=zoo.ffhq_ldm_vq_4, lr=8.4e-5, batch_size=42, steps=635_000),
    "lsun_bedrooms_ldm_vq_4": PaperModel(unet=zoo.lsun_bedrooms_ldm_vq_4, lr=9.6e-5, batch_size=48, steps=1_900_000),
    "lsun_churches_ldm_kl_8": PaperModel(
        unet=zoo.lsun_churches_ldm_kl_8,
        lr=5e-5,
        batch_size=96,
        steps=500_000,
        schedule=ScheduleConfig(start=0.0015, end=0.0155),
        norm=ErrorNorm.L1,
        warmup_steps=WARMUP_STEPS,
    ),
    "cin_ldm_vq_f8": PaperModel(
        unet=zoo.cin_ldm_vq_f8, lr=6.4e-5, batch_size=64, steps=2_000_000, told=_CLASSES, columns=_CLASS_COLUMN
    ),
    "cin256_v2": PaperModel(
        unet=zoo.cin256_v2,
        lr=1e-4,
        batch_size=1200,
        steps=178_000,
        told=_CLASSES,
        columns=_CLASS_COLUMN,
        micro_batch_size=30,
    ),
    "text2img256": PaperModel(
        unet=zoo.text2img256, lr=5.6e-5, batch_size=28, steps=390_000, told=_trained_text(32), text=TOKENS
    ),
    "txt2img_1p4b": PaperModel(
        unet=zoo.txt2img_1p4b,
        lr=1e-4,
        batch_size=680,
        micro_batch_size=17,
        steps=390_000,
        schedule=STABLE_DIFFUSION,
        told=_trained_text(32),
        text=TOKENS,
        warmup_steps=WARMUP_STEPS,
    ),
    "stable_diffusion_v1": PaperModel(
        unet=zoo.sd1,
        lr=1e-4,
        batch_size=2048,
        micro_batch_size=16,
        steps=432_000,
        schedule=STABLE_DIFFUSION,
        told=ConditioningConfig(),
        text=CLIP_L,
        image_size=512,
        warmup_steps=WARMUP_STEPS,
    ),
    "layout2img_openimages256": PaperModel(
        unet=zoo.layout2img_openimages256,
        lr=4.8e-5,
        batch_size=24,
        steps=4_400_000,
        schedule=_WIDE,
        told=ConditioningConfig(
            text=TextUse.NONE, has_layout=True, layout_transformer=LAYOUT_TRANSFORMER, layout_dropout=0.0
        ),
        columns=ColumnsConfig(boxes_attribute="layout"),
        norm=ErrorNorm.L1,
    ),
    "semantic_synthesis256": PaperModel(
        unet=zoo.semantic_synthesis256,
        lr=4.8e-5,
        batch_size=48,
        steps=360_000,
        schedule=_WIDE,
        told=_MAP,
        columns=_MAP_COLUMN,
        norm=ErrorNorm.L1,
    ),
    "semantic_synthesis512": PaperModel(
        unet=zoo.semantic_synthesis512,
        lr=8e-6,
        batch_size=8,
        steps=360_000,
        schedule=_WIDE,
        told=_MAP,
        columns=_MAP_COLUMN,
        norm=ErrorNorm.L1,
        image_size=512,
    ),
    "inpainting_big": PaperModel(
        unet=zoo.inpainting_big,
        lr=1e-6 * 128,
        batch_size=128,
        steps=360_000,
        schedule=_WIDE,
        told=ConditioningConfig(text=TextUse.NONE, has_masked_image=True),
        columns=ColumnsConfig(num_masks=4),
        norm=ErrorNorm.L1,
    ),
    "bsr_sr": PaperModel(
        unet=zoo.bsr_sr,
        lr=6.4e-5,
        batch_size=64,
        steps=860_000,
        schedule=ScheduleConfig(start=0.0015, end=0.0155),
        told=ConditioningConfig(text=TextUse.NONE, has_low_res=True),
        columns=ColumnsConfig(low_res_factor=4, degradation=Degradation.BSR_LIGHT),
    ),
}


def precompute_latents(name: str, home: str) -> PrecomputeLatentsConfig:
    """The latents that a model of the paper is trained on, one GPU for each worker."""
    model = MODELS[name]
    is_tokens = model.told.text is not TextUse.FROZEN
    return PrecomputeLatentsConfig(
        root=join(home, "latents"),
        dataset=join(home, "dataset"),
        autoencoder=join(home, "autoencoder", "model"),
        text=model.text,
        text_storage=TextStorage.ONLINE if is_tokens else TextStorage.EMBEDDED,
        image_size=model.image_size,
        columns=model.columns,
        batch_size=64,
        precision=Precision.BF16,
        num_cpus=8,
        record=join(kept_here(home), "records", "latents"),
    )


def train_ldm(name: str, home: str) -> TrainLdmConfig:
    """A model of the paper, ZeRO-2 in bf16 on as many GPUs as `--launch.num-workers` says."""
    model = MODELS[name]
    batch = model.batch_size
    return TrainLdmConfig(
        root=join(home, "ldm"),
        record=join(kept_here(home), "records", "ldm"),
        latents=join(home, "latents"),
        autoencoder=join(home, "autoencoder", "model"),
        text=model.text,
        unet=model.unet(),
        conditioning=model.told,
        objective=ObjectiveConfig(schedule=model.schedule, norm=model.norm, validation_rows=4096),
        optim=OptimConfig(lr=model.lr, warmup_samples=model.warmup_steps * batch),
        ema=EmaConfig(half_life_samples=EMA_HALF_LIFE_STEPS * batch),
        engine=EngineConfig(
            kind=EngineKind.DEEPSPEED, precision=Precision.BF16, micro_batch_size=model.micro_batch_size
        ),
        loop=LoopConfig(
            total_samples=model.steps * batch,
            log_every=50 * batch,
            validate_every=5_000 * batch,
            picture_every=5_000 * batch,
            checkpoint_every=1_000 * batch,
        ),
        launch=LaunchConfig(num_workers=model.num_workers, cpus_per_worker=8, gpus_per_worker=1, max_failures=20),
        batch_size=batch,
        num_streams=model.num_streams,
        cache_folder="/tmp/ldm-cache",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperFirstStage:
    """One row of the paper's table of autoencoders.

    Attributes:
        autoencoder: the network.
        batch_size: images of a batch; the learning rate is 4.5e-6 for each of them.
        adversarial_start: steps after which the discriminator counts.
        adversarial_weight: weight of the generator term on top of its adaptive weight.
        discriminator_layers: its strided layers.
        steps: length of the training.
    """

    autoencoder: Callable[[], AutoencoderConfig]
    batch_size: int
    adversarial_start: int
    adversarial_weight: float
    steps: int
    discriminator_layers: int = 3


FIRST_STAGES: dict[str, PaperFirstStage] = {
    "kl_f4": PaperFirstStage(
        autoencoder=autoencoders.kl_f4,
        batch_size=10,
        adversarial_start=50_001,
        adversarial_weight=0.5,
        steps=176_991,
    ),
    "kl_f8": PaperFirstStage(
        autoencoder=autoencoders.kl_f8,
        batch_size=4,
        adversarial_start=50_001,
        adversarial_weight=0.5,
        steps=246_803,
    ),
    "kl_f16": PaperFirstStage(
        autoencoder=autoencoders.kl_f16,
        batch_size=6,
        adversarial_start=50_001,
        adversarial_weight=0.5,
        steps=442_998,
    ),
    "kl_f32": PaperFirstStage(
        autoencoder=autoencoders.kl_f32,
        batch_size=6,
        adversarial_start=50_001,
        adversarial_weight=0.5,
        steps=406_763,
    ),
    "vq_f4": PaperFirstStage(
        autoencoder=autoencoders.vq_f4, batch_size=8, adversarial_start=0, adversarial_weight=0.75, steps=533_066
    ),
    "vq_f4_noattn": PaperFirstStage(
        autoencoder=autoencoders.vq_f4_noattn,
        batch_size=8,
        adversarial_start=11,
        adversarial_weight=0.75,
        steps=658_131,
    ),
    "vq_f8": PaperFirstStage(
        autoencoder=autoencoders.vq_f8,
        batch_size=10,
        adversarial_start=1,
        adversarial_weight=0.6,
        steps=971_043,
        discriminator_layers=2,
    ),
    "vq_f8_n256": PaperFirstStage(
        autoencoder=autoencoders.vq_f8_n256,
        batch_size=10,
        adversarial_start=250_001,
        adversarial_weight=0.75,
        steps=1_608_649,
    ),
    "vq_f16": PaperFirstStage(
        autoencoder=autoencoders.vq_f16,
        batch_size=14,
        adversarial_start=250_001,
        adversarial_weight=0.75,
        steps=1_101_166,
        discriminator_layers=2,
    ),
}


def train_autoencoder(name: str, home: str) -> TrainAutoencoderConfig:
    """An autoencoder of the paper on pictures of 256 px, one GPU; more GPUs take a larger --batch-size."""
    stage = FIRST_STAGES[name]
    batch = stage.batch_size
    return TrainAutoencoderConfig(
        root=join(home, "autoencoder"),
        record=join(kept_here(home), "records", "autoencoder"),
        dataset=join(home, "dataset"),
        autoencoder=stage.autoencoder(),
        loss=ReconstructionConfig(
            perceptual=PerceptualConfig(kind=PerceptualKind.LPIPS_VGG),
            adversarial_weight=stage.adversarial_weight,
            adversarial_start=stage.adversarial_start * batch,
            discriminator_layers=stage.discriminator_layers,
            validation_rows=2_048,
            codebook=CodebookConfig(form=CommitmentForm.LEGACY) if name.startswith("vq") else CodebookConfig(),
        ),
        optim=OptimConfig(lr=4.5e-6 * batch, beta1=0.5, beta2=0.9, weight_decay=0.0, clip_grad_norm=0.0),
        ema=EmaConfig(half_life_samples=0),
        engine=EngineConfig(precision=Precision.FP32),
        loop=LoopConfig(
            total_samples=stage.steps * batch,
            log_every=100 * batch,
            validate_every=10_000 * batch,
            picture_every=10_000 * batch,
            checkpoint_every=5_000 * batch,
        ),
        launch=LaunchConfig(num_workers=1, cpus_per_worker=8, gpus_per_worker=1, max_failures=20),
        batch_size=batch,
        num_streams=math.gcd(batch, 8),
        cache_folder="/tmp/ldm-cache",
    )


TRAIN_AUTOENCODER: dict[str, Callable[[str], TrainAutoencoderConfig]] = {
    name: partial(train_autoencoder, name) for name in FIRST_STAGES
}
PRECOMPUTE_LATENTS: dict[str, Callable[[str], PrecomputeLatentsConfig]] = {
    name: partial(precompute_latents, name) for name in MODELS
}
TRAIN_LDM: dict[str, Callable[[str], TrainLdmConfig]] = {name: partial(train_ldm, name) for name in MODELS}
