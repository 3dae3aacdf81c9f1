"""Killing a job's processes at moments that a seed chooses: its driver, a worker of Ray's, Ray's own server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ldm.config import Config

VICTIMS = ("driver", "worker", "raylet")
LONGEST_RUN = 240.0


@dataclass(frozen=True)
class Job:
    """A job in a process of its own.

    Attributes:
        program: Python source that reads its config from the YAML file in `sys.argv[1]`.
        config: the config.
        folder: where config and output go.
    """

    program: str
    config: Config
    folder: Path

    def start(self) -> subprocess.Popen[bytes]:
        """Start it with a Ray of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self.config.to_yaml())
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        environment["RAY_prestart_worker_first_driver"] = "0"  # as the jobs have it
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", self.program, str(self.folder / "config.yaml")],
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Run it to its end, unbroken."""
        assert self.start().wait(timeout=LONGEST_RUN) == 0, self.output

    @property
    def output(self) -> str:
        """The last of what it printed."""
        return (self.folder / "output").read_text()[-3000:]


def kill_again_and_again(job: Job, num_kills: int, seconds: float, dice: random.Random) -> list[str]:
    """Run a job so often, killing one of its processes each time, unless it ends before, then to its end.

    Args:
        job: what is run.
        num_kills: how often; of three kills each kind of victim gets one, in an order of chance.
        seconds: how long an unbroken run takes.
        dice: chooses the moments.
    """
    victims = [victim for _ in range(0, num_kills, 3) for victim in dice.sample(VICTIMS, 3)]
    story: list[str] = []
    for victim in victims[:num_kills]:
        story.append(kill_once(job, victim, dice.uniform(0.15, 0.8) * seconds, dice))
        if ": killed" not in story[-1]:  # it came to its end, and there is nothing left to kill
            break
    print("\n".join(story))
    job.finish()
    return story


def kill_in_all(num_kills: int, one_story: Callable[[int], list[str]]) -> None:
    """Let stories happen until so many kills have met a process; a moment may be too late, and then counts for none.

    Args:
        num_kills: kills that must have landed, over all stories.
        one_story: runs the story of the given number, with a job of its own, and returns it.
    """
    lines: list[str] = []
    while sum(": killed" in line for line in lines) < num_kills:
        assert len(lines) < 4 * num_kills, lines
        lines += one_story(len(lines))


def processes_of(driver: int) -> list[psutil.Process]:
    """Return everything that a driver started: Ray's servers and its workers."""
    try:
        return psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def is_kind(name: str, victim: str) -> bool:
    """Say whether a process is a worker, or takes its whole node along: the raylet, and agents that it dies with."""
    is_agent = name.startswith("ray::") and name.endswith("Agent")
    if victim == "worker":
        return name.startswith("ray::") and not is_agent
    return is_agent or "/raylet/raylet" in name


def choose(driver: int, victim: str, dice: random.Random) -> int | None:
    """Return the process to kill, or None where there is none of that kind yet."""
    if victim == "driver":
        return driver
    found = sorted(process.pid for process in processes_of(driver) if is_kind(name_of(process), victim))
    return dice.choice(found) if found else None


def kill_once(job: Job, victim: str, after_seconds: float, dice: random.Random) -> str:
    """Start a run, kill one of its processes at a moment of it, and see the run to its end; say how it went."""
    process = job.start()
    everything: set[psutil.Process] = set()
    killed, moment = False, time.monotonic() + after_seconds
    while process.poll() is None and time.monotonic() < moment + LONGEST_RUN:
        if not killed:
            everything.update(processes_of(process.pid))
        if not killed and time.monotonic() >= moment:
            target = choose(process.pid, victim, dice)
            if target is not None:
                os.kill(target, signal.SIGKILL)
                killed = True
                moment = time.monotonic() if victim != "raylet" else time.monotonic() - LONGEST_RUN + 60
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()  # a driver may wait for ever for a raylet that is no more
    code = process.wait()
    assert code == 0 or not killed or victim != "worker", job.output
    for left in everything:  # what is left of the killed cluster, by its own handles
        if left.is_running():
            left.kill()
    psutil.wait_procs(everything, timeout=20)
    return f"{victim} after {after_seconds:.1f} s: {'killed' if killed else 'too late'}, driver ended with {code}"
