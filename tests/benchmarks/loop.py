"""The training loop against a bare forward-backward-step on the same tensors, in turns; images a second and MFU.

The loop runs under the local engine and, at one rank too, under DeepSpeed.

python -m tests.benchmarks.loop [--device cuda --steps 8] [--network sd1] [--quick] [--save]

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
from collections.abc import Callable, Iterator
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
from ldm.precision import Precision
from ldm.training.checkpoint import CheckpointStore
from ldm.training.diffusion_task import DiffusionTask, ObjectiveConfig
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.engines import build_engine
from ldm.training.loop import LoopConfig, Surroundings, train
from ldm.training.optim import OptimConfig, build_optimizer
from ldm.training.record import SilentTracker
from ldm.training.speed import peak_of
from ldm.training.world import World, process_group
from ldm.types import Condition, LatentBatch
from ldm.unet import zoo
from ldm.unet.model import UNet, UNetConfig

RESULTS = Path(__file__).parent / "results"
GOAL = 0.98
DEEPSPEED_GOAL = 0.95
SIDES = ("", ", bare beside")


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
    steps: int = 1
    """Steps of a turn; a GPU is waited for at each end of one and needs more, 8."""
    turns: int = 40
    """Turns of a run, beside one that allocates."""
    rounds: int = 3
    """Runs under each engine."""
    threads: int = 2
    """CPU threads."""
    zero_config: str = "infra/deepspeed/zero2.json"
    """What DeepSpeed is asked for."""
    quick: bool = False
    """Under a minute: four turns under each engine."""
    save: bool = False
    """Write the result beside the other results."""


class Turns:
    """Gives the same batch for ever; between turns of the loop's steps the other side makes as many.

    Two sides that take turns at every step meet the same neighbours on a shared machine.
    """

    wait_seconds = 0.0

    def __init__(self, batch: LatentBatch, steps: int, device: torch.device, bare_step: Callable[[], None]) -> None:
        self.batch = batch
        self.steps = steps
        self.device = device
        self.bare_step = bare_step
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def batches(self, samples_seen: int) -> Iterator[LatentBatch]:
        """Yield the batch endlessly."""
        while True:
            begun = self._now()
            for _ in range(self.steps):
                self.bare_step()
            turned = self._now()
            for _ in range(self.steps):
                yield self.batch
            self.bare_seconds.append(turned - begun)
            self.loop_seconds.append(self._now() - turned)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    """Run both sides in turns and print the table."""
    settings = tyro.cli(LoopBenchmark, description=__doc__)
    if settings.quick:
        settings = replace(settings, turns=4, rounds=1)
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    config = zoo.sd1() if settings.network == "sd1" else zoo.emoji()
    torch.manual_seed(0)
    start = UNet(config)
    batch = _batch(settings, config)
    found: dict[str, list[tuple[float, float]]] = {kind.value: [] for kind in EngineKind}
    with process_group(0, 1, device):
        for _ in range(settings.rounds):
            for kind in EngineKind:
                found[kind.value] += _turns(copy.deepcopy(start), batch, settings, device, kind)
    _report(settings, config, found)


def _batch(settings: LoopBenchmark, config: UNetConfig) -> LatentBatch:
    """Return a batch as a loader gives it, on the CPU."""
    rows, side = settings.batch_size, settings.latent_size
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(rows, 2 * config.in_channels, side, side, generator=generator)
    states = torch.randn(rows, settings.tokens, config.context_width, generator=generator)
    keys = tuple(f"{row:06d}" for row in range(rows))
    return LatentBatch(keys=keys, samples=torch.arange(rows), moments=moments, condition=Condition(states=states))


def _turns(
    network: UNet, batch: LatentBatch, settings: LoopBenchmark, device: torch.device, kind: EngineKind
) -> list[tuple[float, float]]:
    """Return images a second of the loop and of bare steps, for each turn but the first, which allocates."""
    world = World(rank=0, size=1, device=device)
    precision = Precision.BF16 if device.type == "cuda" else Precision.FP32
    engine_config = EngineConfig(kind=kind, zero_config=settings.zero_config, precision=precision)
    rows = settings.batch_size
    channels = network.config.in_channels
    # One turn more at either end: the first allocates, and the end of the last is not seen.
    total = settings.batch_size * settings.steps * (settings.turns + 2)
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
    loader = Turns(batch, settings.steps, device, _bare_step(copy.deepcopy(network), batch, settings, device))
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
    rows = settings.batch_size * settings.steps
    return [(rows / loop, rows / bare) for loop, bare in zip(loader.loop_seconds, loader.bare_seconds, strict=True)][1:]


def _bare_step(network: UNet, batch: LatentBatch, settings: LoopBenchmark, device: torch.device) -> Callable[[], None]:
    """Return a forward-backward-step on the batch's tensors, and nothing else."""
    network.to(device)
    optimizer = build_optimizer(network.parameters(), OptimConfig())
    clean = batch.moments[:, : network.config.in_channels].to(device)
    condition = batch.condition.to(device, torch.float32)
    timestep = torch.linspace(0, 999, settings.batch_size, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = (network(clean, timestep, condition) - clean).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def _report(settings: LoopBenchmark, config: UNetConfig, found: dict[str, list[tuple[float, float]]]) -> None:
    flops = _training_flops(config, settings)
    card = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or platform.machine()
    peak = peak_of(card, Precision.BF16)
    memory = torch.cuda.max_memory_allocated() / 1e9 if settings.device == "cuda" else 0.0
    print(f"{settings.network}, batch {settings.batch_size}, latents {settings.latent_size}")
    print(f"{card}, torch {torch.__version__}")
    print(f"{'side':26}{'median':>10}{'min':>10}{'max':>10}  images a second   GFLOP/s    MFU")
    sides = {
        f"{kind}{beside}": [turn[at] for turn in turns]
        for kind, turns in found.items()
        for at, beside in enumerate(SIDES)
    }
    for side, values in sides.items():
        middle = statistics.median(values)
        share = f"{middle * flops / peak:7.1%}" if peak else "      -"
        print(
            f"{side:26}{middle:10.2f}{min(values):10.2f}{max(values):10.2f}  {'':15}{middle * flops / 1e9:10.1f}{share}"
        )
    if memory:
        print(f"peak memory of both sides together {memory:.1f} GB")
    quartiles = {kind: statistics.quantiles([loop / bare for loop, bare in turns]) for kind, turns in found.items()}
    ratio = quartiles["local"][1]
    deepspeed = quartiles["deepspeed"][1] / ratio
    result = {
        "settings": settings.to_dict(),
        "machine": card,
        "torch": torch.__version__,
        "images_per_second": sides,
        "quartiles_of_the_ratio_to_bare": quartiles,
        "training_gflop_per_image": flops / 1e9,
        "peak_memory_gb": memory,
        "ratio": ratio,
        "deepspeed_ratio": deepspeed,
    }
    if settings.save:
        path = RESULTS / f"loop-{settings.device}-{settings.network}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    for kind, (low, middle, high) in quartiles.items():
        print(f"loop under {kind}: {middle:.3f} of bare steps, half of the turns from {low:.3f} to {high:.3f}")
    print(f"goal {GOAL} under the local engine; DeepSpeed makes {deepspeed:.3f} of that, goal {DEEPSPEED_GOAL}")


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
