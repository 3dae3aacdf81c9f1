"""What benchmarks of one network against another have in common: settings, the record's head, turns and their row."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from jobs.command_line import MARKERS
from ldm.config import Config
from pipeline.latent_config import Device
from tests.benchmarks.neighbours import TRIES_PER_TURN, Clock, quiet_turns

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSettings(Config):
    """How two networks are timed in turns."""

    device: Device = Device.CPU
    """Where the networks lie."""
    rounds: int = 5
    """Turns of each side."""
    threads: int = 2
    """CPU threads."""
    quick: bool = False
    """Under a minute: two turns of the first network, however busy the machine is."""
    save: bool = False
    """Write the result beside the other results."""

    @property
    def is_gpu(self) -> bool:
        """Whether the networks lie on a GPU."""
        return self.device is Device.CUDA

    def wait(self) -> None:
        """Return when the device has done all it was told."""
        if self.is_gpu:
            torch.cuda.synchronize()


Work = TypeVar("Work")


def run(
    name: str,
    description: str,
    goal: float,
    cpu_works: Sequence[Work],
    gpu_works: Sequence[Work],
    row: Callable[[Work, PairSettings], dict[str, Any]],
    unit: str = "images/s",
) -> None:
    """Read the settings, measure each work by `row(work, settings)` and print, and on demand write, the result.

    Args:
        name: the benchmark's, and its file's among the results.
        description: shown by --help.
        goal: ratio of ours to theirs that is wanted.
        cpu_works: what is measured on a CPU; the first alone where it must be quick.
        gpu_works: the same on a GPU.
        row: measures one, prints its line and returns results by name, each with a ratio.
        unit: what the rates are of.
    """
    settings = tyro.cli(PairSettings, description=description, config=MARKERS)
    torch.set_num_threads(settings.threads)
    machine = torch.cuda.get_device_name() if settings.is_gpu else platform.processor()
    record: dict[str, Any] = {"settings": settings.to_dict(), "machine": machine or platform.machine()}
    record |= {"num_cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    print(f"{record['machine']}, {settings.threads} threads of {record['num_cores']} cores, torch {torch.__version__}")
    print(f"{unit:27}{'ours':>9}{'theirs':>9}{'ratio':>12}{'min':>7}{'max':>7}")
    chosen = gpu_works if settings.is_gpu else cpu_works
    results = [row(work, settings) for work in (chosen[:1] if settings.quick else chosen)]
    record["works"] = {name: result for found in results for name, result in found.items()}
    record["ratio"] = min(result["ratio"] for result in record["works"].values())
    if settings.save:
        path = RESULTS / f"{name}{'-cuda' if settings.is_gpu else ''}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name} ratio {record['ratio']:.2f} (the least) goal {goal}")


def in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], settings: PairSettings, *, repeats: int, images: int
) -> dict[str, Any]:
    """Return the rates of both sides in images a second, turn by turn, and their ratio.

    Args:
        ours: one call of ours.
        theirs: one call of the other's.
        settings: how many turns.
        repeats: calls that are timed together.
        images: images of one call.
    """

    def clock(side: Callable[[], object]) -> Clock:
        start = Clock.now()
        for _ in range(repeats):
            side()
        settings.wait()
        return Clock.now() - start

    turns = quiet_turns(
        lambda: (clock(ours), clock(theirs)),
        2 if settings.quick else settings.rounds,
        1 if settings.quick else TRIES_PER_TURN,
    )
    rates = [[images * repeats / side.wall for side in turn.result] for turn in turns]
    ratios = [one / other for one, other in rates]
    return {
        "images_per_second": {"ours": [one for one, _ in rates], "theirs": [other for _, other in rates]},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "neighbours": [turn.neighbours for turn in turns],
    }


def line(name: str, result: dict[str, Any]) -> str:
    """Return a result's line: both medians, the ratio's median and its ends."""
    one, other = (statistics.median(side) for side in result["images_per_second"].values())
    ratios = result["ratios"]
    return f"{name:27}{one:9.1f}{other:9.1f}{result['ratio']:12.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
