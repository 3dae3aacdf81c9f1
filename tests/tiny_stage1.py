"""A tiny stage-1 training on drawn images in memory, in this process or as one of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.wiring.train_autoencoder import TrainAutoencoderConfig, build_task
from ldm.autoencoder.codebook import CodebookConfig, CodebookUpdate
from ldm.autoencoder.model import AutoencoderConfig, quantized
from ldm.training.autoencoder_task import AutoencoderTask
from ldm.training.ema import EmaConfig
from ldm.training.guard import GuardConfig, GuardedSide, GuardMeasure
from ldm.training.local_launch import LaunchConfig, Where
from ldm.training.loop import LoopConfig, Progress
from ldm.training.optim import OptimConfig
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.tracking_config import TrackingConfig
from ldm.training.world import World

BATCH, SIDE = 4, 32
KL = AutoencoderConfig(latent_channels=3, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
VQ = quantized(KL, num_codes=24)
LOSS = ReconstructionConfig(
    perceptual_weight=0.5, adversarial_start=0, discriminator_channels=4, discriminator_layers=2, validation_rows=0
)
GUARD = GuardConfig(
    measure=GuardMeasure.LOGIT_GAP, begins_above=0.004, ends_below=0.002, half_life_samples=2, side=GuardedSide.BOTH
)
EVERYTHING = replace(
    LOSS,
    codebook=CodebookConfig(update=CodebookUpdate.MOVING_AVERAGE, half_life_samples=16, revive_after_samples=8),
    r1_weight=0.1,
    lecam_weight=0.01,
    lecam_half_life_samples=8,
    guard=GUARD,
)


class Rows(NamedTuple):
    """Rows of a batch."""

    samples: Tensor
    images: Tensor

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(f"drawn-{sample}" for sample in self.samples.tolist())


@dataclass(frozen=True)
class DrawnImages:
    """Smooth images that are a function of their number."""

    num_rows: int
    first: int = 1_000_000

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(
            torch.arange(start, stop), torch.stack([drawn_image(self.first + row) for row in range(start, stop)])
        )


class DrawnLoader:
    """A rank's rows of an endless sequence of drawn images."""

    wait_seconds = 0.0

    def __init__(self, world: World) -> None:
        self._world = world

    def batches(self, samples_seen: int):
        while True:
            yield batch_at(samples_seen, self._world)
            samples_seen += BATCH


def drawn_image(number: int) -> Tensor:
    """Return an image that nothing but its number decides, in the default dtype."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    return smooth[0].to(torch.get_default_dtype())


def batch_at(samples_seen: int, world: World) -> Rows:
    """Return a rank's share of a batch."""
    samples = torch.arange(samples_seen + world.rank, samples_seen + BATCH, world.size)
    return Rows(samples, torch.stack([drawn_image(int(sample)) for sample in samples]))


def stage1_config(
    folder: Path | str,
    autoencoder: AutoencoderConfig = KL,
    loss: ReconstructionConfig = LOSS,
    total_samples: int = 24,
) -> TrainAutoencoderConfig:
    """Return the configuration of a tiny training."""
    return TrainAutoencoderConfig(
        root=str(folder),
        record=f"{folder}-record",
        dataset="none",
        autoencoder=autoencoder,
        loss=loss,
        optim=OptimConfig(lr=2e-3, beta1=0.5, beta2=0.9),
        ema=EmaConfig(half_life_samples=32),
        loop=LoopConfig(
            total_samples=total_samples, log_every=4, validate_every=0, picture_every=0, checkpoint_every=8
        ),
        launch=LaunchConfig(where=Where.HERE),
        tracking=TrackingConfig(uri=""),
        batch_size=BATCH,
        num_streams=2,
    )


def stage1_task(
    config: TrainAutoencoderConfig, world: World, report: Callable[[Progress], None] = lambda _: None
) -> AutoencoderTask:
    """Return the task of a training with nine held-out images."""
    return build_task(config, world, DrawnImages(9), report)


def train_steps(task: AutoencoderTask, world: World, steps: Sequence[int]) -> list[dict[str, float]]:
    """Train on this rank's rows of each batch and return the metrics, means over ranks."""
    metrics = []
    for step in steps:
        terms = task.step(batch_at(step * BATCH, world), step * BATCH, BATCH)
        metrics.append({name: float(world.mean(torch.as_tensor(value).double())) for name, value in terms.items()})
    return metrics


def state_of(task: AutoencoderTask) -> dict[str, Tensor]:
    """Return every number that a resumed run would go on from, but the optimizers'."""
    parts = {
        "autoencoder": task.autoencoder.raw.state_dict(),
        "average": task.autoencoder.weights(),
        "discriminator": task.adversary.engine.raw.state_dict(),
        "adversary": task.adversary.memory.state_dict(),
        "codebook": {} if task.codebook is None else task.codebook.state_dict(),
    }
    return {f"{part}.{name}": value.detach().clone() for part, state in parts.items() for name, value in state.items()}
