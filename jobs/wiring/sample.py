"""Sampling, put together: prompts x guidance scales → one picture with captions."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm import storage
from ldm.config import Config, digest_of
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import Pixels, load_card, load_text_to_image, model_digest
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import Progress
from ldm.training.tracking_config import TrackingConfig
from ldm.training.world import World

CELL = 128
LABEL_WIDTH = 200
HEADER = 28
GAP = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig(Config):
    """Draw a grid of prompts x guidance scales."""

    root: str
    """Folder that the picture is written to."""
    record: str
    """Local folder of the training's record, which names its MLflow run."""
    model: str
    """Folder or URL of the model."""
    prompts: tuple[str, ...]
    """One row of the grid each."""
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    """One column of the grid each; 1 is the conditional model without guidance."""
    seed: int = 0
    """Seed of the first row's noise; the next rows count on. A row has one noise over all scales."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How latents are sampled."""
    launch: LaunchConfig = LaunchConfig()
    """Where it runs (one worker)."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    def __post_init__(self) -> None:
        if not self.prompts or not self.guidance:
            raise ValueError("a grid needs at least one prompt and one guidance scale")

    @property
    def request(self) -> str:
        """What identifies the picture beside the model."""
        return digest_of([self.prompts, self.guidance, self.seed, self.sampler.to_dict()])

    def picture_path(self) -> str:
        """Return where the picture lies: the same request of the same model has the same name."""
        name = digest_of([model_digest(load_card(self.model)), self.request])[:12]
        return storage.join(self.root, f"grid-{name}.png")


def sample_worker(
    config: SampleConfig, world: World, report: Callable[[Progress], None], should_stop: Callable[[], bool]
) -> Outcome:
    """Draw the grid in one process and write it."""
    model = load_text_to_image(config.model, world.device)
    columns = len(config.guidance)
    total = len(config.prompts) * columns
    images = model.generate(
        [prompt for prompt in config.prompts for _ in config.guidance],
        seeds=[config.seed + row for row in range(len(config.prompts)) for _ in config.guidance],
        guidance=list(config.guidance) * len(config.prompts),
        sampler=config.sampler,
        on_images=lambda done: report(Progress(done=done, total=total)),
    )
    settings = {"request": config.to_dict(), "model": model_digest(model.card)}
    path = config.picture_path()
    with storage.open_atomic(path) as file:
        info = PngInfo()
        info.add_text("settings", json.dumps(settings))
        grid_picture(images, config.prompts, config.guidance).save(file, "PNG", pnginfo=info)
    return {"is_finished": True, "picture": path}


def grid_picture(images: Pixels, prompts: tuple[str, ...], guidance: tuple[float, ...]) -> PILImage.Image:
    """Return one picture: a row for each prompt with its text, a column for each guidance scale."""
    columns = len(guidance)
    width = LABEL_WIDTH + columns * (CELL + GAP) + GAP
    height = HEADER + len(prompts) * (CELL + GAP) + GAP
    canvas = PILImage.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    for column, scale in enumerate(guidance):
        left = LABEL_WIDTH + GAP + column * (CELL + GAP)
        draw.text((left + CELL / 2, HEADER / 2 + 2), f"guidance {scale:g}", "black", font, anchor="mm")
    for row, prompt in enumerate(prompts):
        top = HEADER + row * (CELL + GAP)
        label = "\n".join(textwrap.wrap(prompt, 24)[:6])
        draw.multiline_text((GAP, top + CELL / 2), label, "black", font, anchor="lm", spacing=4)
        for column in range(columns):
            image = PILImage.fromarray(np.ascontiguousarray(images[row * columns + column]))
            left = LABEL_WIDTH + GAP + column * (CELL + GAP)
            canvas.paste(image.resize((CELL, CELL), PILImage.Resampling.LANCZOS), (left, top))
            draw.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline="#dddddd")
    return canvas
