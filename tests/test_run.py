"""Laws of running a plan: killed anywhere and started again it is the unbroken run, and a failure names its shard."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from PIL import Image
from rich.console import Console

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import plan_dataset
from pipeline.ingest.stage import IngestStage
from pipeline.ingest.transforms import PictureConfig
from pipeline.plan import Plan, Resources, ShardTask, Stage, describe, missing
from pipeline.progress import ShardProgress
from pipeline.run import MAX_STARTS, NUM_ATTEMPTS, run
from pipeline.sources.folder import FolderConfig
from pipeline.store.manifest import ShardRecord, load_manifest
from pipeline.store.schema import Split
from pipeline.store.verification import verify_dataset

NUM_IMAGES = 36
ROWS_PER_SHARD = 3


@pytest.fixture(scope="module")
def local_ray():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images that take a while to decode, so that a kill finds the run in its middle; one is broken."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    for i in range(NUM_IMAGES):
        (folder / f"{i}.png").write_bytes(stream.getvalue() if i else b"broken")
        (folder / f"{i}.txt").write_text(f"noise number {i}")
    return folder


def config_of(root: Path, images: Path, image_size: int = 32) -> DatasetConfig:
    source = FolderConfig(folder=str(images), rows_per_shard=ROWS_PER_SHARD, holdout_share=0.2)
    return DatasetConfig(root=str(root), source=source, picture=PictureConfig(image_size=image_size))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(local_ray, images, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unbroken") / "dataset"
    run(plan_dataset(config_of(root, images)))
    return root


class StubbornStage:
    """An ingest stage with something wrong that depends on the shard; knows of earlier starts by files."""

    def __init__(self, config: DatasetConfig, marks: str, trouble: str, num_times: int) -> None:
        self.ingest = IngestStage(config, config.root)
        self.marks, self.trouble, self.num_times = Path(marks), trouble, num_times

    def __call__(self, task: ShardTask) -> ShardRecord:
        if (task.split, task.name) == (Split.TRAIN, "000001"):
            starts = sorted(self.marks.iterdir())
            (self.marks / str(len(starts))).touch()
            if len(starts) < self.num_times and self.trouble == "raise":
                raise OSError("the disk is on fire")
            if len(starts) < self.num_times:
                os.kill(self._victim(), signal.SIGKILL)
        return self.ingest(task)

    def _victim(self) -> int:
        """This process, or the actor beside it that counts starts."""
        if self.trouble == "kill":
            return os.getpid()
        beside = psutil.Process(os.getppid()).children()
        (counter,) = [process.pid for process in beside if "StartCounter" in " ".join(process.cmdline())]
        return counter


def troubled(config: DatasetConfig, marks: Path, trouble: str, num_times: int) -> Plan:
    marks.mkdir()
    make_stage = partial(StubbornStage, config, str(marks), trouble, num_times)
    return replace(plan_dataset(config), make_stage=make_stage)


def test_run_makes_every_shard_and_counts_every_row(unbroken):
    manifest = load_manifest(str(unbroken))
    assert verify_dataset(str(unbroken)).problems == ()
    assert sum(manifest.num_rows(split) for split in Split) == NUM_IMAGES - 1
    totals = [
        sum(counts.get(status, 0) for counts in manifest.summary["counts"].values())
        for status in ("ok", "not_an_image")
    ]
    assert totals == [NUM_IMAGES - 1, 1]


def test_run_in_another_place_gives_the_same_bytes(unbroken, images, tmp_path):
    root = tmp_path / "other" / "place"
    report = run(replace(plan_dataset(config_of(root, images)), resources=Resources(num_cpus=0.5, max_actors=1)))
    assert contents(root) == contents(unbroken)
    assert report.manifest.digest == load_manifest(str(unbroken)).digest
    assert (report.num_rows, report.num_skipped) == (NUM_IMAGES - 1, 0)
    assert report.counts == {"not_an_image": 1, "ok": NUM_IMAGES - 1}


def test_run_again_skips_everything(unbroken, images):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.tar")}
    report = run(plan_dataset(config_of(unbroken, images)))
    assert (report.num_rows, report.num_shards, report.num_skipped) == (0, 0, len(before))
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.tar")} == before


DRIVER = """
import sys, ray
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import plan_dataset
from pipeline.run import run
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
run(plan_dataset(DatasetConfig.from_yaml(open(sys.argv[1]).read())))
"""


def test_run_killed_in_the_middle_and_started_again_is_the_unbroken_run(unbroken, images, tmp_path):
    root = tmp_path / "dataset"
    config = config_of(root, images)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml")]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    deadline = time.monotonic() + 120
    while not list(root.rglob("*.record.json")) and driver.poll() is None and time.monotonic() < deadline:
        os.sched_yield()
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not (root / "manifest.json").exists()
    plan = plan_dataset(config)
    assert 0 < len(missing(plan)) < len(plan.tasks)
    report = run(plan)
    assert report.num_shards > 0
    assert contents(root) == contents(unbroken)


def test_run_after_half_written_files_is_the_unbroken_run(unbroken, images, tmp_path):
    root = Path(shutil.copytree(unbroken, tmp_path / "dataset"))
    (root / "manifest.json").unlink()
    (root / "train" / "000000.record.json").unlink()  # killed before the commit
    (root / "train" / "000000.index").unlink()  # killed between tar and index
    (root / "train" / ".000003.tar.0123abcd.partial").write_bytes(b"half")
    (root / "train" / "000002.tar").unlink()  # lost after the commit
    plan = plan_dataset(config_of(root, images))
    assert [task.name for task in missing(plan)] == ["000000", "000002"]
    assert run(plan).num_shards == 2
    assert contents(root) == contents(unbroken)


def test_run_into_the_folder_of_another_dataset_is_refused_untouched(unbroken, images):
    before = contents(unbroken)
    with pytest.raises(ValueError, match=r"holds another dataset[^$]*identity.picture.image_size is 32 there, 48 here"):
        run(plan_dataset(config_of(unbroken, images, image_size=48)))
    assert contents(unbroken) == before


def test_run_makes_a_shard_again_when_its_source_changed(unbroken, images, tmp_path):
    plan = plan_dataset(config_of(Path(shutil.copytree(unbroken, tmp_path / "dataset")), images))
    changed = replace(plan.tasks[1], source_digest="other")
    again = replace(plan, tasks=(plan.tasks[0], changed, *plan.tasks[2:]))
    assert missing(again) == [changed]
    assert run(again).num_shards == 1
    assert missing(again) == []


def test_failing_shard_names_itself_and_its_cause_and_spares_the_others(local_ray, images, tmp_path):
    config = config_of(tmp_path / "dataset", images)
    plan = troubled(config, tmp_path / "marks", "raise", num_times=9)
    with pytest.raises(RuntimeError, match=r"train/000001 .*OSError: the disk is on fire"):
        run(plan)
    assert len(list((tmp_path / "marks").iterdir())) == NUM_ATTEMPTS
    assert [(task.split, task.name) for task in missing(plan)] == [(Split.TRAIN, "000001")]
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def test_shard_that_fails_once_is_tried_again(unbroken, images, tmp_path):
    root = tmp_path / "dataset"
    run(troubled(config_of(root, images), tmp_path / "marks", "raise", num_times=1))
    assert contents(root) == contents(unbroken)


def test_worker_killed_in_its_work_is_replaced(unbroken, images, tmp_path):
    root = tmp_path / "dataset"
    run(troubled(config_of(root, images), tmp_path / "marks", "kill", num_times=1))
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert contents(root) == contents(unbroken)


def test_counter_of_starts_killed_in_its_work_is_replaced(unbroken, images, tmp_path):
    root = tmp_path / "dataset"
    run(troubled(config_of(root, images), tmp_path / "marks", "kill the counter", num_times=1))
    assert contents(root) == contents(unbroken)


@pytest.mark.slow
def test_shard_that_kills_every_worker_ends_the_job_with_its_name(local_ray, images, tmp_path):
    plan = troubled(config_of(tmp_path / "dataset", images), tmp_path / "marks", "kill", num_times=99)
    with pytest.raises(RuntimeError, match=rf"train/000001 .*its worker process died {MAX_STARTS} times"):
        run(plan)
    assert [task.name for task in missing(plan)] == ["000001"]


def test_stage_that_cannot_be_built_fails_with_its_own_words(local_ray, images, tmp_path):
    def refuse() -> Stage:
        raise ValueError("the autoencoder's weights are missing")

    with pytest.raises(RuntimeError, match="the autoencoder's weights are missing"):
        run(replace(plan_dataset(config_of(tmp_path, images)), make_stage=refuse))


def test_worker_larger_than_the_cluster_is_refused_before_any_work(local_ray, images, tmp_path):
    plan = replace(plan_dataset(config_of(tmp_path, images)), resources=Resources(num_gpus=1))
    with pytest.raises(ValueError, match=r"'GPU': 1.* the Ray cluster has 2 CPU and 0 GPU"):
        run(plan)


def test_run_without_enough_disk_is_refused(local_ray, images, tmp_path):
    plan = replace(plan_dataset(config_of(tmp_path, images)), num_bytes_estimate=10**18)
    with pytest.raises(ValueError, match="needs about 1,000,000,000,000.0 MB free"):
        run(plan)


def test_description_says_what_is_there_and_what_is_missing(unbroken, images, tmp_path):
    empty, full = (describe(plan_dataset(config_of(root, images))) for root in (tmp_path / "new", unbroken))
    num_shards = len(list(unbroken.rglob("*.tar")))
    assert f"there    0, missing {num_shards}" in empty
    assert f"there    {num_shards}, missing 0" in full
    assert "to write about 0.0 MB" in full
    assert not (tmp_path / "new").exists()


def test_progress_without_a_terminal_ends_in_one_line_with_the_totals():
    stream = io.StringIO()
    with ShardProgress("dataset", num_shards=5, num_there=2, console=Console(file=stream)) as progress:
        for _ in range(3):
            progress.advance(10, {"ok": 10, "dns": 5, "http_404": 6, "too_small": 1, "empty": 2})
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("dataset: 5/5 shards, 30 rows, ")
    assert "41.7 % ok (http_404 18, dns 15, empty 6), " in line
    assert line.endswith(", 0 s left")
