"""Engines: how a module's gradients become new weights on one process or many.

Order of an update: for each micro-batch forward and backward (gradients synchronised at the last) → clip → optimizer →
EMA. An engine owns one module, its optimizer and its averages; a task owns one engine for each network that it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ldm.config import Config, added_later
from ldm.precision import Precision, autocast
from ldm.training.ema import Ema, EmaConfig, averages_of, swapped_in
from ldm.training.fragments import begin_moments, fragments_snapshot, load_fragments, shapes_of, whole_fragments
from ldm.training.optim import OptimConfig, build_optimizer, leave_out, set_learning_rate
from ldm.training.snapshot import Snapshot
from ldm.training.stopwatch import StepPhase, Stopwatch
from ldm.training.world import World

FIRST_LOSS_SCALE = 2.0**16
"""What fp16's losses are multiplied by at first; halved by each overflow."""
LOSS_SCALE_STEPS = 2_000
"""Steps in a row without an overflow after which the scale is doubled."""


class EngineKind(StrEnum):
    """Which engine turns gradients into weights."""

    LOCAL = "local"
    DEEPSPEED = "deepspeed"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig(Config):
    """How weights are updated."""

    kind: EngineKind = EngineKind.LOCAL
    """local: plain PyTorch, data parallel when there are several processes. deepspeed: ZeRO."""
    zero_config: str = "infra/deepspeed/zero2.json"
    """DeepSpeed's own settings (stage, offload, buckets); batch, rate, clipping and precision come from here."""
    precision: Precision = Precision.FP32
    """fp32; bf16 where the hardware has it (slower than fp32 on a CPU without AMX); fp16 with a dynamic loss scale: a
    step whose scaled gradient overflows is lost, and the scale halved."""
    is_compiled: bool = added_later(False)
    """Whether torch.compile makes kernels of the network; minutes at the first step, and a C++ compiler on a CPU."""
    micro_batch_size: int = 0
    """Rows of one forward pass on one process; 0 takes the process's whole share of the batch."""
    finds_micro_batch: bool = added_later(False)
    """Whether the start measures which micro-batch is fastest of those that fit, in place of `micro_batch_size`; what
    it finds is kept beside the checkpoints, for the starts after it."""
    peak_tflops: float = added_later(0.0)
    """TFLOP a second that a worker's device makes at most in this precision, for the MFU; 0 takes the data sheet's for
    a GPU that is known by name, and tells no MFU for others."""

    def __post_init__(self) -> None:
        if self.finds_micro_batch and self.micro_batch_size:
            raise ValueError(f"engine.finds_micro_batch decides micro_batch_size, which is {self.micro_batch_size}")
        if self.peak_tflops < 0:
            raise ValueError(f"engine.peak_tflops can't be negative, got {self.peak_tflops}")

    def micro_batches(self, rows: int) -> list[tuple[int, int]]:
        """Return the (start, stop) of each micro-batch of a process's share of `rows`."""
        size = self.micro_batch_size or rows
        if rows % size:
            raise ValueError(f"engine.micro_batch_size {size} does not divide the {rows} rows of a process")
        return [(start, start + size) for start in range(0, rows, size)]


class Engine(Protocol):
    """What a task needs to train one module."""

    raw: nn.Module
    """The module itself, for names, shapes and evaluation; training calls `wrapped`."""
    wrapped: Callable[..., Any]
    """The module as gradients are synchronised through it."""

    def update(self, micro_losses: Sequence[Callable[[], Tensor]], lr: float, samples: tuple[int, int]) -> Tensor:
        """Make one step on the mean of the micro-batches' losses; none where the gradient is not finite.

        Args:
            micro_losses: each runs one forward pass through `wrapped` and returns its mean loss.
            lr: the learning rate of this step.
            samples: (samples seen at the end of this step, samples of this step), over all processes.

        Returns:
            The global norm of the gradient before clipping, shape (), not yet read back from the device.
        """
        ...

    def averaged(self, half_life: int = 0) -> AbstractContextManager[None]:
        """Run a block with averaged weights in `raw`. All processes enter it together.

        Args:
            half_life: of which average, in samples; 0 for the main one.
        """
        ...

    def weights(self, half_life: int = 0) -> dict[str, Tensor]:
        """Return the whole averaged weights, float32 on the CPU. All processes call it together.

        Args:
            half_life: of which average, in samples; 0 for the main one.
        """
        ...

    def snapshot(self) -> Snapshot:
        """Return the state to resume, as far as this process writes it. All processes call it together."""
        ...

    def save(self, folder: Path) -> None:
        """Write the snapshot into `folder`. All processes call it together."""
        ...

    def load(self, folder: Path) -> None:
        """Take over a saved state. All processes call it together."""
        ...


class LocalEngine:
    """Plain PyTorch: one process, or DistributedDataParallel over several."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, ema: EmaConfig, config: EngineConfig, world: World
    ) -> None:
        self.raw = module.to(world.device)
        self._world = world
        self._optim = optim
        self._config = config
        self._optimizer = build_optimizer(self.raw.parameters(), optim)
        self._ema = Ema(dict(self.raw.named_parameters()), ema) if ema.half_life_samples else None
        self._scaler = loss_scaler(config.precision, world.device)
        if config.is_compiled:
            self.raw.compile()
        self.stopwatch = Stopwatch(world.device)
        self.wrapped: Callable[..., Any] = self.raw
        if world.size > 1:
            self.wrapped = DistributedDataParallel(self.raw)
            # A lambda, for DistributedDataParallel takes no annotations that are text.
            self.wrapped.register_comm_hook(self.stopwatch, lambda watch, bucket: _reduced(watch, bucket))

    def update(self, micro_losses: Sequence[Callable[[], Tensor]], lr: float, samples: tuple[int, int]) -> Tensor:
        """Make one step; see `Engine.update`."""
        watch = self.stopwatch
        watch.begin()
        self._optimizer.zero_grad(set_to_none=True)
        for i, micro_loss in enumerate(micro_losses):
            watch.enter(StepPhase.FORWARD)
            with self._maybe_unsynchronised(is_last=i == len(micro_losses) - 1):
                with autocast(self._config.precision, self._world.device):
                    loss = micro_loss()
                watch.enter(StepPhase.BACKWARD)
                torch.autograd.backward(self._scaler.scale(loss / len(micro_losses)))
        watch.enter(StepPhase.OPTIMIZER)
        self._scaler.unscale_(self._optimizer)
        bound = self._optim.clip_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), bound, error_if_nonfinite=False)
        set_learning_rate(self._optimizer, lr)
        leave_out(self._optimizer, ~norm.isfinite())
        self._optimizer.step()
        self._scaler.update()
        watch.enter(StepPhase.AVERAGES)
        if self._ema is not None:
            self._ema.update(dict(self.raw.named_parameters()), *samples)
        watch.end()
        return norm

    def averaged(self, half_life: int = 0) -> AbstractContextManager[None]:
        """Run a block with averaged weights in `raw`; see `Engine.averaged`."""
        return swapped_in(dict(self.raw.named_parameters()), averages_of(self._ema, half_life))

    def weights(self, half_life: int = 0) -> dict[str, Tensor]:
        """Return the averaged weights, float32 on the CPU; see `Engine.weights`."""
        source = averages_of(self._ema, half_life) or dict(self.raw.named_parameters())
        return {name: weight.detach().float().cpu().clone() for name, weight in source.items()}

    def snapshot(self) -> Snapshot:
        """Return weights, optimizer and averages; every process holds the same, the main one writes."""
        if not self._world.is_main:
            return Snapshot()
        weights = dict(self.raw.named_parameters())
        fragments = whole_fragments(weights, self._optimizer, self._parts())
        extra = {"buffers": buffers_of(self.raw), "scaler": self._scaler.state_dict()}
        return fragments_snapshot(self._world.rank, fragments, shapes_of(weights), extra)

    def save(self, folder: Path) -> None:
        """Write the snapshot."""
        self.snapshot().write(folder)

    def load(self, folder: Path) -> None:
        """Take over what any engine's `save` wrote."""
        weights = dict(self.raw.named_parameters())
        for weight in weights.values():
            begin_moments(self._optimizer, weight, 0.0)
        fragments = whole_fragments(weights, self._optimizer, self._parts())
        loaded = load_fragments(folder, fragments, shapes_of(weights))
        for name, weight in weights.items():
            begin_moments(self._optimizer, weight, loaded.steps.get(name, 0.0))
        self.raw.load_state_dict(loaded.extra["buffers"], strict=False)
        self._scaler.load_state_dict(loaded.extra["scaler"])

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {} if self._ema is None else self._ema.parts()

    def _maybe_unsynchronised(self, is_last: bool) -> AbstractContextManager[None]:
        if isinstance(self.wrapped, DistributedDataParallel) and not is_last:
            return self.wrapped.no_sync()
        return nullcontext()


def _reduced(watch: Stopwatch, bucket: Any) -> torch.futures.Future[Tensor]:
    """Reduce a bucket of gradients as DistributedDataParallel does by itself; what follows the last one is a wait."""
    group = dist.group.WORLD
    assert group is not None
    reduction = default_hooks.allreduce_hook(group, bucket)
    if bucket.is_last():
        watch.enter(StepPhase.COMMUNICATION)
    return reduction


def loss_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return the dynamic scale of the loss, which fp16's narrow range needs and the others go without."""
    return torch.amp.GradScaler(
        device.type,
        init_scale=FIRST_LOSS_SCALE,
        growth_interval=LOSS_SCALE_STEPS,
        enabled=precision is Precision.FP16,
    )


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module's state holds beside its weights."""
    weights = {name for name, _ in module.named_parameters()}
    return {name: value for name, value in module.state_dict().items() if name not in weights}
