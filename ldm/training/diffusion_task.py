"""Stage 2: a network learns to denoise latents under a condition (Rombach et al. 2022, eq. 3).

Order of a step: moments → posterior sample → scaled latent → noise and timestep of each row → network → loss → update.
Every draw of a row is a function of (seed, position of the row), so it does not matter which process trains on it.

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.conditioning.rows import RowConditions
from ldm.config import Config, added_later
from ldm.device import sent
from ldm.diffusion.process import Prediction, corrupt
from ldm.diffusion.schedule import Scales, Schedule, ScheduleConfig
from ldm.diffusion.timesteps import TimestepConfig, TimestepLaw, timesteps
from ldm.evaluation.denoising import Denoising
from ldm.latents import LatentSpace
from ldm.losses.diffusion import ErrorNorm, Weighting, per_sample_loss
from ldm.randomness import Draw, normal
from ldm.training.engine import Engine
from ldm.training.optim import OptimConfig, learning_rate
from ldm.training.world import World
from ldm.types import Condition, Image, Latent, LatentBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig(Config):
    """What the network learns."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Noise schedule."""
    prediction: Prediction = Prediction.NOISE
    """What the network puts out: noise (the paper), velocity, clean or flow."""
    weighting: Weighting = Weighting.UNIFORM
    """How timesteps weigh in the loss: uniform (the paper), min_snr, p2 or edm."""
    norm: ErrorNorm = added_later(ErrorNorm.L2)
    """How far an output is from its target in training: l2, l1 or huber; validation always measures l2."""
    validation_rows: int = 384
    """Held-out rows of a validation, rounded down to a multiple of 64 (or to what there is, if less)."""
    timesteps: TimestepConfig = added_later(TimestepConfig())
    """How training timesteps are drawn; validation always spreads them evenly."""
    min_snr_gamma: float = added_later(5.0)
    """Signal-to-noise ratio from which min_snr's weight grows no more."""
    p2_gamma: float = added_later(1.0)
    """Exponent of p2's weight, the paper's gamma; it must be positive."""
    offset_noise: float = added_later(0.0)
    """Deviation of noise that is alike over a whole channel, added to the others'; 0 for none, 0.1 is usual. It lets
    the mean of a picture be learned where the last timestep keeps some of it."""
    validation_bands: int = added_later(4)
    """Equal parts of the timesteps, the least noisy first, for each of which the validation loss is told too; 0 tells
    the whole alone."""
    has_raw_validation: bool = added_later(False)
    """Whether the weights as they are, not averaged, are validated too: a second pass."""

    def __post_init__(self) -> None:
        if self.norm is not ErrorNorm.L2 and self.weighting is not Weighting.UNIFORM:
            raise ValueError(
                f"weighting {self.weighting.value} is made for squares: norm {self.norm.value} goes with uniform"
            )
        if self.prediction is Prediction.NOISE and self.schedule.ends_without_signal:
            raise ValueError(
                "at a last timestep without signal the noise tells nothing of the picture: a schedule of kind flow or "
                "with has_zero_terminal_snr goes with prediction velocity, flow or clean"
            )
        if self.schedule.ends_without_signal:
            self._refuse_neglect_of_pure_noise()
        for name in ("offset_noise", "validation_bands"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name} can't be negative, got {getattr(self, name)}")
        for name, weighting, usual in (("min_snr_gamma", Weighting.MIN_SNR, 5.0), ("p2_gamma", Weighting.P2, 1.0)):
            found = getattr(self, name)
            if found <= 0 or (found != usual and self.weighting is not weighting):
                raise ValueError(f"objective.{name} must be positive and belongs to {weighting.value}, got {found}")

    def _refuse_neglect_of_pure_noise(self) -> None:
        """Sampling begins at the last timestep: what hardly trains there, or not on plain noise, begins badly."""
        neglect = {
            f"weighting {self.weighting.value}": self.weighting in (Weighting.MIN_SNR, Weighting.P2),
            f"timesteps.law {self.timesteps.law.value}": self.timesteps.law is TimestepLaw.LOG_NORMAL,
            f"offset_noise {self.offset_noise}": self.offset_noise > 0,
        }
        if found := [name for name, is_there in neglect.items() if is_there]:
            raise ValueError(
                f"{' and '.join(found)} would leave a last timestep without signal, where sampling begins, untrained: "
                "take another, or a schedule that keeps some signal"
            )

    @property
    def gamma(self) -> float | None:
        """The number of the weighting, where it has one."""
        match self.weighting:
            case Weighting.MIN_SNR:
                return self.min_snr_gamma
            case Weighting.P2:
                return self.p2_gamma
            case _:
                return None

    def of_training(self) -> dict[str, Any]:
        """Return what a checkpoint must have been made with to be resumed: without what is only measured."""
        measured = ("validation_bands", "has_raw_validation")
        return {name: value for name, value in self.to_dict().items() if name not in measured}


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


class _Drawn(NamedTuple):
    """What the rows of a micro-batch are trained on.

    Attributes:
        clean: scaled latents, shape (b, c, h, w).
        noise: standard normal, shape (b, c, h, w).
        timestep: shape (b,).
        at: scales of clean and noise.
        condition: what the network is told.
    """

    clean: Latent
    noise: Latent
    timestep: Float[Tensor, " b"]
    at: Scales
    condition: Condition


def _unknown_flops(_: tuple[int, int]) -> float:
    return 0.0


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
        row_flops: (rows, columns) of a latent → FLOPs of a row's forward and backward pass.
        further_half_lives: of the averages that are validated beside the main one, in samples.
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
    row_flops: Callable[[tuple[int, int]], float] = _unknown_flops
    further_half_lives: tuple[int, ...] = ()

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
        drawn = [self._drawn(part) for part in parts]
        norm = self.engine.update(
            [partial(self._micro_loss, part, losses) for part in drawn], lr, (samples_seen + num_samples, num_samples)
        )
        return {"loss": torch.stack(losses).mean(), "grad_norm": norm, "learning_rate": lr}

    def flops(self, batch: LatentBatch, samples_seen: int) -> float:
        """Return the FLOPs of a step; see `Task.flops`."""
        height, width = batch.moments.shape[-2:]
        return len(batch.keys) * self.row_flops((height, width))

    def validate(self) -> dict[str, float]:
        """Return the denoising loss on held-out rows with the averaged weights: of all timesteps, and by band.

        That of every further average is of all timesteps only.
        """
        bands = self.objective.validation_bands
        with self.engine.averaged():
            measured = self._validation_losses("validation_loss", bands)
        for half_life in self.further_half_lives:
            with self.engine.averaged(half_life):
                measured |= self._validation_losses(f"validation_loss_half_life_{half_life}", num_bands=0)
        if self.objective.has_raw_validation:
            measured |= self._validation_losses("validation_loss_raw", bands)
        return measured

    @torch.no_grad()
    def _validation_losses(self, name: str, num_bands: int) -> dict[str, float]:
        num_rows = usable_rows(min(self.held_out.num_rows, self.objective.validation_rows))
        measure = Denoising(
            schedule=self._schedule, prediction=self.objective.prediction, space=self.space, num_rows=num_rows
        )
        spans = list(self.held_out.spans(0, num_rows, min(64, -(-num_rows // self.world.size))))
        losses = torch.zeros(num_rows, device=self.world.device)
        # Every rank makes as many forwards, since under ZeRO-3 each is one of all ranks; some of no account.
        for first in range(0, len(spans), self.world.size):
            number = first + self.world.rank
            rows = self.held_out.rows(*spans[min(number, len(spans) - 1)])
            found = measure.losses(self._network, self._on_device(rows, self.conditions.whole(rows)))
            if number < len(spans):
                losses[rows.samples.to(losses.device)] = found
        losses = self.world.total(losses).cpu()
        measured = {name: float(losses.mean())}
        num_bands = min(num_bands, num_rows)
        if num_bands > 1:  # timesteps grow with the row's number
            bands = enumerate(losses.tensor_split(num_bands))
            measured |= {f"{name}_band_{number}": float(band.mean()) for number, band in bands}
        return measured

    def pictures(self) -> dict[str, Image]:
        """Return sample images of the averaged weights."""
        if self.preview is None:
            return {}
        with self.engine.averaged(), torch.no_grad():
            return self.preview()

    def _drawn(self, batch: LatentBatch) -> _Drawn:
        """Return what a micro-batch's rows are trained on, on the CPU."""
        rows = batch.samples.tolist()
        shape = (self.space.num_channels, *batch.moments.shape[-2:])
        has_posterior = self.space.kind.has_log_variance
        posterior_noise = normal(self.seed, Draw.POSTERIOR, rows, shape) if has_posterior else None
        timestep = timesteps(self.objective.timesteps, self._schedule, self.seed, rows)
        return _Drawn(
            clean=self.space.scaled(batch.moments.float(), posterior_noise),
            noise=training_noise(self.seed, rows, shape, self.objective.offset_noise),
            timestep=timestep,
            at=self._schedule.scales(timestep),
            condition=self.conditions.drawn(batch),
        )

    def _micro_loss(self, drawn: _Drawn, losses: list[Tensor]) -> Tensor:
        device = self.world.device
        clean, noise, timestep = (sent(part, device) for part in (drawn.clean, drawn.noise, drawn.timestep))
        at = Scales(sent(drawn.at.alpha, device), sent(drawn.at.sigma, device))
        noisy = corrupt(clean, noise, at)
        output = self._network(noisy, timestep, drawn.condition.to(device, torch.float32)).float()
        objective = self.objective
        loss = per_sample_loss(
            objective.prediction, output, clean, noise, at, objective.weighting, objective.norm, objective.gamma
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
            moments=sent(batch.moments, device).float(),
            condition=condition.to(device, torch.float32),
        )


def training_noise(seed: int, rows: Sequence[int], shape: tuple[int, int, int], offset: float) -> Latent:
    """Return the noise of rows: standard normal, and more of deviation `offset` that a whole channel shares."""
    noise = normal(seed, Draw.NOISE, rows, shape)
    return noise if not offset else noise + offset * normal(seed, Draw.OFFSET, rows, (shape[0], 1, 1))


def call_in_own_dtype(engine: Engine, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Call an engine's wrapped network in the dtype of its weights and return its output in the caller's."""
    dtype = next(engine.raw.parameters()).dtype
    output: Tensor = engine.wrapped(noisy.to(dtype), timestep, condition.to(noisy.device, dtype))
    return output.to(noisy.dtype)


def usable_rows(num_rows: int) -> int:
    """Return the rows that a validation takes, so that every number of processes up to 64 shares them evenly."""
    return num_rows // 64 * 64 or num_rows
