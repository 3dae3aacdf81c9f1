"""The terms of the first stage's loss and what is measured of its reconstructions."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.autoencoder.codebook import CodebookConfig
from ldm.config import Config, added_later
from ldm.evaluation.features import FeatureKind
from ldm.losses.autoencoder import AdversarialLoss, PixelLoss
from ldm.losses.perceptual import PerceptualConfig
from ldm.training.guard import GuardConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig(Config):
    """The terms of the first stage's loss."""

    perceptual: PerceptualConfig = PerceptualConfig()
    """Which perceptual distance."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance beside the mean pixel error."""
    perceptual_rows: int = 0
    """Rows of each worker's share of a batch, and of each 32 validated ones, that the perceptual distance looks at (it
    is slow on a CPU); 0 for all.
    """
    kl_weight: float = 1e-6
    """Weight of the KL divergence in the paper's units, where KL and pixel errors are sums over elements.

    Our loss is that sum over the number of pixel values, so the balance is the paper's at any size. Beside a mean KL
    1e-6 would be 1e-6 (latent elements) / (pixel values): 6.25e-8 for kl-f4, 2.08e-8 for kl-f8, kl-f16 and kl-f32.
    """
    adversarial_weight: float = 0.5
    """Weight of the generator term on top of its adaptive weight; 0 trains without a discriminator."""
    adversarial_start: int = 50_001
    """Samples that the autoencoder has seen when the generator term begins and the discriminator starts to learn.

    The paper's disc_start counts the autoencoder's steps, not those of both optimizers: 50,001 there are 50,001 times
    the batch size here.
    """
    validation_rows: int = 256
    """Held-out images of a validation; 0 for all."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Strided layers of the discriminator: 3 judges 70x70 pixel patches, 2 judges 34x34."""
    pixel_loss: PixelLoss = added_later(PixelLoss.L1)
    """l1, the paper's mean absolute error, or l2, the mean squared one."""
    codebook: CodebookConfig = added_later(CodebookConfig())
    """How the codebook is trained; vq only."""
    adversarial_loss: AdversarialLoss = added_later(AdversarialLoss.HINGE)
    """What the discriminator learns from: hinge, the paper's, or vanilla."""
    r1_weight: float = added_later(0.0)
    """Weight gamma of the R1 penalty gamma / 2 |gradient|^2 on real images; 0 for none (a second backward pass)."""
    lecam_weight: float = added_later(0.0)
    """Weight of LeCAM, which keeps each side's logits near the other's moving average; 0 for none, 0.001 is usual."""
    lecam_half_life_samples: int = added_later(1_000)
    """Half-life of those moving averages; the usual decay of 0.99 a step is one of 69 batches."""
    guard: GuardConfig = added_later(GuardConfig())
    """What is done while the discriminator wins."""
    validation_features: FeatureKind | None = added_later(None)
    """Features of a Frechet distance between held-out images and their reconstructions; none measures none."""

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "kl_weight", "adversarial_weight", "r1_weight", "lecam_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} can't be negative, got {getattr(self, name)}")
        for name in ("perceptual_rows", "adversarial_start", "validation_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} can't be negative, got {getattr(self, name)}")
        if self.lecam_half_life_samples < 1:
            raise ValueError(f"loss.lecam_half_life_samples must be at least 1, got {self.lecam_half_life_samples}")
        if self.validation_rows == 1 and self.validation_features is not None:
            raise ValueError("loss.validation_features needs at least 2 loss.validation_rows, got 1")
