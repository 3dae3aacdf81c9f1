"""Killed without warning, anywhere and as often as the seed says, a dataset comes out as if it never had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.duplicates import DuplicateConfig
from pipeline.store.verification import verify_dataset
from tests.chaos_proxy import chaos_proxy
from tests.servers import S3Server
from tests.small_datasets import add_images, contents, folder_config

pytestmark = pytest.mark.timeout(3000)
SEED = 3
NUM_IMAGES = 40
DRIVER = """
import sys, ray
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import make_dataset
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
make_dataset(DatasetConfig.from_yaml(open(sys.argv[1]).read()))
"""
VICTIMS = ("driver", "worker", "raylet")
LONGEST_RUN = 240.0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that take a while, with copies among them, so that kills find every phase."""
    folder = tmp_path_factory.mktemp("images")
    add_images(folder, range(NUM_IMAGES), side=300)
    for number in range(0, NUM_IMAGES, 10):
        (folder / f"copy-{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
        (folder / f"copy-{number}.txt").write_text(f"copy of {number}")
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "broken.txt").write_text("broken")
    return folder


def config_of(root: Path | str, images: Path) -> DatasetConfig:
    return folder_config(root, images, rows_per_shard=4, duplicates=DuplicateConfig(exact=True, near_distance=2))


def start(config: DatasetConfig, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder / "config.yaml")],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def finish(config: DatasetConfig, folder: Path) -> None:
    process = start(config, folder)
    assert process.wait(timeout=LONGEST_RUN) == 0, (folder / "output").read_text()[-3000:]


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


def choose(driver: int, victim: str, dice: random.Random) -> int | None:
    """Return the process to kill, or None where there is none of that kind yet."""
    if victim == "driver":
        return driver
    sign = "ray::" if victim == "worker" else "/raylet/raylet"
    found = sorted(process.pid for process in processes_of(driver) if sign in name_of(process))
    return dice.choice(found) if found else None


def kill_once(config: DatasetConfig, folder: Path, victim: str, after_seconds: float, dice: random.Random) -> str:
    """Start a run, kill one of its processes at a moment of it, and see the run to its end; say how it went."""
    process = start(config, folder)
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
    assert code == 0 or not killed or victim != "worker", (folder / "output").read_text()[-3000:]
    for left in everything:  # what is left of the killed cluster, by its own handles
        if left.is_running():
            left.kill()
    psutil.wait_procs(everything, timeout=20)
    return f"{victim} after {after_seconds:.1f} s: {'killed' if killed else 'too late'}, driver ended with {code}"


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A dataset that was never killed, and how long it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    started = time.monotonic()
    finish(config_of(folder / "dataset", images), folder)
    return folder / "dataset", time.monotonic() - started


def survives(images: Path, unbroken: tuple[Path, float], folder: Path, num_kills: int, root: str) -> None:
    dice = random.Random(SEED)
    whole, seconds = unbroken
    config = config_of(root, images)
    story = [
        kill_once(config, folder, VICTIMS[number % 3], dice.uniform(0.2, 1.0) * seconds, dice)
        for number in range(num_kills)
    ]
    print("\n".join(story))
    finish(config, folder)
    assert contents(Path(root)) == contents(whole), story
    assert verify_dataset(root).problems == ()


def test_dataset_killed_three_times_is_the_one_never_killed(images, unbroken, tmp_path):
    survives(images, unbroken, tmp_path, 3, str(tmp_path / "dataset"))


@pytest.mark.slow
def test_dataset_killed_twenty_times_is_the_one_never_killed(images, unbroken, tmp_path):
    """Each story begins anew, so that no kill finds a finished dataset."""
    for number in range(7):
        folder = tmp_path / str(number)
        survives(images, unbroken, folder, 3, str(folder / "dataset"))


def downloaded(s3: S3Server, root: str) -> dict[str, bytes]:
    client = s3.client()
    prefix = root.removeprefix("s3://") + "/"
    return {path.removeprefix(prefix): client.cat_file(path) for path in sorted(client.find(prefix))}


@pytest.mark.slow  # the next one is stricter
def test_dataset_in_object_storage_is_the_one_on_disk(images, unbroken, s3, s3_root, tmp_path):
    config = config_of(s3_root, images)
    finish(config, tmp_path)
    assert downloaded(s3, s3_root) == contents(unbroken[0])
    assert verify_dataset(s3_root).problems == ()


def test_dataset_through_a_store_that_fails_one_request_in_five_is_the_one_on_disk(
    images, unbroken, s3, s3_root, tmp_path, monkeypatch
):
    with chaos_proxy(s3.endpoint, SEED) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        finish(replace(config_of(s3_root, images), max_actors=2), tmp_path)
        assert min(proxy.troubles[trouble] for trouble in ("busy", "drop", "cut", "delay")) > 10, proxy.troubles
    assert downloaded(s3, s3_root) == contents(unbroken[0])
