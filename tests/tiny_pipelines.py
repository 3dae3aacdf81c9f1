"""Pipelines of diffusers with random weights of a few thousand numbers, and what both sides draw of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.drawing import Drawing, Given
from ldm.samplers.sample import SamplerConfig, initial_noise
from ldm.text_to_image import TextToImage
from tests.tiny_text import CLIP_WIDTH, clip_text_config, write_clip_tokenizer

CHANNELS, LATENT_SIDE, FACTOR = 4, 8, 2
SIDE = LATENT_SIDE * FACTOR
PROMPTS, NEGATIVE, SEEDS, GUIDANCE, STEPS = ["a red heart", "dog"], ["cat", "cat"], [3, 4], 4.0, 5
"""Steps that divide the schedule's 1,000: else diffusers' DDIM steps to times beside those of its next calls."""
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def pipeline(folder: Path, *, is_inpainting: bool = False, **scheduler: Any) -> StableDiffusionPipeline:
    """Return a pipeline whose tokenizer lies in the folder; a latent's posterior has no width."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=2 * CHANNELS + 1 if is_inpainting else CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=CLIP_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.18215,
    )
    with torch.no_grad():
        vae.quant_conv.weight[CHANNELS:] = 0.0
        vae.quant_conv.bias[CHANNELS:] = -30.0
        for weight in unet.parameters():  # to where words matter
            weight += 0.05 * torch.randn(weight.shape)
    text = CLIPTextModel(clip_text_config()).eval()
    write_clip_tokenizer(folder)
    name = StableDiffusionInpaintPipeline if is_inpainting else StableDiffusionPipeline
    made = name(
        vae=vae.eval(),
        unet=unet.eval(),
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        scheduler=DDIMScheduler(**(SCHEDULER | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def write_pipeline(folder: Path, **settings: Any) -> StableDiffusionPipeline:
    """Return a pipeline that lies in the folder."""
    made = pipeline(folder.with_name(f"{folder.name}-tokens"), **settings)
    made.save_pretrained(folder)
    return made


def noise() -> torch.Tensor:
    """Return what both sides begin with."""
    return initial_noise(0, SEEDS, (CHANNELS, LATENT_SIDE, LATENT_SIDE))


def theirs(made: StableDiffusionPipeline, *, guidance: float = GUIDANCE, **given: Any) -> np.ndarray:
    """Return what diffusers draws, floats in [0, 1]."""
    made.set_progress_bar_config(disable=True)
    drawn = made(
        PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="np",
        **given,
    )
    return np.asarray(drawn.images)


def ours(
    model: TextToImage,
    *,
    guidance: float = GUIDANCE,
    given: Given | None = None,
    prompts: Sequence[str] = PROMPTS,
    sampler: SamplerConfig | None = None,
) -> np.ndarray:
    """Return what we draw, floats in [0, 1]: `generate` before it rounds to 8 bits, which is coarser than 1e-3."""
    given = given or Given()
    drawing = Drawing(sampler=sampler or SamplerConfig(num_steps=STEPS, grid=model.card.sampler.grid))
    with torch.no_grad():
        told = model._told(model.condition(prompts), given, SEEDS, (SIDE, SIDE), drawing)
        denoise = model._denoiser(told, model.condition(NEGATIVE), [guidance] * len(prompts), drawing)
        latent = model._sampled(denoise, SEEDS, (SIDE, SIDE), drawing, given, None)
        return pictures(model, latent)


def pictures(model: TextToImage, latent: torch.Tensor) -> np.ndarray:
    """Return what a model decodes, floats in [0, 1]."""
    return (model._decoded(latent) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
