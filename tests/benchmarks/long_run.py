"""A long training that is killed again and again against one that never is: the same weights, and what each lost.

python -m tests.benchmarks.long_run --home DIR [--steps 3000] [--kills 10] [--quick] [--save]

The emoji recipe's second stage on two ZeRO-2 ranks under Ray, in two roots over the same latents. In one, processes are
killed without warning at moments that the seed draws: the driver, a worker, or the raylet. Started again with the same
DIR, it goes on where it was: what is finished is not run again.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from jobs.recipes import emoji
from ldm.config import Config
from ldm.interop.weights import load_weights
from tests.kills import VICTIMS, choose, processes_of

RESULTS = Path(__file__).parent / "results"
HOUSE = Path(__file__).parents[2]
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
POLL_SECONDS = 0.2
LONGEST_SILENCE = 1_200.0
"""Seconds without a new record after which a run counts as hung."""
PATIENCE = 90.0
"""Seconds that a driver has to end by itself once its raylet is dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRun(Config):
    """How long, and how often it is killed."""

    home: str
    """Folder for data, both trainings and what was killed; kept."""
    steps: int = 3_000
    """Steps of each training."""
    kills: int = 10
    """Processes killed in one of them."""
    seed: int = 0
    """Draws victims and moments."""
    quick: bool = False
    """Minutes: 120 steps, 3 kills."""
    save: bool = False
    """Write the result beside the other results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One kill.

    Attributes:
        victim: what is killed.
        at_samples: the record must have come so far.
        delay: seconds to wait from then on.
    """

    victim: str
    at_samples: int
    delay: float


class Training:
    """One of the two trainings, as a person starts it."""

    def __init__(self, settings: LongRun, name: str) -> None:
        self.folder = Path(settings.home) / name
        self.total = settings.steps * emoji.train_ldm("").batch_size
        self._command = [
            *(sys.executable, "-m", "jobs.train_ldm", "emoji", "--home", settings.home),
            *("--root", str(self.folder / "ldm"), "--record", str(self.folder / "record"), "--tracking.uri", ""),
            *("--loop.total-samples", str(self.total), "--launch.max-failures", "100"),
        ]

    @property
    def is_finished(self) -> bool:
        """Say whether the finished model is there."""
        return (self.folder / "ldm" / "model" / "model.json").exists()

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, or start it again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(self._command, cwd=HOUSE, stdout=output, stderr=output, start_new_session=True)

    def finish(self) -> None:
        """Run it to its end."""
        if self.start().wait() != 0:
            raise RuntimeError(f"the training failed: {(self.folder / 'output').read_text()[-2_000:]}")

    def record(self, metric: str) -> dict[int, float]:
        """Return a metric by samples seen; steps that were repeated must have given the same."""
        found: dict[int, float] = {}
        path = self.folder / "record" / "record.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if metric in entry.get("metrics", {}):
                value, at = entry["metrics"][metric], entry["samples_seen"]
                if found.setdefault(at, value) != value:
                    raise AssertionError(f"{metric} at {at:,} samples was {found[at]} before a kill, {value} after it")
        return found

    @property
    def samples_seen(self) -> int:
        """Return how far the record has come."""
        return max(self.record("loss"), default=0)


def main() -> None:
    """Run both trainings and compare them."""
    settings = tyro.cli(LongRun, description=__doc__)
    if settings.quick:
        settings = replace(settings, steps=120, kills=3)
    for job in ("shard_dataset", "precompute_latents"):
        subprocess.run([sys.executable, "-m", f"jobs.{job}", "emoji", "--home", settings.home], cwd=HOUSE, check=True)
    unbroken, killed = Training(settings, "unbroken"), Training(settings, "killed")
    seconds: dict[str, float | None] = {}
    for training, kills in ((unbroken, []), (killed, drawn(settings))):
        is_resumed, begun = training.folder.exists(), time.monotonic()
        story = kill_through(training, kills)
        if not training.is_finished:
            training.finish()
        seconds[training.folder.name] = None if is_resumed else time.monotonic() - begun
    report(settings, unbroken, killed, story, seconds)


def drawn(settings: LongRun) -> list[Kill]:
    """Return the kills in their order; of three each kind of victim gets one."""
    dice = random.Random(settings.seed)
    victims = [victim for _ in range(0, settings.kills, len(VICTIMS)) for victim in dice.sample(VICTIMS, len(VICTIMS))]
    total = Training(settings, "killed").total
    last = total - 2 * emoji.train_ldm("").loop.log_every  # there is a record yet to come when it is due
    moments = sorted(dice.randrange(0, last) for _ in range(settings.kills))
    return [
        Kill(victim=victim, at_samples=moment, delay=dice.uniform(0.0, 12.0))
        for victim, moment in zip(victims, moments, strict=False)
    ]


def kill_through(training: Training, kills: list[Kill]) -> list[str]:
    """Make the kills that are yet to come, each once the record has come far enough; return what happened."""
    path = training.folder / "kills.json"
    story: list[str] = json.loads(path.read_text()) if path.exists() else []
    dice = random.Random(len(story))
    process: subprocess.Popen[bytes] | None = None
    for kill in kills[len(story) :]:
        if process is None or process.poll() is not None:
            process = training.start()
        try:
            _wait_for(training, process, kill)
            target = _found(process, kill.victim, dice)
        except BaseException:  # two trainings in one root would spoil it
            _see_to_its_end(process, set(processes_of(process.pid)), patience=0.0)
            raise
        everything = set(processes_of(process.pid))
        at = training.samples_seen
        os.kill(target, signal.SIGKILL)
        if kill.victim != "worker":  # Ray Train itself starts workers again
            _see_to_its_end(process, everything)
        story.append(f"{kill.victim} killed after the record of sample {at:,}, {kill.delay:.1f} s later")
        print(story[-1], flush=True)
        path.write_text(json.dumps(story, indent=1))
    if process is not None and process.wait() != 0 and not training.is_finished:
        training.finish()
    return story


def _wait_for(training: Training, process: subprocess.Popen[bytes], kill: Kill) -> None:
    changed, seen = time.monotonic(), -1
    while seen < kill.at_samples:
        if process.poll() is not None:
            raise RuntimeError(f"the training ended by itself: {(training.folder / 'output').read_text()[-2_000:]}")
        if training.samples_seen != seen:
            changed, seen = time.monotonic(), training.samples_seen
        if time.monotonic() - changed > LONGEST_SILENCE:
            raise RuntimeError(f"nothing new after {seen:,} samples")
        time.sleep(POLL_SECONDS)
    time.sleep(kill.delay)


def _found(process: subprocess.Popen[bytes], victim: str, dice: random.Random) -> int:
    """Return the process to kill, once there is one: a run that was started again has none for a while."""
    ends = time.monotonic() + LONGEST_SILENCE
    while (target := choose(process.pid, victim, dice)) is None:
        if process.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"there is no {victim} to kill")
        time.sleep(POLL_SECONDS)
    return target


def _see_to_its_end(
    process: subprocess.Popen[bytes], everything: set[psutil.Process], patience: float = PATIENCE
) -> None:
    """Wait until a driver is gone, and take away what is left of its cluster."""
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:  # a driver may wait for ever for a raylet that is no more
        process.kill()
        process.wait()
    for left in everything:
        if left.is_running():
            left.kill()
    psutil.wait_procs(everything, timeout=20)


def report(
    settings: LongRun, unbroken: Training, killed: Training, story: list[str], seconds: dict[str, float | None]
) -> None:
    """Print both curves and whether the weights are the same, and save them."""
    one, other = (load_weights(str(training.folder / "ldm" / WEIGHTS)) for training in (unbroken, killed))
    is_same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    curves = {name: (unbroken.record(name), killed.record(name)) for name in ("loss", "validation_loss")}
    print(f"{'samples':>10}{'unbroken':>12}{'killed':>12}  validation loss")
    for at, value in curves["validation_loss"][0].items():
        print(f"{at:10,}{value:12.6f}{curves['validation_loss'][1].get(at, float('nan')):12.6f}")
    same = {name: before == after for name, (before, after) in curves.items()}
    result = {
        "settings": replace(settings, home="").to_dict(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "kills": story,
        "seconds": seconds,
        "same_weights": is_same,
        "same_curves": same,
        "validation_loss": list(curves["validation_loss"][0].items()),
        "loss": list(curves["loss"][0].items()),
    }
    if settings.save:
        (RESULTS / "long_run.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"grids of both: {unbroken.folder / 'record'}, {killed.folder / 'record'}")
    print(f"{len(story)} kills, same weights: {is_same}, same curves: {all(same.values())}")
    if not (is_same and all(same.values())):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
