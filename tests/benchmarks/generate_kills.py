"""A file of prompts drawn by two actors whose processes are killed again and again: the bytes of a run never killed.

python -m tests.benchmarks.generate_kills [--kills 20] [--seed 11] [--save]

Real Ray, a tiny model on the CPU, ten tars. Each story starts anew and kills up to three processes, a driver, a worker
and the raylet in an order of chance at moments of chance; then the same command runs to its end, and every byte of the
folder must be that of the unbroken run, which one actor made.
"""

from __future__ import annotations

import json
import platform
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from pipeline.generate_config import GenerateConfig
from pipeline.generate_plan import verify_generated
from tests.kills import Job, kill_again_and_again
from tests.small_datasets import contents
from tests.tiny_model import generate_config, write_lines, write_model

RESULTS = Path(__file__).parent / "results"
NUM_PROMPTS = 160
SEED = 11
DRIVER = """
import sys, ray
from pipeline.generate_config import GenerateConfig
from pipeline.generate_plan import plan_generate
from pipeline.run import run
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
run(plan_generate(GenerateConfig.from_yaml(open(sys.argv[1]).read())))
"""


@dataclass(frozen=True, kw_only=True)
class Unbroken:
    """What killed runs are compared with.

    Attributes:
        folder: where model and prompts lie.
        files: every file of the finished folder.
        seconds: how long the run took.
    """

    folder: Path
    files: dict[str, bytes]
    seconds: float


def config_of(folder: Path, root: Path, num_actors: int) -> GenerateConfig:
    """Return ten tars of sixteen prompts, some of which come again."""
    return generate_config(
        folder / "run" / "model", folder / "prompts.txt", root, num_actors=num_actors, shard_rows=16, batch_size=4
    )


def unbroken_run(folder: Path) -> Unbroken:
    """Make a model and prompts in a folder, and draw them with one actor that nobody kills."""
    write_model(folder)
    write_lines(folder / "prompts.txt", [f"a square, number {number % 150}" for number in range(NUM_PROMPTS)])
    started = time.monotonic()
    Job(DRIVER, config_of(folder, folder / "unbroken", 1), folder).finish()
    return Unbroken(folder=folder, files=contents(folder / "unbroken"), seconds=time.monotonic() - started)


def one_story(whole: Unbroken, number: int, num_kills: int, seed: int = SEED) -> list[str]:
    """Draw the same prompts with two actors, killed up to `num_kills` times, compare, and return how it went."""
    folder = whole.folder / f"story {number}"
    config = config_of(whole.folder, folder / "generated", 2)
    dice = random.Random(f"{seed} {number}")
    story = kill_again_and_again(Job(DRIVER, config, folder), num_kills, whole.seconds, dice)
    assert contents(folder / "generated") == whole.files, story
    assert verify_generated(config).problems == ()
    return story


def num_landed(lines: list[str]) -> int:
    """Return how many kills met a process."""
    return sum(": killed" in line for line in lines)


def main(kills: int = 20, seed: int = SEED, save: bool = False) -> None:
    """Kill so many processes over all stories.

    Args:
        kills: kills that must meet a process.
        seed: draws victims and moments.
        save: write the result beside the other results.
    """
    with tempfile.TemporaryDirectory(prefix="generate-kills-") as scratch:
        started = time.monotonic()
        whole = unbroken_run(Path(scratch))
        lines: list[str] = []
        while num_landed(lines) < kills:
            lines += one_story(whole, len(lines), 3, seed)
    result = {
        "seed": seed,
        "prompts": NUM_PROMPTS,
        "files": len(whole.files),
        "bytes": sum(map(len, whole.files.values())),
        "kills": num_landed(lines),
        "stories": lines,
        "same_bytes": True,
        "seconds": {"unbroken": round(whole.seconds, 1), "all": round(time.monotonic() - started, 1)},
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    if save:
        (RESULTS / "generate_kills.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"generate_kills {result['kills']} kills, {result['files']} files of {result['bytes']:,} bytes the same")


if __name__ == "__main__":
    tyro.cli(main)
