"""A training of one small network, on any engine: what the loop does with it takes a second."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.training.checkpoint import CheckpointStore
from ldm.training.ema import EmaConfig
from ldm.training.engine import Engine, EngineConfig, EngineKind
from ldm.training.engines import build_engine
from ldm.training.loop import LoopConfig, Progress, Surroundings, train
from ldm.training.optim import OptimConfig, learning_rate
from ldm.training.record import SilentTracker, Tracker
from ldm.training.saved_state import Resumable
from ldm.training.state import TrainState
from ldm.training.world import World
from ldm.types import Image

BATCH = 8
TOTAL = 160
STUCK_AT = 64
OPTIM = OptimConfig(lr=1e-2, warmup_samples=32)


class SmallRows(NamedTuple):
    """Rows of a batch."""

    keys: tuple[str, ...]
    inputs: Tensor
    targets: Tensor


class SmallLoader:
    """A rank's rows of an endless sequence that nothing but their numbers decide."""

    wait_seconds = 0.0

    def __init__(self, world: World) -> None:
        self._world = world

    def batches(self, samples_seen: int) -> Iterator[SmallRows]:
        while True:
            rows = range(samples_seen + self._world.rank, samples_seen + BATCH, self._world.size)
            drawn = torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(row)) for row in rows])
            yield SmallRows(tuple(f"row-{row}" for row in rows), drawn[:, :8], drawn[:, 8:])
            samples_seen += BATCH


class StuckLoader(SmallLoader):
    """Data that never come on one rank, from a sample on."""

    def batches(self, samples_seen: int) -> Iterator[SmallRows]:
        for batch in super().batches(samples_seen):
            if self._world.rank == 1 and batch.keys[0] == f"row-{STUCK_AT + 1}":
                wait_for_what_never_comes()
            yield batch


def wait_for_what_never_comes() -> None:
    threading.Event().wait()


class SmallTask:
    """Trains a small network; its weights become infinite in the steps that begin at some samples."""

    def __init__(self, engine: Engine, poisoned: Collection[int] = ()) -> None:
        self.engine = engine
        self._poisoned = poisoned

    @property
    def engines(self) -> Mapping[str, Resumable]:
        return {"network": self.engine}

    def step(self, batch: SmallRows, samples_seen: int, num_samples: int) -> dict[str, Tensor | float]:
        losses: list[Tensor] = []
        lr = learning_rate(OPTIM, samples_seen, TOTAL)
        clock = (samples_seen + num_samples, num_samples)
        norm = self.engine.update([partial(self._loss, batch, losses)], lr, clock)
        if samples_seen in self._poisoned:
            for weight in self.engine.raw.parameters():
                weight.data.fill_(float("inf"))
                getattr(weight, "ds_tensor", weight).data.fill_(float("inf"))  # under ZeRO-3, this rank's slice
        return {"loss": losses[0], "grad_norm": norm}

    def flops(self, batch: SmallRows, samples_seen: int) -> float:
        return 1e6 * len(batch.keys)

    def validate(self) -> dict[str, float]:
        return {"validation_loss": 1.0}

    def pictures(self) -> dict[str, Image]:
        return {}

    def _loss(self, batch: SmallRows, losses: list[Tensor]) -> Tensor:
        loss: Tensor = (self.engine.wrapped(batch.inputs) - batch.targets).square().mean()
        losses.append(loss.detach())
        return loss

    def state(self, folder: Path) -> dict[str, Tensor]:
        """Return every number that a resumed run would go on from, of the local engine."""
        self.engine.save(folder)
        tensors: dict[str, Tensor] = {}
        collect("", torch.load(folder / "fragments-00000.pt", weights_only=True), tensors)
        return tensors

    def weights(self, world: World) -> dict[str, Tensor]:
        """Return the averages, and what this rank holds of each weight, of any engine."""
        own = {f"own/{name}": held(weight, world) for name, weight in self.engine.raw.named_parameters()}
        return {**self.engine.weights(), **own}


class GreedyTask(SmallTask):
    """A task that asks for more than there is in one of its steps."""

    ask: Callable[[], object]

    def step(self, batch: SmallRows, samples_seen: int, num_samples: int) -> dict[str, Any]:
        if samples_seen == 2 * BATCH:
            self.ask()
        return super().step(batch, samples_seen, num_samples)


def raise_as_a_gpu_does() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice.")


def held(weight: Any, world: World) -> Tensor:
    """Return a rank's part of a weight; the last slice of ZeRO-3 is filled up with memory as it was found."""
    part: Tensor = getattr(weight, "ds_tensor", weight).detach()
    return part[: max(0, weight.ds_numel - world.rank * len(part))] if hasattr(weight, "ds_tensor") else part


def collect(where: str, content: object, tensors: dict[str, Tensor]) -> None:
    """Gather all tensors of a saved file by where they lie in it."""
    if isinstance(content, Tensor):
        tensors[where] = content
    elif isinstance(content, Mapping):
        for name, item in content.items():
            collect(f"{where}/{name}", item, tensors)
    elif isinstance(content, list | tuple):
        for number, item in enumerate(content):
            collect(f"{where}/{number}", item, tensors)


def small_engine(world: World, folder: Path, stage: int | None = None) -> Engine:
    """Return a DeepSpeed engine of a ZeRO stage, or the local one for None."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 31), nn.SiLU(), nn.Linear(31, 4))
    config = EngineConfig()
    if stage is not None:
        path = folder / f"stage{stage}.json"
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
            path.write_text(json.dumps({**own, "zero_optimization": {"stage": stage}}))
        world.barrier()
        config = EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path))
    return build_engine(network, OPTIM, EmaConfig(half_life_samples=64), config, world, BATCH // world.size)


def small_training(
    task: SmallTask,
    world: World,
    folder: Path,
    *,
    loader: SmallLoader | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    tracker: Tracker | None = None,
    **loop: float,
) -> TrainState:
    """Train it, with checkpoints in `folder`; every step is looked at."""
    lengths = {"total_samples": TOTAL, "log_every": BATCH, "validate_every": 0, "checkpoint_every": 2 * BATCH}
    config = LoopConfig(**{**lengths, **loop})  # type: ignore[arg-type]
    around = Surroundings(
        world=world,
        batch_size=BATCH,
        checkpoints=CheckpointStore(str(folder), {}, config.keep_checkpoints, world),
        tracker=tracker or SilentTracker(),
        report=report,
        should_stop=should_stop,
    )
    return train(task, loader or SmallLoader(world), config, around)
