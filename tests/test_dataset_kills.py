"""Killed without warning, anywhere and as often as the seed says, a dataset comes out as if it never had been."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.duplicates import DuplicateConfig
from pipeline.store.verification import verify_dataset
from tests.chaos_proxy import chaos_proxy
from tests.kills import Job, kill_again_and_again, kill_in_all
from tests.servers import S3Server
from tests.small_datasets import add_images, contents, folder_config

pytestmark = pytest.mark.timeout(3000)
SEED = 3
NUM_IMAGES = 24
DRIVER = """
import sys, ray
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import make_dataset
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
make_dataset(DatasetConfig.from_yaml(open(sys.argv[1]).read()))
"""


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


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A dataset that was never killed, and how long it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    started = time.monotonic()
    Job(DRIVER, config_of(folder / "dataset", images), folder).finish()
    return folder / "dataset", time.monotonic() - started


def survives(images: Path, unbroken: tuple[Path, float], folder: Path, num_kills: int, root: str) -> list[str]:
    whole, seconds = unbroken
    job = Job(DRIVER, config_of(root, images), folder)
    story = kill_again_and_again(job, num_kills, seconds, random.Random(f"{SEED} {folder.name}"))
    assert contents(Path(root)) == contents(whole), story
    assert verify_dataset(root).problems == ()
    return story


@pytest.mark.parametrize("num_kills, kills_a_story", [(1, 1), pytest.param(20, 3, marks=pytest.mark.slow)])
def test_dataset_killed_on_its_way_is_the_one_never_killed(images, unbroken, tmp_path, num_kills, kills_a_story):
    """Each story begins anew, so that no kill finds a finished dataset."""

    def one_story(number: int) -> list[str]:
        folder = tmp_path / str(number)
        return survives(images, unbroken, folder, kills_a_story, str(folder / "dataset"))

    kill_in_all(num_kills, one_story)


def downloaded(s3: S3Server, root: str) -> dict[str, bytes]:
    client = s3.client()
    prefix = root.removeprefix("s3://") + "/"
    return {path.removeprefix(prefix): client.cat_file(path) for path in sorted(client.find(prefix))}


@pytest.mark.slow  # the next one is stricter
def test_dataset_in_object_storage_is_the_one_on_disk(images, unbroken, s3, s3_root, tmp_path):
    config = config_of(s3_root, images)
    Job(DRIVER, config, tmp_path).finish()
    assert downloaded(s3, s3_root) == contents(unbroken[0])
    assert verify_dataset(s3_root).problems == ()


def test_dataset_through_a_store_that_fails_one_request_in_five_is_the_one_on_disk(
    images, unbroken, s3, s3_root, tmp_path, monkeypatch
):
    with chaos_proxy(s3.endpoint, SEED) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        Job(DRIVER, replace(config_of(s3_root, images), max_actors=2), tmp_path).finish()
        assert min(proxy.troubles[trouble] for trouble in ("busy", "drop", "cut", "delay")) > 10, proxy.troubles
    assert downloaded(s3, s3_root) == contents(unbroken[0])
