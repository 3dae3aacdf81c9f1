"""Laws of shards on several nodes: where workers run, nodes that vanish, and nodes that come when they are needed.

The nodes are Ray's own processes, a raylet each, on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import plan_dataset
from pipeline.ingest.stage import IngestStage
from pipeline.plan import Resources, ShardTask
from pipeline.run import run
from pipeline.store.manifest import ShardRecord
from tests.servers import free_ports, kill_tree
from tests.small_datasets import add_images, contents, folder_config, made

pytestmark = pytest.mark.timeout(900)
NUM_IMAGES = 24
LABEL = "ingest"


class MarkingStage:
    """An ingest stage that leaves the name of its node for every shard that it begins, and takes its time."""

    def __init__(self, config: DatasetConfig, marks: str, seconds: float) -> None:
        self.ingest = IngestStage(config, config.root)
        self.marks = Path(marks)
        self.seconds = seconds

    def __call__(self, task: ShardTask) -> ShardRecord:
        (self.marks / f"{task.split.value}-{task.name}-{os.getpid()}").write_text(
            ray.get_runtime_context().get_node_id()
        )
        time.sleep(self.seconds)
        return self.ingest(task)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    add_images(folder, range(NUM_IMAGES))
    return folder


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the dataset, made without Ray."""
    root = tmp_path_factory.mktemp("expected") / "dataset"
    made(folder_config(root, images))
    return contents(root)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that takes no work."""
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield head
    finally:
        ray.shutdown()
        head.shutdown()


def made_on(config: DatasetConfig, marks: Path, seconds: float, **resources: Any) -> list[str]:
    """Make the dataset on the Ray that is connected; return the node of every shard that was begun."""
    marks.mkdir(exist_ok=True)
    stage = partial(MarkingStage, config, str(marks), seconds)
    run(replace(plan_dataset(config), make_stage=stage, resources=Resources(**resources)))
    return [path.read_text() for path in marks.iterdir()]


@pytest.mark.slow
def test_only_nodes_with_the_label_get_workers(cluster, images, expected, tmp_path):
    cluster.add_node(num_cpus=2)
    labelled = cluster.add_node(num_cpus=2, resources={LABEL: 1})
    ray.init(cluster.address, log_to_driver=False)
    nodes = made_on(folder_config(tmp_path / "dataset", images), tmp_path / "marks", 0.0, label=LABEL)
    assert set(nodes) == {labelled.node_id}
    assert contents(tmp_path / "dataset") == expected


@pytest.mark.slow
def test_label_that_no_node_offers_is_refused(cluster, images, tmp_path):
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False)
    with pytest.raises(ValueError, match=f"0 {LABEL}"):
        made_on(folder_config(tmp_path / "dataset", images), tmp_path / "marks", 0.0, label=LABEL)


def test_node_that_vanishes_costs_nothing_but_time(cluster, images, expected, tmp_path):
    stays = cluster.add_node(num_cpus=1)
    vanishes = cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False)
    marks = tmp_path / "marks"
    marks.mkdir()

    def pull_the_plug() -> None:
        wait_until(lambda: any(path.read_text() == vanishes.node_id for path in marks.iterdir()))
        cluster.remove_node(vanishes, allow_graceful=False)

    with ThreadPoolExecutor() as threads:
        plug = threads.submit(pull_the_plug)
        nodes = made_on(folder_config(tmp_path / "dataset", images), marks, 1.0, max_actors=2)
        plug.result()
    assert {stays.node_id, vanishes.node_id} == set(nodes)
    assert contents(tmp_path / "dataset") == expected


@pytest.mark.slow
def test_nodes_come_as_they_are_asked_for_and_go_again(images, expected, tmp_path):
    with growing_cluster(tmp_path) as address:
        ray.init(address, log_to_driver=False)
        try:
            assert not ray.cluster_resources().get("CPU")
            config = folder_config(tmp_path / "dataset", images)
            nodes = made_on(config, tmp_path / "marks", 3.0, max_actors=2)
            assert len(set(nodes)) == 2
            assert contents(tmp_path / "dataset") == expected
            wait_until(lambda: not ray.cluster_resources().get("CPU"), seconds=180)
        finally:
            ray.shutdown()


@contextmanager
def growing_cluster(folder: Path) -> Iterator[str]:
    """Run a head without CPUs whose autoscaler starts nodes of one CPU, two at most; yield its address."""
    port, clients, agent = free_ports(3)
    settings = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 0.25,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{f"{what}_commands": [] for what in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{node}_start_ray_commands": [] for node in ("head", "worker")},
    }
    (folder / "autoscaling.json").write_text(json.dumps(settings))
    command = [str(Path(sysconfig.get_path("scripts")) / "ray"), "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--port={port}", f"--ray-client-server-port={clients}", f"--dashboard-agent-listen-port={agent}"]
    command += ["--include-dashboard=false", f"--autoscaling-config={folder / 'autoscaling.json'}"]
    with (folder / "ray.log").open("wb") as log:
        environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        environment["RAY_AUTH_MODE"] = "disabled"
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "ray.log").read_bytes())
        yield f"127.0.0.1:{port}"
    finally:
        kill_tree(process)


def wait_until(is_so: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
