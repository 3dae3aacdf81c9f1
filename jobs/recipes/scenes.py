"""The paper's other tasks, small: layouts, semantic maps, inpainting, super-resolution and classes on composed scenes.

python -m jobs.shard_dataset scenes --home HOME
python -m jobs.precompute_latents scenes --home HOME
python -m jobs.train_ldm scenes_layout --home HOME      # or scenes_map, scenes_inpainting, scenes_upscaling
python -m jobs.sample scenes_layout --home HOME

Classes: `things`, pictures of one drawing each, in a home of its own; its training is `things_class`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jobs.command_line import kept_here
from jobs.recipes import emoji
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig
from jobs.wiring.sample import SampleConfig
from jobs.wiring.shard_dataset import ShardDatasetConfig
from jobs.wiring.train_ldm import PreviewConfig, TrainLdmConfig
from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.layout import LayoutForm
from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.diffusion.process import Prediction
from ldm.storage import join
from ldm.training.diffusion_task import ObjectiveConfig
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig
from ldm.training.loop import LoopConfig
from ldm.training.optim import Decay, OptimConfig
from ldm.unet import zoo as unets
from ldm.unet.model import UNetConfig
from pipeline.latent_config import ColumnsConfig
from pipeline.sources.scenes import ScenesConfig

SCENES = ScenesConfig()
THINGS = ScenesConfig(fewest=1, most=1, smallest=0.5, largest=0.95)
MAP_CHANNELS = 8
FACTOR = 4
"""By how much super-resolution enlarges."""
NOISE_LEVELS = 350
"""Of noise that may lie over the small picture, as in Stable Diffusion's upscaler."""
LAYOUT = TokenTransformerConfig(vocab_size=1_025, max_tokens=14, depth=1)
"""Four boxes with corners on a grid of 32 x 32; read as boxes, they go through no transformer."""
TOLD = {
    "scenes_layout": ConditioningConfig(
        text=TextUse.NONE,
        has_layout=True,
        layout_form=LayoutForm.BOXES,
        layout_transformer=LAYOUT,
        layout_classes=len(SCENES.classes),
    ),
    "scenes_map": ConditioningConfig(
        text=TextUse.NONE, map_classes=len(SCENES.classes), map_channels=MAP_CHANNELS, map_dropout=0.1
    ),
    "scenes_inpainting": ConditioningConfig(text=TextUse.NONE, has_masked_image=True),
    "scenes_upscaling": ConditioningConfig(text=TextUse.NONE, has_low_res=True, noise_levels=NOISE_LEVELS),
    "things_class": ConditioningConfig(text=TextUse.NONE, num_classes=len(THINGS.classes)),
}
"""What each task's denoiser is told."""
SAMPLES = {
    "scenes_layout": 40_000,
    "scenes_map": 120_000,
    "scenes_inpainting": 100_000,
    "scenes_upscaling": 80_000,
    "things_class": 40_000,
}
"""How long each is trained; how well that is learned, tests/benchmarks/results/tasks.json says."""
WIDTH = 128
"""Of the states that a layout or a class becomes."""
LAYOUTS = {
    "a sailboat above two things": "11 0.3 0.02 0.7 0.42; 0 0.05 0.55 0.4 0.9; 5 0.55 0.55 0.95 0.95",
    "the same, left and right": "11 0.02 0.3 0.42 0.7; 0 0.55 0.05 0.9 0.4; 5 0.55 0.55 0.95 0.95",
    "a frog between trees": "7 0.32 0.35 0.68 0.7; 2 0.0 0.1 0.3 0.5; 2 0.7 0.1 1.0 0.5",
    "four corners": "3 0.02 0.02 0.42 0.42; 1 0.55 0.02 0.95 0.42; 8 0.02 0.55 0.42 0.95; 9 0.55 0.55 0.95 0.95",
}


def shard_dataset(home: str) -> ShardDatasetConfig:
    """8,000 scenes of two to four emoji drawings of twelve kinds, 64 px, with layouts and semantic maps."""
    return replace(emoji.shard_dataset(home), source=SCENES)


def shard_things(home: str) -> ShardDatasetConfig:
    """8,000 pictures of one emoji drawing each, of twelve kinds, at many places and sizes, 64 px."""
    return replace(emoji.shard_dataset(home), source=THINGS)


def precompute_latents(home: str) -> PrecomputeLatentsConfig:
    """Moments of every scene, its layout, map, small copy, and two masks with what they leave."""
    columns = ColumnsConfig(
        boxes_attribute="layout",
        box_classes=SCENES.classes,
        map_member="map.png",
        low_res_factor=FACTOR,
        num_masks=2,
    )
    return replace(emoji.precompute_latents(home), columns=columns)


def precompute_things(home: str) -> PrecomputeLatentsConfig:
    """Moments and class of every picture."""
    columns = ColumnsConfig(class_attribute="class", classes=THINGS.classes)
    return replace(emoji.precompute_latents(home), columns=columns)


def train_ldm(name: str, home: str) -> TrainLdmConfig:
    """A small denoiser that is told one thing beside the noise, about an hour on two cores."""
    told = TOLD[name]
    return replace(
        emoji.train_ldm(home),
        root=join(home, name),
        record=_record(home, name),
        unet=_network(told),
        conditioning=told,
        objective=_objective(told),
        optim=OptimConfig(lr=1e-3, warmup_samples=1_500, decay=Decay.COSINE),
        ema=EmaConfig(half_life_samples=8_000),
        engine=EngineConfig(),
        loop=LoopConfig(
            total_samples=SAMPLES[name],
            log_every=3_200,
            validate_every=20_000,
            picture_every=40_000,
            checkpoint_every=8_000,
        ),
        batch_size=16,
        preview=PreviewConfig(prompts=("",) * 8, sampler=emoji.SAMPLER, guidance=_guidance(told)),
    )


def sample(name: str, home: str) -> SampleConfig:
    """A grid of what the model was told x guidance scales."""
    told = TOLD[name]
    config = replace(
        emoji.sample(home),
        root=join(home, "samples"),
        record=_record(home, name),
        model=join(home, name, "model"),
        prompts=("",),
        guidance=(1.0, 2.0, 4.0) if _guidance(told) > 1 else (1.0,),
    )
    if told.has_layout:
        return replace(config, prompts=tuple(LAYOUTS), layouts=tuple(LAYOUTS.values()))
    if told.num_classes:
        return replace(config, prompts=THINGS.classes, classes=tuple(range(len(THINGS.classes))))
    return config


def _guidance(told: ConditioningConfig) -> float:
    """Return the usual scale; what lies beside the latent and is never dropped knows no other than 1."""
    return 2.0 if told.has_states or told.map_classes else 1.0


def _objective(told: ConditioningConfig) -> ObjectiveConfig:
    """Return the recipe's own, and the velocity where a map does not show what is drawn.

    What is drawn is decided where the noise is strongest; there an error of the predicted noise hardly weighs, and one
    of the velocity does. After 48,000 rows of noise neither layouts were followed nor masks filled, and what was
    enlarged had other colours. (For other predictions than noise jobs.evaluate asks of the loss only that it fell.)
    """
    own = emoji.train_ldm("").objective
    return own if told.map_classes else replace(own, prediction=Prediction.VELOCITY)


def _network(told: ConditioningConfig) -> UNetConfig:
    beside = unets.emoji().out_channels + told.spatial_channels(unets.emoji().out_channels)
    width = WIDTH if told.has_states else None
    # Boxes are told apart where each latent is a position, on the finest level.
    attending = (1, 2, 4) if told.has_layout else unets.emoji().attention_factors
    return replace(
        unets.emoji(),
        in_channels=beside,
        context_width=width,
        num_levels=told.noise_levels,
        attention_factors=attending,
    )


def _record(home: str, name: str) -> str:
    return join(kept_here(home), "records", name)


TRAIN_LDM: dict[str, Callable[[str], TrainLdmConfig]] = {name: partial(train_ldm, name) for name in TOLD}
SAMPLE: dict[str, Callable[[str], SampleConfig]] = {name: partial(sample, name) for name in TOLD}
