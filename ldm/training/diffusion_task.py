"""Stage 2: a network learns to denoise latents under a condition (Rombach et al. 2022, eq. 3).

Order of a step: moments → posterior sample → scaled latent → noise and timestep of each row → network → loss → update.
Every draw of a row is a function of (seed, position of the row), so it does not matter which process trains on it.

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from ldm.conditioning.rows import RowConditions
from ldm.config import Config, added_later
from ldm.diffusion.process import Prediction, corrupt
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.evaluation.denoising import Denoising
from ldm.latents import LatentSpace
from ldm.losses.diffusion import ErrorNorm, Weighting, per_sample_loss
from ldm.randomness import Draw, normal, uniform
from ldm.training.engine import Engine
from ldm.training.optim import OptimConfig, learning_rate
from ldm.training.world import World
from ldm.types import Condition, Image, LatentBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig(Config):
    """What the network learns."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Noise schedule."""
    prediction: Prediction = Prediction.NOISE
    """What the network puts out: noise (the paper), velocity or clean."""
    weighting: Weighting = Weighting.UNIFORM
    """How timesteps weigh in the loss: uniform (the paper) or min_snr."""
    norm: ErrorNorm = added_later(ErrorNorm.L2)
    """How far an output is from its target in training: l2 or l1; validation always measures l2."""
    validation_rows: int = 384
    """Held-out rows of a validation, rounded down to a multiple of 64 (or to what there is, if less)."""

    def __post_init__(self) -> None:
        if self.norm is ErrorNorm.L1 and self.weighting is not Weighting.UNIFORM:
            raise ValueError(f"weighting {self.weighting.value} is made for squares: norm l1 goes with uniform")


class HeldOut(Protocol):
    """Held-out rows in a fixed order."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        ...

    def rows(self, start: int, stop: int) -> LatentBatch:
        """Return rows [start, stop), all of one shape, `samples` counting from 0, first captions, nothing dropped."""
        ...

    def spans(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
        """Yield rows [start, stop) in spans of at most `step` rows, all of one shape each."""
        ...


@dataclass(kw_only=True)
class DiffusionTask:
    """Trains one conditional denoiser.

    Attributes:
        engine: the engine around the network.
        objective: what is learned.
        optim: the learning rate's schedule.
        conditions: what the network is told of a batch's rows.
        held_out: validation rows.
        world: the group of processes.
        micro_batches: a process's rows → (start, stop) of each micro-batch.
        total_samples: length of the run, for the learning rate.
        seed: of all draws.
        preview: draws sample images with the current weights, or None.
    """

    engine: Engine
    objective: ObjectiveConfig
    optim: OptimConfig
    conditions: RowConditions
    held_out: HeldOut
    world: World
    micro_batches: Callable[[int], list[tuple[int, int]]]
    total_samples: int
    seed: int
    preview: Callable[[], dict[str, Image]] | None

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The one network that is trained."""
        return {"unet": self.engine}

    @property
    def space(self) -> LatentSpace:
        """Raw and scaled latents."""
        return self.conditions.space

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self.objective.schedule)

    def step(self, batch: LatentBatch, samples_seen: int, num_samples: int) -> dict[str, Tensor | float]:
        """Make one update; see `Task.step`."""
        parts = [batch.rows(start, stop) for start, stop in self.micro_batches(len(batch.keys))]
        losses: list[Tensor] = []
        lr = learning_rate(self.optim, samples_seen, self.total_samples)
        norm = self.engine.update(
            [partial(self._micro_loss, part, losses) for part in parts], lr, (samples_seen + num_samples, num_samples)
        )
        return {"loss": torch.stack(losses).mean(), "grad_norm": norm, "learning_rate": lr}

    def validate(self) -> dict[str, float]:
        """Return the denoising loss on held-out rows with the averaged weights."""
        num_rows = usable_rows(min(self.held_out.num_rows, self.objective.validation_rows))
        measure = Denoising(
            schedule=self._schedule, prediction=self.objective.prediction, space=self.space, num_rows=num_rows
        )
        spans = list(self.held_out.spans(0, num_rows, min(64, -(-num_rows // self.world.size))))
        total = torch.zeros((), device=self.world.device)
        with self.engine.averaged(), torch.no_grad():
            # Every rank makes as many forwards, since under ZeRO-3 each is one of all ranks; some of no account.
            for first in range(0, len(spans), self.world.size):
                number = first + self.world.rank
                rows = self.held_out.rows(*spans[min(number, len(spans) - 1)])
                losses = measure.losses(self._network, self._on_device(rows, self.conditions.whole(rows))).sum()
                total += losses if number < len(spans) else 0 * losses
        return {"validation_loss": float(self.world.mean(total)) * self.world.size / num_rows}

    def pictures(self) -> dict[str, Image]:
        """Return sample images of the averaged weights."""
        if self.preview is None:
            return {}
        with self.engine.averaged(), torch.no_grad():
            return self.preview()

    def _micro_loss(self, batch: LatentBatch, losses: list[Tensor]) -> Tensor:
        device = self.world.device
        rows = batch.samples.tolist()
        shape = (self.space.num_channels, *batch.moments.shape[-2:])
        noise = normal(self.seed, Draw.NOISE, rows, shape).to(device)
        posterior_noise = None
        if self.space.kind.has_log_variance:
            posterior_noise = normal(self.seed, Draw.POSTERIOR, rows, shape).to(device)
        timestep = (uniform(self.seed, Draw.TIMESTEP, rows) * self._schedule.num_timesteps).floor().float().to(device)
        on_device = self._on_device(batch, self.conditions.drawn(batch))
        clean = self.space.scaled(on_device.moments, posterior_noise)
        at = self._schedule.scales(timestep)
        noisy = corrupt(clean, noise, at)
        output = self._network(noisy, timestep, on_device.condition).float()
        objective = self.objective
        loss = per_sample_loss(
            objective.prediction, output, clean, noise, at, objective.weighting, objective.norm
        ).mean()
        losses.append(loss.detach())
        return loss

    def _network(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return call_in_own_dtype(self.engine, noisy, timestep, condition)

    def _on_device(self, batch: LatentBatch, condition: Condition) -> LatentBatch:
        """Return the batch on the device; columns have become the condition and stay behind."""
        device = self.world.device
        return LatentBatch(
            keys=batch.keys,
            samples=batch.samples,
            moments=batch.moments.to(device, torch.float32, non_blocking=True),
            condition=condition.to(device, torch.float32),
        )


def call_in_own_dtype(engine: Engine, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Call an engine's wrapped network in the dtype of its weights and return its output in the caller's."""
    dtype = next(engine.raw.parameters()).dtype
    output: Tensor = engine.wrapped(noisy.to(dtype), timestep, condition.to(noisy.device, dtype))
    return output.to(noisy.dtype)


def usable_rows(num_rows: int) -> int:
    """Return the rows that a validation takes, so that every number of processes up to 64 shares them evenly."""
    return num_rows // 64 * 64 or num_rows
