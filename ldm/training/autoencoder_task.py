"""Stage 1: an autoencoder against a patch discriminator (Rombach et al. 2022, appendix G; Esser et al. 2021).

    autoencoder     L1 + w_p perceptual + w_kl KL + lambda w_d generator        lambda balances the two gradients
    discriminator   hinge(real, fake)

The loss is in means over pixel values. KL is a sum over latent elements divided by the number of pixel values, so that
`kl_weight` is the paper's: 1e-6 on sums.

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.autoencoder import regularizer
from ldm.autoencoder.model import Autoencoder
from ldm.config import Config
from ldm.evaluation.scores import psnr, ssim
from ldm.losses.autoencoder import adaptive_weight, generator_loss, hinge_discriminator_loss
from ldm.losses.perceptual import PerceptualConfig
from ldm.randomness import Draw, normal
from ldm.training.engine import Engine
from ldm.training.optim import OptimConfig, learning_rate
from ldm.training.world import World
from ldm.types import Image, SampleIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig(Config):
    """The terms of the first stage's loss."""

    perceptual: PerceptualConfig = PerceptualConfig()
    """Which perceptual distance."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance beside the mean absolute pixel error."""
    perceptual_rows: int = 0
    """Rows of each worker's share of a batch that the perceptual distance looks at (it is slow on a CPU); 0 for all."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, in the paper's units (sums over elements)."""
    adversarial_weight: float = 0.5
    """Weight of the generator term on top of its adaptive weight; 0 trains without a discriminator."""
    adversarial_start: int = 50_001
    """Samples after which the generator term counts and the discriminator starts to learn."""
    validation_rows: int = 256
    """Held-out images of a validation."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Strided layers of the discriminator: 3 judges 70x70 pixel patches, 2 judges 34x34."""


class ImageRows(Protocol):
    """A batch of images and their positions in the training sequence."""

    @property
    def samples(self) -> SampleIndex:
        """Positions of the rows."""
        ...

    @property
    def images(self) -> Image:
        """Pixels in [-1, 1]."""
        ...


class HeldOutImages(Protocol):
    """Held-out images in a fixed order."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        ...

    def rows(self, start: int, stop: int) -> ImageRows:
        """Return rows [start, stop)."""
        ...


@dataclass(kw_only=True)
class AutoencoderTask:
    """Trains an autoencoder and its discriminator in turns.

    Attributes:
        autoencoder: the engine around the autoencoder.
        discriminator: the engine around the discriminator.
        perceptual: (image, reconstruction) → distance of each row.
        config: the terms and their weights.
        optim: the learning rate's schedule, for both.
        held_out: validation images.
        world: the group of processes.
        total_samples: length of the run, for the learning rate.
        seed: of all draws.
    """

    autoencoder: Engine
    discriminator: Engine
    perceptual: Callable[[Tensor, Tensor], Tensor]
    config: ReconstructionConfig
    optim: OptimConfig
    held_out: HeldOutImages
    world: World
    total_samples: int
    seed: int

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Both networks, by name."""
        return {"autoencoder": self.autoencoder, "discriminator": self.discriminator}

    def step(self, batch: ImageRows, samples_seen: int, num_samples: int) -> dict[str, Tensor | float]:
        """Update the autoencoder, then the discriminator on what it made; see `Task.step`."""
        images = batch.images.to(self.world.device)
        lr = learning_rate(self.optim, samples_seen, self.total_samples)
        clock = (samples_seen + num_samples, num_samples)
        terms: dict[str, Tensor | float] = {"learning_rate": lr}
        is_adversarial = self.config.adversarial_weight > 0 and samples_seen >= self.config.adversarial_start
        made: list[Image] = []
        loss = partial(self._autoencoder_loss, images, batch.samples, terms, made if is_adversarial else None)
        terms["grad_norm"] = self.autoencoder.update([loss], lr, clock)
        if is_adversarial:
            self.discriminator.update([partial(self._discriminator_loss, images, made[0], terms)], lr, clock)
        return terms

    def validate(self) -> dict[str, float]:
        """Return PSNR, SSIM and the perceptual distance of held-out reconstructions with the averaged weights."""
        num_rows = min(self.held_out.num_rows, self.config.validation_rows)
        rows = range(self.world.rank, num_rows // self.world.size * self.world.size, self.world.size)
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        network = self._raw_autoencoder()
        with self.autoencoder.averaged(), torch.no_grad():
            for start in range(0, len(rows), 32):
                images = self._held_out_images(rows[start : start + 32])
                made = network.reconstruct(images).clamp(-1, 1)
                shown = self.config.perceptual_rows or len(images)
                distance = self.perceptual(images[:shown], made[:shown]).mean() * len(images)
                sums += torch.stack([psnr(images, made).sum(), ssim(images, made).sum(), distance]).double()
        means = (self.world.mean(sums) / max(1, len(rows))).tolist()
        return dict(zip(("validation_psnr_db", "validation_ssim", "validation_perceptual"), means, strict=True))

    def pictures(self) -> dict[str, Image]:
        """Return held-out images, each beside its reconstruction."""
        network = self._raw_autoencoder()
        images = self._held_out_images(range(min(8, self.held_out.num_rows)))
        with self.autoencoder.averaged(), torch.no_grad():
            made = network.reconstruct(images)
        return {"reconstructions": torch.stack([images, made], dim=1).flatten(0, 1)}

    def _autoencoder_loss(
        self, images: Image, samples: SampleIndex, terms: dict[str, Tensor | float], judged: list[Image] | None
    ) -> Tensor:
        """Return the loss of one batch; under an adversary its reconstructions are left in `judged`."""
        config, network = self.config, self._raw_autoencoder()
        shape = (network.config.latent_channels, *(side // network.config.factor for side in images.shape[-2:]))
        noise = normal(self.seed, Draw.POSTERIOR, samples.tolist(), shape).to(images.device)
        made, moments = self.autoencoder.wrapped(images, noise)
        shown = config.perceptual_rows or len(images)
        pixel = (images - made).abs().mean()
        distance = self.perceptual(images[:shown], made[:shown]).mean() if config.perceptual_weight else pixel * 0
        reconstruction = pixel + config.perceptual_weight * distance
        kl = regularizer.kl_divergence(moments).mean()
        loss: Tensor = reconstruction + config.kl_weight * kl / images[0].numel()
        terms |= {"loss": loss.detach(), "pixel_loss": pixel.detach(), "perceptual_loss": distance.detach()}
        terms["kl"] = kl.detach()
        if judged is not None:
            judged.append(made.detach())
            loss = loss + self._adversarial(reconstruction, made, network.last_layer, terms)
        return loss

    def _adversarial(
        self, reconstruction: Tensor, made: Image, last_layer: nn.Parameter, terms: dict[str, Tensor | float]
    ) -> Tensor:
        judge = self.discriminator.raw.requires_grad_(False)
        generator = generator_loss(judge(made))
        judge.requires_grad_(True)
        weight = adaptive_weight(reconstruction, generator, last_layer)
        terms |= {"generator_loss": generator.detach(), "adaptive_weight": weight}
        weighted: Tensor = self.config.adversarial_weight * weight * generator
        return weighted

    def _discriminator_loss(self, images: Image, fake: Image, terms: dict[str, Tensor | float]) -> Tensor:
        # One forward for both halves: a data-parallel wrapper synchronises only what its last forward saw.
        real_logits, fake_logits = self.discriminator.wrapped(torch.cat([images, fake])).chunk(2)
        loss = hinge_discriminator_loss(real_logits, fake_logits)
        terms |= {"discriminator_loss": loss.detach(), "logit_gap": (real_logits.mean() - fake_logits.mean()).detach()}
        return loss

    def _raw_autoencoder(self) -> Autoencoder:
        network = self.autoencoder.raw
        assert isinstance(network, Autoencoder)
        return network

    def _held_out_images(self, rows: range) -> Image:
        parts = [self.held_out.rows(row, row + 1).images for row in rows]
        return torch.cat(parts).to(self.world.device)
