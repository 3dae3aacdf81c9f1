"""How long a training stands still for a checkpoint: saved before it goes on, and in the background, in turns.

python -m tests.benchmarks.checkpointing [--folder DIR] [--quick] [--save]

One process trains a UNet with AdamW and a moving average through the local engine. Each round makes some steps, saves,
makes as many steps, begins a save in the background, and goes on with steps until it is written and published. That
both write the same files is checked before.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from ldm import storage
from ldm.config import Config
from ldm.training.checkpoint import STATE_FILE, CheckpointStore
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, LocalEngine
from ldm.training.optim import OptimConfig
from ldm.training.state import TrainState
from ldm.training.world import World
from ldm.types import Condition
from ldm.unet.model import UNet, UNetConfig

RESULT = Path(__file__).parent / "results" / "checkpointing.json"
GOAL = 0.1
TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointingBenchmark(Config):
    """Seconds that a training stands still for a checkpoint."""

    base_channels: int = 128
    """Width of the UNet."""
    rows: int = 2
    """Rows of a step."""
    side: int = 16
    """Rows and columns of a latent."""
    steps: int = 6
    """Steps before each save."""
    rounds: int = 6
    """Saves of each kind."""
    threads: int = 2
    """CPU threads of the training."""
    folder: str = ""
    """Where checkpoints go; empty for the system's temporary folder."""
    quick: bool = False
    """A narrower UNet and two rounds."""
    save: bool = False
    """Write the result beside the other results."""


@dataclass(kw_only=True)
class Turns:
    """What was measured, in seconds.

    Attributes:
        foreground: stalls of saves that are waited for.
        background: stalls of saves in the background: copy and publication.
        writing: that such a save was written for.
        plain_steps: of steps while nothing is written.
        slowed_steps: of steps while something is.
        added: what these steps took longer in all, for each save.
    """

    foreground: list[float] = field(default_factory=list)
    background: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)
    plain_steps: list[float] = field(default_factory=list)
    slowed_steps: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)


class Training:
    """A training of a UNet on one batch, step by step."""

    def __init__(self, settings: CheckpointingBenchmark) -> None:
        torch.manual_seed(0)
        self.world = World(rank=0, size=1, device=torch.device("cpu"))
        network = UNet(_unet(settings))
        self.num_weights = sum(weight.numel() for weight in network.parameters())
        self.engine = LocalEngine(network, OptimConfig(), EmaConfig(), EngineConfig(), self.world)
        self.engines = {"unet": self.engine}
        self._noisy = torch.randn(settings.rows, 4, settings.side, settings.side)
        self._timestep = torch.linspace(0, 999, settings.rows)
        self._condition = Condition(states=torch.randn(settings.rows, TOKENS, 64))
        self._rows = settings.rows
        self.samples_seen = 0

    def step_seconds(self) -> float:
        """Make a step and return how long it took."""
        started = time.perf_counter()
        self.samples_seen += self._rows
        self.engine.update([self._loss], 1e-4, (self.samples_seen, self._rows))
        return time.perf_counter() - started

    def state(self) -> TrainState:
        """Return where it stands."""
        return TrainState(samples_seen=self.samples_seen)

    def _loss(self) -> Tensor:
        loss: Tensor = (self.engine.wrapped(self._noisy, self._timestep, self._condition) - self._noisy).square().mean()
        return loss


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(CheckpointingBenchmark, description=__doc__)
    if settings.quick:
        settings = replace(settings, base_channels=64, rounds=2, steps=3)
    torch.set_num_threads(settings.threads)
    training, turns = Training(settings), Turns()
    training.step_seconds()  # from now on there are moments
    with tempfile.TemporaryDirectory(dir=settings.folder or None) as folder:
        num_bytes = _check_same_files(training, folder)
        store = CheckpointStore(f"{folder}/run", {}, 1, training.world)
        _one_round(training, store, 1, Turns())  # takes memory, and room on the disk, for the first time
        for _ in range(settings.rounds):
            _one_round(training, store, settings.steps, turns)
    _report(settings, training.num_weights, num_bytes, turns)


def _check_same_files(training: Training, folder: str) -> int:
    """Save one state both ways, compare the digests of all files, and return their bytes."""
    stores = [CheckpointStore(f"{folder}/{kind}", {}, 1, training.world) for kind in ("foreground", "background")]
    stores[0].save(training.engines, training.state())
    stores[1].begin(training.engines, training.state())
    stores[1].finish()
    place = f"{training.samples_seen:012d}/{STATE_FILE}"
    files = [json.loads(storage.read_text(f"{store.root}/{place}"))["files"] for store in stores]
    assert files[0] == files[1], "the two ways do not write the same bytes"
    num_bytes = storage.folder_bytes(stores[0].root)
    for store in stores:
        storage.remove_folder(store.root)
    return num_bytes


def _one_round(training: Training, store: CheckpointStore, num_steps: int, turns: Turns) -> None:
    plain = [training.step_seconds() for _ in range(num_steps)]
    started = time.perf_counter()
    store.save(training.engines, training.state())
    turns.foreground.append(time.perf_counter() - started)
    plain += [training.step_seconds() for _ in range(num_steps)]
    store.begin(training.engines, training.state())
    slowed = []
    while not store.is_written():
        slowed.append(training.step_seconds())
    published = store.finish()
    assert published is not None
    turns.background.append(published.stall_seconds)
    turns.writing.append(published.background_seconds)
    turns.plain_steps += plain
    turns.slowed_steps += slowed
    turns.added.append(sum(slowed) - len(slowed) * statistics.median(plain))


def _report(settings: CheckpointingBenchmark, num_weights: int, num_bytes: int, turns: Turns) -> None:
    machine = platform.processor() or platform.machine()
    ratio = statistics.median(turns.background) / statistics.median(turns.foreground)
    in_all = statistics.median(map(sum, zip(turns.background, turns.added, strict=True)))
    print(f"{machine}, torch {torch.__version__}, {settings.threads} threads, {settings.rounds} rounds")
    print(f"UNet of {num_weights / 1e6:.1f} M weights, a checkpoint of {num_bytes / 1e6:,.0f} MB")
    print(f"{'seconds':42}{'median':>9}{'min':>9}{'max':>9}")
    rows = {
        "stall, saved in the foreground": turns.foreground,
        "stall, saved in the background": turns.background,
        "written in the background for": turns.writing,
        "step while nothing is written": turns.plain_steps,
        "step while something is": turns.slowed_steps,
        "what these steps took longer, in all": turns.added,
    }
    for name, seconds in rows.items():
        print(f"{name:42}{statistics.median(seconds):9.3f}{min(seconds):9.3f}{max(seconds):9.3f}")
    print(
        f"stall and slower steps together {in_all / statistics.median(turns.foreground):.3f} of the foreground's stall"
    )
    if settings.save:
        content = {
            "settings": settings.to_dict(),
            "machine": machine,
            "torch": torch.__version__,
            "num_weights": num_weights,
            "checkpoint_bytes": num_bytes,
            "seconds": asdict(turns),
            "ratio": ratio,
            "ratio_with_slower_steps": in_all / statistics.median(turns.foreground),
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"checkpointing ratio {ratio:.3f} goal {GOAL}")


def _unet(settings: CheckpointingBenchmark) -> UNetConfig:
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=settings.base_channels,
        channel_mult=(1, 2, 3),
        num_res_blocks=2,
        attention_factors=(4,),
        num_heads=4,
        context_width=64,
    )


if __name__ == "__main__":
    main()
