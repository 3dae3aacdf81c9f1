"""What is measured of held-out images and their reconstructions, each process on its share of the split.

Order: images → moments → mode of the latent (→ codes) → reconstruction → sums of scores → sums over processes.

Letters: b batch, c latent channel, h latent row, w latent column, y and x pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.quantizer import perplexity_of_counts, usage_of_counts
from ldm.autoencoder.regularizer import mode
from ldm.evaluation.frechet import frechet_distance, statistics_of
from ldm.evaluation.latent_statistics import NUM_SUMS, LatentStatistics, latent_sums, statistics_of_sums
from ldm.evaluation.scores import psnr, ssim
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.world import World
from ldm.types import Image, SampleIndex

BATCH = 32
NUM_PICTURES = 8
SCORES = ("validation_psnr_db", "validation_ssim", "validation_perceptual")


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
class AutoencoderValidation:
    """Measures an autoencoder on held-out images.

    Attributes:
        held_out: the images.
        perceptual: (image, reconstruction) → distance of each row.
        features: image → features of a Fréchet distance; None measures none.
        config: how many images, and how many of a batch the perceptual distance looks at.
        world: the group of processes.
    """

    held_out: HeldOutImages
    perceptual: Callable[[Tensor, Tensor], Tensor]
    features: nn.Module | None
    config: ReconstructionConfig
    world: World

    @torch.no_grad()
    def scores(self, network: Autoencoder) -> dict[str, float]:
        """Return PSNR, SSIM and perceptual distance; Fréchet distance where asked for; for VQ the codebook's use."""
        num_rows = min(self.held_out.num_rows, self.config.validation_rows or self.held_out.num_rows)
        sums = torch.zeros(len(SCORES), dtype=torch.float64, device=self.world.device)
        counts = torch.zeros(max(1, network.config.num_codes), dtype=torch.int64, device=self.world.device)
        features: list[tuple[Tensor, Tensor]] = []
        for images in self._batches(num_rows):
            latent = mode(network.encode(images), network.config.latent_kind)
            made = network.decode(latent).clamp(-1, 1)
            shown = self.config.perceptual_rows or len(images)
            distance = self.perceptual(images[:shown], made[:shown]).mean() * len(images)
            sums += torch.stack([psnr(images, made).sum(), ssim(images, made).sum(), distance]).double()
            if network.quantize is not None:
                counts += torch.bincount(network.quantize.codes(latent).flatten(), minlength=len(counts))
            if self.features is not None:
                features.append((self.features(images).cpu(), self.features(made).cpu()))
        means = (self.world.total(sums) / max(1, num_rows)).tolist()
        measured = dict(zip(SCORES, means, strict=True))
        if network.quantize is not None:
            counts = self.world.total(counts)
            measured["validation_codebook_usage"] = float(usage_of_counts(counts))
            measured["validation_codebook_perplexity"] = float(perplexity_of_counts(counts))
        return {**measured, **self._distance(features, num_rows)}

    @torch.no_grad()
    def latent_statistics(self, network: Autoencoder) -> LatentStatistics:
        """Return mean, deviation and scale factor of the latents of the whole split, whatever a validation takes."""
        kind = network.config.latent_kind
        num_channels = network.config.latent_channels
        sums = torch.zeros(NUM_SUMS, num_channels, dtype=torch.float64, device=self.world.device)
        for images in self._batches(self.held_out.num_rows):
            sums += latent_sums(network.encode(images), kind)
        return statistics_of_sums(self.world.total(sums).cpu(), self.held_out.num_rows)

    @torch.no_grad()
    def pictures(self, network: Autoencoder) -> Image:
        """Return the first held-out images, each beside its reconstruction."""
        images = self._images(range(min(NUM_PICTURES, self.held_out.num_rows)))
        return torch.stack([images, network.reconstruct(images)], dim=1).flatten(0, 1)

    def _distance(self, features: list[tuple[Tensor, Tensor]], num_rows: int) -> dict[str, float]:
        if self.features is None or self.config.validation_features is None:
            return {}
        shares = [pair for share in self.world.gather(features) for pair in share]
        real, made = (statistics_of(torch.cat(parts)) for parts in zip(*shares, strict=True))
        name = self.config.validation_features.value.lower().replace("-", "_")
        return {f"validation_{name}": frechet_distance(real, made), "validation_fd_num_images": float(num_rows)}

    def _batches(self, num_rows: int) -> Iterator[Image]:
        """Yield this process's images of the first `num_rows`."""
        mine = range(self.world.rank, num_rows, self.world.size)
        for start in range(0, len(mine), BATCH):
            yield self._images(mine[start : start + BATCH])

    def _images(self, rows: range) -> Image:
        parts = [self.held_out.rows(row, row + 1).images for row in rows]
        return torch.cat(parts).to(self.world.device)
