"""Killed without warning, anywhere and as often as the seed says, a latent cache comes out as if it never had been."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from pipeline.latent_config import LatentsConfig
from pipeline.latent_verification import verify_latents
from tests.kills import Job, kill_again_and_again, kill_in_all
from tests.small_datasets import contents
from tests.tiny_latents import latents_config, write_autoencoder, write_dataset

# Their short form is a kill of the whole job in test_jobs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
SEED = 5
DRIVER = """
import sys, ray
from pipeline.latent_config import LatentsConfig
from pipeline.latent_plan import plan_latents
from pipeline.run import run
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
run(plan_latents(LatentsConfig.from_yaml(open(sys.argv[1]).read())))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of eleven shards, and an autoencoder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_dataset(folder / "dataset", sizes=(150,) * 10)
    write_autoencoder(folder / "autoencoder")
    return folder


def config_of(inputs: Path, root: Path, **fields: object) -> LatentsConfig:
    return latents_config(inputs, root=str(root), num_cpus=1.0, **fields)


@pytest.fixture(scope="module")
def unbroken(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A cache that was never killed, made by one worker, and how long it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    started = time.monotonic()
    Job(DRIVER, config_of(inputs, folder / "latents", num_actors=1), folder).finish()
    return folder / "latents", time.monotonic() - started


def survives(inputs: Path, unbroken: tuple[Path, float], folder: Path, num_kills: int) -> list[str]:
    whole, seconds = unbroken
    config = config_of(inputs, folder / "latents")
    story = kill_again_and_again(
        Job(DRIVER, config, folder), num_kills, seconds, random.Random(f"{SEED} {folder.name}")
    )
    assert contents(folder / "latents") == contents(whole), story
    assert verify_latents(config, 0.01).problems == ()
    return story


def test_latents_killed_twenty_times_are_those_never_killed(inputs, unbroken, tmp_path):
    """By two workers, against one worker's; each story begins anew, so that no kill finds a finished cache."""
    kill_in_all(20, lambda number: survives(inputs, unbroken, tmp_path / str(number), 3))
