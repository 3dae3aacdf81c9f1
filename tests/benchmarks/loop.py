"""The training loop against a bare forward-backward-step on the same tensors, in turns; images a second and MFU.

The loop runs under the local engine and, at one rank too, under DeepSpeed.

python -m tests.benchmarks.loop [--device cuda] [--network sd1] [--quick] [--save]

Both sides train the same network from the same weights with the same optimizer; ours adds the clock, the draws of noise
and timesteps, the moving average, metrics, and the loop itself. On a GPU: `--device cuda --network sd1` (bf16).
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from jobs.wiring.memory_forecast import Told, denoiser_flops
from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.rows import RowConditions
from ldm.config import Config
from ldm.latents import LatentSpace
from ldm.training.checkpoint import CheckpointStore
from ldm.training.diffusion_task import DiffusionTask, ObjectiveConfig
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, EngineKind, Precision
from ldm.training.engines import build_engine
from ldm.training.loop import LoopConfig, Surroundings, train
from ldm.training.optim import OptimConfig, build_optimizer
from ldm.training.record import SilentTracker
from ldm.training.speed import peak_of
from ldm.training.world import World
from ldm.types import Condition, LatentBatch
from ldm.unet import zoo
from ldm.unet.model import UNet, UNetConfig

RESULTS = Path(__file__).parent / "results"
GOAL = 0.98
DEEPSPEED_GOAL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopBenchmark(Config):
    """Images a second of the training loop and of a bare step."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    network: Literal["emoji", "sd1"] = "emoji"
    """Which UNet: the emoji recipe's, or Stable Diffusion 1's."""
    batch_size: int = 32
    """Rows of a step."""
    latent_size: int = 16
    """Rows and columns of the latents; 32 is 256 px and 64 is 512 px with a factor of 8."""
    tokens: int = 24
    """Text tokens a row."""
    steps: int = 8
    """Timed steps of one turn."""
    rounds: int = 5
    """Turns of each side."""
    threads: int = 2
    """CPU threads."""
    zero_config: str = "infra/deepspeed/zero2.json"
    """What DeepSpeed is asked for."""
    quick: bool = False
    """Under a minute: two turns of three steps."""
    save: bool = False
    """Write the result beside the other results."""


class FixedBatches:
    """Gives the same batch for ever and notes when each was asked for."""

    wait_seconds = 0.0

    def __init__(self, batch: LatentBatch, steps: int, device: torch.device) -> None:
        self.batch = batch
        self.steps = steps
        self.device = device
        self.times: list[float] = []

    def batches(self, samples_seen: int) -> Iterator[LatentBatch]:
        """Yield the batch endlessly."""
        while True:
            _note(self.times, self.steps, self.device)
            yield self.batch


def main() -> None:
    """Run both sides in turns and print the table."""
    settings = tyro.cli(LoopBenchmark, description=__doc__)
    if settings.quick:
        settings = replace(settings, steps=3, rounds=2)
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    config = zoo.sd1() if settings.network == "sd1" else zoo.emoji()
    torch.manual_seed(0)
    start = UNet(config)
    batch = _batch(settings, config)
    rates: dict[str, list[float]] = {"loop": [], "bare": [], "deepspeed": []}
    with process_group(0, 1, device):
        for _ in range(settings.rounds):
            rates["loop"].append(_loop_rate(copy.deepcopy(start), batch, settings, device, EngineKind.LOCAL))
            rates["bare"].append(_bare_rate(copy.deepcopy(start), batch, settings, device))
            rates["deepspeed"].append(_loop_rate(copy.deepcopy(start), batch, settings, device, EngineKind.DEEPSPEED))
    _report(settings, config, rates)


def _batch(settings: LoopBenchmark, config: UNetConfig) -> LatentBatch:
    """Return a batch as a loader gives it, on the CPU."""
    rows, side = settings.batch_size, settings.latent_size
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(rows, 2 * config.in_channels, side, side, generator=generator)
    states = torch.randn(rows, settings.tokens, config.context_width, generator=generator)
    keys = tuple(f"{row:06d}" for row in range(rows))
    return LatentBatch(keys=keys, samples=torch.arange(rows), moments=moments, condition=Condition(states=states))


def _loop_rate(
    network: UNet, batch: LatentBatch, settings: LoopBenchmark, device: torch.device, kind: EngineKind
) -> float:
    world = World(rank=0, size=1, device=device)
    precision = Precision.BF16 if device.type == "cuda" else Precision.FP32
    engine_config = EngineConfig(kind=kind, zero_config=settings.zero_config, precision=precision)
    rows = settings.batch_size
    channels = network.config.in_channels
    total = settings.batch_size * (settings.steps + 2)
    task = DiffusionTask(
        engine=build_engine(network, OptimConfig(), EmaConfig(), engine_config, world, rows),
        objective=ObjectiveConfig(validation_rows=0),
        optim=OptimConfig(),
        conditions=RowConditions(
            config=ConditioningConfig(),
            space=LatentSpace(mean=(0.0,) * channels, std=(1.0,) * channels),
            factor=1,
            seed=0,
        ),
        held_out=_NoRows(),
        world=world,
        micro_batches=engine_config.micro_batches,
        total_samples=total,
        seed=0,
        preview=None,
    )
    loader = FixedBatches(batch, settings.steps, device)
    with tempfile.TemporaryDirectory() as folder:
        around = Surroundings(
            world=world,
            batch_size=settings.batch_size,
            checkpoints=_NothingKept(folder, {}, 1, world),
            tracker=SilentTracker(),
            report=lambda _: None,
            should_stop=lambda: False,
        )
        config = LoopConfig(total_samples=total, log_every=0, validate_every=0, picture_every=0, checkpoint_every=0)
        train(_Unmeasured(task), loader, config, around)
    timed = loader.times[1:]  # the first step allocates
    return settings.batch_size * (len(timed) - 1) / (timed[-1] - timed[0])


def _bare_rate(network: UNet, batch: LatentBatch, settings: LoopBenchmark, device: torch.device) -> float:
    network.to(device)
    optimizer = build_optimizer(network.parameters(), OptimConfig())
    clean = batch.moments[:, : network.config.in_channels].to(device)
    condition = batch.condition.to(device, torch.float32)
    timestep = torch.linspace(0, 999, settings.batch_size, device=device)
    times: list[float] = []
    for _ in range(settings.steps + 2):
        _note(times, settings.steps, device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = (network(clean, timestep, condition) - clean).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
    timed = times[1:]
    return settings.batch_size * (len(timed) - 1) / (timed[-1] - timed[0])


def _report(settings: LoopBenchmark, config: UNetConfig, rates: dict[str, list[float]]) -> None:
    flops = _training_flops(config, settings)
    card = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or platform.machine()
    peak = peak_of(card, Precision.BF16)
    memory = torch.cuda.max_memory_allocated() / 1e9 if settings.device == "cuda" else 0.0
    print(f"{settings.network}, batch {settings.batch_size}, latents {settings.latent_size}")
    print(f"{card}, torch {torch.__version__}")
    print(f"{'side':10}{'median':>10}{'min':>10}{'max':>10}  images a second   GFLOP/s    MFU")
    for side, values in rates.items():
        middle = statistics.median(values)
        share = f"{middle * flops / peak:7.1%}" if peak else "      -"
        print(
            f"{side:10}{middle:10.2f}{min(values):10.2f}{max(values):10.2f}  {'':15}{middle * flops / 1e9:10.1f}{share}"
        )
    if memory:
        print(f"peak memory {memory:.1f} GB")
    ratio = statistics.median(a / b for a, b in zip(rates["loop"], rates["bare"], strict=True))
    deepspeed = statistics.median(a / b for a, b in zip(rates["deepspeed"], rates["loop"], strict=True))
    result = {
        "settings": settings.to_dict(),
        "machine": card,
        "torch": torch.__version__,
        "images_per_second": rates,
        "training_gflop_per_image": flops / 1e9,
        "peak_memory_gb": memory,
        "ratio": ratio,
        "deepspeed_ratio": deepspeed,
    }
    if settings.save:
        path = RESULTS / f"loop-{settings.device}-{settings.network}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"loop ratio {ratio:.3f} goal {GOAL}; under DeepSpeed {deepspeed:.3f} of it, goal {DEEPSPEED_GOAL}")


def _training_flops(config: UNetConfig, settings: LoopBenchmark) -> float:
    """Return the FLOPs of one row's forward and backward pass."""
    side = settings.latent_size
    told = Told(
        size=(side, side),
        pixels=(side, side),
        max_tokens=settings.tokens,
        text_width=config.context_width,
        pooled_width=None,
    )
    return denoiser_flops(config, ConditioningConfig(), told)


def _note(times: list[float], steps: int, device: torch.device) -> None:
    """Note when a step begins; a GPU is waited for before the first that counts, and after the last."""
    if device.type == "cuda" and len(times) in (1, steps + 1):
        torch.cuda.synchronize()
    times.append(time.perf_counter())


class _NoRows:
    num_rows = 0

    def rows(self, start: int, stop: int) -> LatentBatch:
        """Give nothing: this benchmark does not validate."""
        raise ValueError(f"there are no held-out rows [{start}, {stop})")


class _Unmeasured(DiffusionTask):
    """The task without its measurements, which are not part of a step."""

    def __init__(self, task: DiffusionTask) -> None:
        self.__dict__.update(task.__dict__)

    def validate(self) -> dict[str, float]:
        """Measure nothing."""
        return {}


class _NothingKept(CheckpointStore):
    """A store that keeps nothing, so that no checkpoint is timed."""

    def save(self, *_: object, **__: object) -> None:
        """Keep nothing."""


if __name__ == "__main__":
    main()
