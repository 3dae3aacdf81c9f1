"""Drawing against diffusers' `StableDiffusionPipeline` as it comes, in turns: same weights, same steps, same images.

python -m tests.benchmarks.sample [--device cuda] [--quick] [--save]

A model of drawn weights is written, exported, and loaded by both. Each draws the same prompts from the same noise by
50 steps of DDIM under guidance, decoding included; their images are compared. `loop` is what of our time is not spent
in the networks' own calls (text encoder, denoiser, decoder): the sampler's own cost. Peak memory is that of a
process which loads one of both and draws, less what it held before. On a GPU: Stable Diffusion 1's UNet at 512 px.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from ldm.autoencoder import zoo as autoencoders
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.text import TextEncoderKind, text_encoder_digest
from ldm.denoiser import denoiser_digests, save_denoiser
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import ScheduleConfig
from ldm.drawing import Drawing
from ldm.interop.diffusers import save_autoencoder, weights_digest
from ldm.interop.pipeline_folder import export_pipeline
from ldm.model_card import AUTOENCODER_FOLDER, ModelCard, save_card
from ldm.precision import Precision
from ldm.samplers.sample import SamplerConfig, initial_noise
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.unet import zoo as unets
from ldm.unet.model import UNet, UNetConfig
from tests.benchmarks.network_pair import PairSettings, in_turns, line, run
from tests.benchmarks.unet_step import laptop
from tests.tiny_text import clip_text_config, encoder_config, write_clip_tokenizer

SAMPLER = SamplerConfig(num_steps=50)
GUIDANCE = 5.0
TOLERANCE = 2
"""Levels of 255 by which a pixel may differ."""
HALF_TOLERANCE = 5.0
"""Levels in the mean over all pixels, where both compute in half precision."""
TEXT_WIDTH, TEXT_LAYERS = 384, 6


@dataclass(frozen=True, slots=True)
class Work:
    """A denoiser, an autoencoder, rows and columns of the latents, and pictures that are drawn at once."""

    name: str
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    latent_size: int
    images: int
    precision: Precision = Precision.FP32
    is_compiled: bool = False

    @property
    def drawing(self) -> Drawing:
        """How ours draws."""
        return Drawing(sampler=SAMPLER, precision=self.precision, is_compiled=self.is_compiled)

    def prompts(self) -> list[str]:
        """Return as many prompts as there are pictures."""
        return [f"a red heart {number}" for number in range(self.images)]


CPU_WORKS = (
    Work("emoji, 64 px, 8", unets.emoji(), autoencoders.small_f4(), 16, 8),
    Work("emoji, 64 px, 1", unets.emoji(), autoencoders.small_f4(), 16, 1),
    Work("18 M, 256 px, 1", replace(laptop(), in_channels=16, out_channels=16), autoencoders.small_f8(), 32, 1),
)
GPU_WORKS = tuple(
    Work(
        f"sd1, 512 px, {images}{', compiled' if is_compiled else ''}",
        unets.sd1(),
        autoencoders.kl_f8(),
        64,
        images,
        Precision.BF16,
        is_compiled,
    )
    for is_compiled in (False, True)
    for images in (1, 16)
)


def written(work: Work, folder: Path) -> tuple[str, str]:
    """Write a model of drawn weights; return its folder and that of its pipeline."""
    torch.manual_seed(0)
    width = work.unet.context_width or 0
    write_clip_tokenizer(folder / "clip")
    CLIPTextModel(clip_text_config(width, TEXT_LAYERS)).save_pretrained(folder / "clip")
    text = encoder_config(TextEncoderKind.CLIP, folder / "clip")
    unet, autoencoder = UNet(work.unet), Autoencoder(work.autoencoder)
    for weight in unet.parameters():  # fresh networks predict zero
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    model = str(folder / "model")
    told = ConditioningConfig()
    save_denoiser(work.unet, told, unet.state_dict(), model)
    save_autoencoder(autoencoder, f"{model}/{AUTOENCODER_FOLDER}")
    channels = work.autoencoder.latent_channels
    card = ModelCard(
        unet_digest=denoiser_digests(work.unet, told, unet.state_dict())[0],
        autoencoder_digest=weights_digest(autoencoder.state_dict(), autoencoder.config),
        text=text,
        text_digest=text_encoder_digest(text),
        schedule=ScheduleConfig(),
        prediction=Prediction.NOISE,
        latent_mean=(0.0,) * channels,
        latent_std=(1.0,) * channels,
        latent_size=(work.latent_size, work.latent_size),
        sampler=SAMPLER,
        guidance=GUIDANCE,
        lineage={},
    )
    save_card(card, model)
    export_pipeline(model, str(folder / "pipeline"))
    return model, str(folder / "pipeline")


class Ours:
    """Draws with our model."""

    def __init__(self, folder: str, work: Work, device: str) -> None:
        self.model = load_text_to_image(folder, torch.device(device))
        self._work = work

    def draw(self) -> np.ndarray:
        """Return uint8 pixels, shape (n, y, x, 3)."""
        return draw(self.model, self._work)


def draw(model: TextToImage, work: Work) -> np.ndarray:
    """Return what our model draws."""
    images = work.images
    return model.generate(
        work.prompts(),
        seeds=list(range(images)),
        guidance=[GUIDANCE] * images,
        drawing=work.drawing,
        batch_size=images,
    )


class Theirs:
    """Draws with diffusers' pipeline."""

    def __init__(self, folder: str, work: Work, device: str) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=work.precision.dtype).to(device)
        if work.is_compiled:
            self.pipeline.unet = torch.compile(self.pipeline.unet.to(memory_format=torch.channels_last))
        self.pipeline.set_progress_bar_config(disable=True)
        shape = (work.unet.out_channels, work.latent_size, work.latent_size)
        self._noise = initial_noise(0, range(work.images), shape).to(device, work.precision.dtype)
        self._work = work

    def draw(self) -> np.ndarray:
        """Return uint8 pixels, shape (n, y, x, 3)."""
        made = self.pipeline(
            self._work.prompts(),
            latents=self._noise,
            num_inference_steps=SAMPLER.num_steps,
            guidance_scale=GUIDANCE,
            output_type="np",
        )
        return (np.asarray(made.images) * 255).round().astype(np.uint8)


def measured(work: Work, settings: PairSettings) -> dict[str, Any]:
    """Print and return rates and ratio of one work, our loop's share and both sides' peak memory."""
    device = "cuda" if settings.is_gpu else "cpu"
    with tempfile.TemporaryDirectory(prefix="sample-benchmark-") as folder:
        model, pipeline = written(work, Path(folder))
        ours, theirs = Ours(model, work, device), Theirs(pipeline, work, device)
        apart = np.abs(ours.draw().astype(int) - theirs.draw().astype(int))
        # Theirs takes its steps and reads its prompts in half precision too, so there only the mean is near.
        is_half = work.precision is not Precision.FP32
        found, bound = (float(apart.mean()), HALF_TOLERANCE) if is_half else (float(apart.max()), TOLERANCE)
        assert found <= bound, f"{work.name}: images differ by {found} levels, {bound} were expected at most"
        result = in_turns(ours.draw, theirs.draw, settings, repeats=1, images=work.images)
        seconds = work.images / statistics.median(result["images_per_second"]["ours"])
        result["unet_calls_per_second"] = SAMPLER.num_steps / seconds
        result["loop_share"] = loop_share(ours.model, work, settings)
        memory = partial(peak_memory, work, settings)
        result["peak_memory_mb"] = {"ours": memory("ours", model), "theirs": memory("theirs", pipeline)}
    mine, other = result["peak_memory_mb"].values()
    print(
        f"{line(work.name, result)}   {result['unet_calls_per_second']:.1f} UNet calls/s, loop "
        f"{result['loop_share']:.2%} of its time, {mine:,.0f} MB against {other:,.0f}"
    )
    return {work.name: result}


def loop_share(model: TextToImage, work: Work, settings: PairSettings) -> float:
    """Return what share of drawing is spent outside of the networks, the least of some tries."""
    inside = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            nonlocal inside
            settings.wait()
            begun = time.perf_counter()
            found = call(*given, **named)
            settings.wait()
            inside += time.perf_counter() - begun
            return found

        return wrapped

    network = model._network(work.drawing)
    kept = [(network, network.forward), (model._autoencoder, model._autoencoder.decode)]
    encoder = model._text_encoder
    encode = encoder.encode_tokens
    encoder.encode_tokens = timed(encode)
    network.forward, model._autoencoder.decode = (timed(call) for _, call in kept)
    shares = []
    for _ in range(2 if settings.quick else 5):
        inside, begun = 0.0, time.perf_counter()
        draw(model, work)
        shares.append(1 - inside / (time.perf_counter() - begun))
    network.forward, model._autoencoder.decode = (call for _, call in kept)
    encoder.encode_tokens = encode
    return min(shares)


def peak_memory(work: Work, settings: PairSettings, side: str, folder: str) -> float:
    """Return the megabytes that a process of its own takes to load one side and draw, beyond its imports."""
    asked = json.dumps({"work": work.name, "side": side, "folder": folder, "cuda": settings.is_gpu})
    said = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.sample_memory", asked], capture_output=True, text=True, check=True
    )
    return float(said.stdout.strip().splitlines()[-1])


def quiet() -> None:
    """Keep the libraries' progress bars and advice out of the table."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    quiet()
    run("sample", __doc__ or "", 1.15, CPU_WORKS, GPU_WORKS, measured)
