"""What must be equal for two evaluations to be comparable, in one frozen config with one digest.

A number without its protocol's digest compares with nothing: a Fréchet distance moves with the number of images, the
sampler, the guidance scale, the image size and the features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm.config import Config
from ldm.evaluation.features import FeatureKind
from ldm.samplers.sample import SamplerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProtocol(Config):
    """How a model is evaluated; `digest()` names it. What can't change a number (batch size, device) is not in it."""

    num_images: int
    """Number of images to sample and compare."""
    split: str = "validation"
    """Split of the dataset that gives captions and reference images."""
    image_size: int = 64
    """Side of the compared images in pixels."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How latents are sampled."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    seed: int = 0
    """Seed of the images' noise."""
    features: FeatureKind = FeatureKind.EFFNETLITE0
    """Features of the Fréchet distance."""

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {self.num_images}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")
        if not self.split:
            raise ValueError("split must name a split of the dataset, got an empty string")
