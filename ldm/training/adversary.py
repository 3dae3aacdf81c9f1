"""The discriminator of stage 1: its term in the autoencoder's loss, its own update, and what keeps the two in balance.

    term     share w_d lambda generator        lambda of the global batch's gradients; share is the guard's
    update   hinge(real, fake) + r1_weight / 2 R1 + lecam_weight LeCAM

The two networks' statistics (adaptive weight, batch norm, moving averages) are those of the global batch.

Letters: b batch, y and x pixels, p and q patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.losses.autoencoder import (
    accuracy,
    adaptive_weight,
    anchor_penalty,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from ldm.losses.discriminator import Discriminator
from ldm.training.engine import Engine
from ldm.training.guard import Guard, GuardMeasure
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.world import World
from ldm.types import Image

Terms = dict[str, Tensor | float]


class LecamAnchors(nn.Module):
    """Moving averages of the mean logits of real and of reconstructed images."""

    real: Tensor
    fake: Tensor
    has_begun: Tensor

    def __init__(self, half_life_samples: int) -> None:
        super().__init__()
        self._half_life_samples = half_life_samples
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))
        self.register_buffer("has_begun", torch.zeros(()))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, num_samples: int) -> None:
        """Move towards the global batch's mean logits; the first are taken over whole."""
        share = 1.0 - self.has_begun * 0.5 ** (num_samples / self._half_life_samples)
        self.real.lerp_(real.to(self.real.dtype), share)
        self.fake.lerp_(fake.to(self.fake.dtype), share)
        self.has_begun.fill_(1.0)


def build_discriminator(config: ReconstructionConfig, world: World) -> Discriminator:
    """Return the network, whose batch norm sees the global batch."""
    total = world.total if world.size > 1 else None
    return Discriminator(config.discriminator_channels, config.discriminator_layers, total)


def build_memory(config: ReconstructionConfig, world: World, notice: Callable[[str], None]) -> nn.ModuleDict:
    """Return what an adversary remembers beside its weights, by name; empty where no option needs it."""
    memory = nn.ModuleDict()
    if config.lecam_weight:
        memory["anchors"] = LecamAnchors(config.lecam_half_life_samples)
    if config.guard.measure is not GuardMeasure.NONE:
        memory["guard"] = Guard(config.guard, notice)
    return memory.to(world.device)


@dataclass(kw_only=True)
class Adversary:
    """A discriminator at work.

    Attributes:
        engine: around the discriminator.
        config: the terms and their weights.
        world: the group of processes.
        memory: of `build_memory`.
    """

    engine: Engine
    config: ReconstructionConfig
    world: World
    memory: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    def term(
        self, reconstruction: Tensor, made: Image, last_layer: nn.Parameter, terms: Terms, max_weight: float
    ) -> Tensor:
        """Return what the autoencoder's loss gains by being judged, and leave its metrics in `terms`.

        Args:
            reconstruction: the rest of the loss that depends on pixels, which the adaptive weight compares with.
            made: reconstructions, with their graph.
            last_layer: the decoder's last weight.
            terms: metrics of the step.
            max_weight: bound of the adaptive weight.
        """
        judge = self.engine.raw.requires_grad_(False)
        generator = generator_loss(judge(made))
        judge.requires_grad_(True)
        weight = adaptive_weight(reconstruction, generator, last_layer, self.world.mean, max_weight)
        terms |= {"generator_loss": generator.detach(), "adaptive_weight": weight}
        weighted: Tensor = self.config.adversarial_weight * weight * generator
        guard = self._guard
        if guard is not None:
            terms["adversarial_share"] = guard.share
            weighted = weighted * guard.share
        return weighted

    def update(
        self, images: Image, made: Image, lr: float, clock: tuple[int, int], terms: Terms, is_lost: Tensor
    ) -> Tensor:
        """Let the discriminator learn from a batch, if the guard lets it, and leave its metrics in `terms`.

        Args:
            images: real ones.
            made: their reconstructions, without a graph.
            lr: learning rate of the step.
            clock: (samples seen at the end of the step, samples of the step).
            terms: metrics of the step.
            is_lost: whether the autoencoder's step was left out, so that this one must be too; bool, shape ().

        Returns:
            Whether the discriminator's step was left out, shape (), not yet read back from the device.
        """
        guard = self._guard
        is_left_out = torch.zeros_like(is_lost)
        if guard is None or guard.is_learning:
            spoilt = torch.where(is_lost, float("nan"), 1.0)
            norm = self.engine.update([lambda: spoilt * self._loss(images, made, clock, terms)], lr, clock)
            is_left_out = ~norm.isfinite()
        else:
            with torch.no_grad():
                self._logits(images, made, terms)
        if guard is not None:
            name = "logit_gap" if guard.config.measure is GuardMeasure.LOGIT_GAP else "discriminator_accuracy"
            guard.update(self.world.mean(torch.as_tensor(terms[name])), clock)
        return is_left_out

    def _loss(self, images: Image, made: Image, clock: tuple[int, int], terms: Terms) -> Tensor:
        config = self.config
        images = images.detach().requires_grad_() if config.r1_weight else images
        real, fake = self._logits(images, made, terms)
        loss = discriminator_loss(config.adversarial_loss, real, fake)
        terms["discriminator_loss"] = loss.detach()
        if config.r1_weight:
            penalty = gradient_penalty(real, images)
            terms["r1"] = penalty.detach()
            loss = loss + 0.5 * config.r1_weight * penalty
        if config.lecam_weight:
            anchors = self.memory["anchors"]
            assert isinstance(anchors, LecamAnchors)
            anchors.update(self.world.mean(real.mean()), self.world.mean(fake.mean()), clock[1])
            penalty = anchor_penalty(real, fake, anchors.real, anchors.fake)
            terms["lecam"] = penalty.detach()
            loss = loss + config.lecam_weight * penalty
        return loss

    def _logits(self, images: Image, made: Image, terms: Terms) -> tuple[Tensor, Tensor]:
        real, fake = self.engine.wrapped(images, made).chunk(2)
        terms["logit_gap"] = (real.mean() - fake.mean()).detach()
        if self._guard is not None:
            terms["discriminator_accuracy"] = accuracy(real, fake)
        return real, fake

    @property
    def _guard(self) -> Guard | None:
        return next((module for module in self.memory.values() if isinstance(module, Guard)), None)
