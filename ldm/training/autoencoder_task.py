"""Stage 1: an autoencoder against a patch discriminator (Rombach et al. 2022, appendix G; Esser et al. 2021).

    KL      L1 + w_p perceptual + w_kl KL + lambda w_d generator        lambda balances the two gradients
    VQ      L1 + w_p perceptual + codebook + beta commitment + lambda w_d generator
    discriminator   hinge(real, fake)

The loss is in means over pixel values. KL is a sum over latent elements divided by the number of pixel values, so that
`kl_weight` is the paper's: 1e-6 on sums.

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ldm.autoencoder.codebook import Chosen, CodebookMemory, codebook_loss
from ldm.autoencoder.model import Autoencoder, Reconstruction
from ldm.autoencoder.regularizer import Regularizer
from ldm.evaluation.latent_statistics import LatentStatistics
from ldm.losses.autoencoder import max_adaptive_weight, pixel_loss
from ldm.randomness import Draw, normal
from ldm.training.adversary import Adversary, Terms
from ldm.training.autoencoder_validation import AutoencoderValidation, ImageRows
from ldm.training.engine import Engine
from ldm.training.optim import OptimConfig, learning_rate, restore_where
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.saved_state import Resumable, SavedState
from ldm.training.task import NotFiniteError
from ldm.training.world import World
from ldm.types import Image, Latent, SampleIndex


def _unknown_flops(_: bool) -> float:
    return 0.0


@dataclass(kw_only=True)
class AutoencoderTask:
    """Trains an autoencoder and its discriminator in turns.

    Attributes:
        autoencoder: the engine around the autoencoder.
        adversary: the discriminator and its engine.
        codebook: what the training of a codebook remembers; None for KL.
        perceptual: (image, reconstruction) → distance of each row.
        config: the terms and their weights.
        optim: the learning rate's schedule, for both.
        validation: what is measured of held-out images.
        world: the group of processes.
        total_samples: length of the run, for the learning rate.
        seed: of all draws.
        row_flops: whether it is against the discriminator → FLOPs of a row's passes in a step.
    """

    autoencoder: Engine
    adversary: Adversary
    codebook: CodebookMemory | None
    perceptual: Callable[[Tensor, Tensor], Tensor]
    config: ReconstructionConfig
    optim: OptimConfig
    validation: AutoencoderValidation
    world: World
    total_samples: int
    seed: int
    row_flops: Callable[[bool], float] = _unknown_flops

    @property
    def engines(self) -> Mapping[str, Resumable]:
        """Both networks, by name, and what else a resumed run goes on from."""
        parts: dict[str, Resumable] = {"autoencoder": self.autoencoder, "discriminator": self.adversary.engine}
        if self.codebook is not None:
            parts["codebook"] = SavedState(self.codebook, self.world)
        if len(self.adversary.memory):
            parts["adversary"] = SavedState(self.adversary.memory, self.world)
        return parts

    def step(self, batch: ImageRows, samples_seen: int, num_samples: int) -> Terms:
        """Update the autoencoder, then the discriminator on what it made, then the codebook; see `Task.step`.

        Raises:
            NotFiniteError: if the batch holds numbers that are not finite, naming the rows.
        """
        _refuse_nonfinite(batch, samples_seen)
        images = batch.images.to(self.world.device)
        lr = learning_rate(self.optim, samples_seen, self.total_samples)
        clock = (samples_seen + num_samples, num_samples)
        terms: Terms = {"learning_rate": lr}
        is_adversarial = self._is_adversarial(samples_seen)
        passed: list[Reconstruction] = []
        loss = partial(self._loss, images, batch.samples, terms, passed, is_adversarial=is_adversarial)
        memory = self._memory(is_adversarial=is_adversarial)
        before = [tensor.detach().clone() for tensor in memory]
        grad_norm = self.autoencoder.update([loss], lr, clock)
        terms["grad_norm"] = grad_norm
        is_lost = ~grad_norm.isfinite()
        if is_adversarial:
            is_lost = is_lost | self.adversary.update(images, passed[0].image.detach(), lr, clock, terms, is_lost)
        if self.codebook is not None:
            self._move_codes(self.codebook, passed[0], batch.samples - samples_seen, clock, terms)
        restore_where(is_lost, memory, before)
        return terms

    def flops(self, batch: ImageRows, samples_seen: int) -> float:
        """Return the FLOPs of a step; see `Task.flops`."""
        return len(batch.images) * self.row_flops(self._is_adversarial(samples_seen))

    def validate(self) -> dict[str, float]:
        """Return the scores of held-out reconstructions with the averaged weights."""
        with self.autoencoder.averaged():
            return self.validation.scores(self._raw_autoencoder())

    def latent_statistics(self) -> LatentStatistics:
        """Return the statistics of the held-out split's latents with the averaged weights."""
        with self.autoencoder.averaged():
            return self.validation.latent_statistics(self._raw_autoencoder())

    def pictures(self) -> dict[str, Image]:
        """Return held-out images, each beside its reconstruction."""
        with self.autoencoder.averaged():
            return {"reconstructions": self.validation.pictures(self._raw_autoencoder())}

    def _loss(
        self, images: Image, samples: SampleIndex, terms: Terms, passed: list[Reconstruction], *, is_adversarial: bool
    ) -> Tensor:
        """Return the loss of one batch and leave what the forward pass gave in `passed`."""
        config, network = self.config, self._raw_autoencoder()
        made: Reconstruction = self.autoencoder.wrapped(images, self._noise(images, samples))
        passed.append(made)
        shown = config.perceptual_rows or len(images)
        pixel = pixel_loss(config.pixel_loss, images, made.image)
        distance = torch.zeros_like(pixel)
        if config.perceptual_weight:
            distance = self.perceptual(images[:shown], made.image[:shown]).mean()
        reconstruction = pixel + config.perceptual_weight * distance
        loss: Tensor = reconstruction + self._regularization(made, images[0].numel(), terms)
        terms |= {"loss": loss.detach(), "pixel_loss": pixel.detach(), "perceptual_loss": distance.detach()}
        if is_adversarial:
            largest = max_adaptive_weight(network.config.regularizer, images[0].numel())
            loss = loss + self.adversary.term(reconstruction, made.image, network.last_layer, terms, largest)
        return loss

    def _is_adversarial(self, samples_seen: int) -> bool:
        return self.config.adversarial_weight > 0 and samples_seen >= self.config.adversarial_start

    def _noise(self, images: Image, samples: SampleIndex) -> Latent | None:
        config = self._raw_autoencoder().config
        if config.regularizer is Regularizer.VQ:
            return None
        shape = (config.latent_channels, *(side // config.factor for side in images.shape[-2:]))
        return normal(self.seed, Draw.POSTERIOR, samples.tolist(), shape).to(images.device)

    def _regularization(self, made: Reconstruction, pixel_values: int, terms: Terms) -> Tensor:
        if made.quantized is not None:
            loss = codebook_loss(self.config.codebook, made.quantized)
            terms |= {"codebook_loss": loss.detach(), "commitment": made.quantized.commitment_loss.mean().detach()}
            return loss
        assert made.kl is not None
        kl = made.kl.mean()
        terms["kl"] = kl.detach()
        return self.config.kl_weight * kl / pixel_values

    def _memory(self, *, is_adversarial: bool) -> list[Tensor]:
        """Return what a step changes beside weights that have an optimizer, which leaves a lost step out by itself."""
        quantizer = self._raw_autoencoder().quantize
        codes = [] if self.codebook is None or quantizer is None else [quantizer.embedding.weight]
        codebook = [] if self.codebook is None else [*self.codebook.buffers()]
        adversary = [*self.adversary.memory.buffers(), *self.adversary.engine.raw.buffers()] if is_adversarial else []
        return [*codes, *codebook, *adversary]

    def _move_codes(
        self,
        codebook: CodebookMemory,
        made: Reconstruction,
        rows: SampleIndex,
        clock: tuple[int, int],
        terms: Terms,
    ) -> None:
        quantizer = self._raw_autoencoder().quantize
        assert quantizer is not None
        assert made.quantized is not None
        chosen = Chosen(latent=made.moments.detach(), codes=made.quantized.codes, rows=rows)
        terms |= codebook.update(quantizer, chosen, clock, self.world.total)

    def _raw_autoencoder(self) -> Autoencoder:
        network = self.autoencoder.raw
        assert isinstance(network, Autoencoder)
        return network


def _refuse_nonfinite(batch: ImageRows, samples_seen: int) -> None:
    """Look at a batch while it is on the CPU, where that costs nothing beside a step."""
    is_lost = ~batch.images.flatten(1).isfinite().all(dim=1)
    if bool(is_lost.any()):
        rows = ", ".join(str(sample) for sample in batch.samples[is_lost].tolist())
        raise NotFiniteError(
            f"images are not finite at {samples_seen:,} samples, in the rows at positions {rows}: look at the data"
        )
