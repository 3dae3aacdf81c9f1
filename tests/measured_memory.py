"""What a rank's training really takes of memory, measured by the system, beside the forecast of it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.training.activations import traced
from ldm.training.ema import EmaConfig
from ldm.training.engine import Engine, EngineConfig, EngineKind
from ldm.training.engines import build_engine
from ldm.training.memory import Sharding, Step, forecast, read_sharding
from ldm.training.optim import OptimConfig
from ldm.training.world import World
from ldm.types import Condition
from ldm.unet.model import UNet, UNetConfig
from tests.benchmarks.encode_memory import status_kib
from tests.ranks import run_fresh_ranks

SHIPPED = Path(__file__).parents[1] / "infra" / "deepspeed"
# What a process frees goes back to the system at once, so that its peak is that of what is in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TOKENS = 8
WARM_UP = UNetConfig(
    in_channels=4,
    out_channels=4,
    base_channels=32,
    channel_mult=(1,),
    attention_factors=(1,),
    num_heads=1,
    context_width=32,
)


class Case(NamedTuple):
    """A network and the rows of a rank."""

    unet: UNetConfig
    rows: int
    side: int
    micro_rows: int
    steps: int


@contextmanager
def exact_allocator() -> Iterator[None]:
    """Have the processes that are started meanwhile give back what they free."""
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def forecast_and_measured(case: Case, file: str | None, num_ranks: int) -> tuple[int, int]:
    """Return the forecast of a rank and what the one that took most took, in bytes; None for the local engine."""
    with TemporaryDirectory() as folder, exact_allocator():
        run_fresh_ranks(num_ranks, measure, case, file, folder)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return forecast_of(case, file, num_ranks), max(found)


def forecast_of(case: Case, file: str | None, num_ranks: int) -> int:
    """Return the bytes that the forecast says."""
    step = Step(
        passed=traced(lambda: UNet(case.unet), partial(loss_of, case.unet, case), weights=torch.float32, autocast=None),
        num_ranks=num_ranks,
        num_micro_batches=case.rows // case.micro_rows,
        weight_bytes=4,
        num_averages=1,
        is_on_cpu=True,
    )
    return forecast(sharding_of(file), step).total


def sharding_of(file: str | None) -> Sharding:
    """Return the local engine's sharding for None, else that of a shipped file."""
    return Sharding(name="local") if file is None else read_sharding(str(SHIPPED / f"{file}.json"))


def measure(world: World, case: Case, file: str | None, folder: str) -> None:
    """Train a few steps, and write down the peak of memory above what the process had before its network."""
    train(world, case._replace(unet=WARM_UP, steps=2), file)  # libraries take what they keep
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    world.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status_kib("VmRSS")
    train(world, case, file)
    Path(folder, f"{world.rank}.json").write_text(str((status_kib("VmHWM") - before) * 1024))


def train(world: World, case: Case, file: str | None) -> None:
    """Make steps of a fresh network."""
    config = EngineConfig(micro_batch_size=case.micro_rows)
    if file is not None:
        path = str(SHIPPED / f"{file}.json")
        config = EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=path, micro_batch_size=case.micro_rows)
    engine = build_engine(UNet(case.unet), OptimConfig(), EmaConfig(), config, world, case.rows)
    num_micro = case.rows // case.micro_rows
    for step in range(1, case.steps + 1):
        samples = step * case.rows * world.size
        engine.update([partial(engine_loss, engine, case)] * num_micro, 1e-4, (samples, case.rows * world.size))


def engine_loss(engine: Engine, case: Case) -> Tensor:
    assert isinstance(engine.raw, UNet)
    return loss_of(engine.raw.config, case, engine.wrapped)  # type: ignore[arg-type]


def loss_of(config: UNetConfig, case: Case, network: nn.Module) -> Tensor:
    """Return a loss of one micro-batch of zeros."""
    noisy = torch.zeros(case.micro_rows, config.in_channels, case.side, case.side)
    states = torch.zeros(case.micro_rows, TOKENS, config.context_width or 0)
    output: Tensor = network(noisy, torch.zeros(case.micro_rows), Condition(states=states))
    return (output - 1.0).square().mean()
