"""Laws of a training whose node vanishes: it goes on elsewhere to the same end, and a person is told what it waits for.

The nodes are Ray's own processes, a raylet each, on this machine.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from ldm.training.launch import missing, run_on_ray
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import Progress
from ldm.training.world import World
from tests.ranks import run_ranks
from tests.tiny_latents import write_latents
from tests.tiny_training import same_weights, tiny_config

# Starting Ray's workers takes minutes on a machine that is busy with other things.
pytestmark = pytest.mark.timeout(900)
LAUNCH = LaunchConfig(num_workers=2, cpus_per_worker=1.0, max_failures=1)
DIED = (
    r"worker (\d) died \(.+\): the workers are started again .*from the latest checkpoint \(0 more such starts are left"
)
MISSED = "waiting for 2 workers with 1 CPU each: the cluster has 1 CPU (1 free)"
Report = Callable[[Progress], None]
Stops = Callable[[], bool]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents, and a training on them that nothing happened to."""
    made = tmp_path_factory.mktemp("trainings")
    write_latents(made)
    run_ranks(2, train_as_rank, replace(tiny_config(made, "unbroken"), launch=LAUNCH))
    return made


@pytest.fixture
def head() -> Iterator[Cluster]:
    """A head that takes no work, with the driver on it."""
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(head.address, log_to_driver=False)
        yield head
    finally:
        ray.shutdown()
        head.shutdown()


@pytest.fixture
def cluster(head: Cluster) -> Cluster:
    """The head and two nodes of one CPU each."""
    for _ in range(2):
        head.add_node(num_cpus=1)
    return head


def train_as_rank(world: World, config: TrainLdmConfig) -> None:
    train_ldm_worker(config, world, lambda _: None, lambda: False)


def train_and_await_the_end(rank: int, config: TrainLdmConfig, world: World, report: Report, stops: Stops) -> Outcome:
    """Train, but for the first time the rank names its node after its fifth step and waits to vanish with it."""
    mark = named_node(config)
    num_steps = iter(range(1, 1000))

    def stops_there() -> bool:
        if world.rank == rank and next(num_steps) == 5 and not mark.exists():
            mark.write_text(ray.get_runtime_context().get_node_id())
            threading.Event().wait()
        return stops()

    return train_ldm_worker(config, world, report, stops_there)


def named_node(config: TrainLdmConfig) -> Path:
    return Path(config.root).with_suffix(".node")


def trained_without_a_node(cluster: Cluster, rank: int, config: TrainLdmConfig) -> list[str]:
    """Train on two workers, remove the node of one amid it, add another when it is missed; return what is told."""
    notices: list[str] = []

    def remove_the_node() -> None:
        wait_until(lambda: named_node(config).exists() and bool(named_node(config).read_text()))
        (node,) = (node for node in cluster.worker_nodes if node.node_id == named_node(config).read_text())
        cluster.remove_node(node, allow_graceful=False)

    def watch(news: Progress) -> None:
        if news.notice and not news.notice.startswith(("self-tests passed", "forecast ")):
            notices.append(news.notice)
        if news.notice == MISSED and len(cluster.worker_nodes) == 1:
            cluster.add_node(num_cpus=1)  # as an autoscaler would; Ray starts nodes from the main thread alone

    with ThreadPoolExecutor() as threads:
        removal = threads.submit(remove_the_node)
        outcome = run_on_ray(partial(train_and_await_the_end, rank), config, LAUNCH, "test", watch)
        removal.result()
    assert outcome["is_finished"]
    assert outcome["samples_seen"] == 64
    # Ray would place what carries the news on any node, the one that vanishes among them.
    boards = [actor["Address"]["NodeID"] for actor in actors().values() if actor["ActorClassName"] == "Board"]
    assert boards == [ray.get_runtime_context().get_node_id()]
    return notices


def test_a_node_that_vanishes_costs_nothing_but_the_wait_for_another_which_is_told(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    config = replace(tiny_config(folder, "waited"), launch=LAUNCH)
    died, *waited, resumed = trained_without_a_node(cluster, 1, config)
    assert re.match(DIED, died)[1] == "1"
    assert MISSED in waited
    assert {notice.partition(":")[0] for notice in waited} == {"waiting for 2 workers with 1 CPU each"}
    assert resumed == "resumed at 32 samples"
    assert same_weights(folder, "unbroken", "waited")


def test_an_interrupt_ends_a_wait_for_nodes(head: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    notices: list[str] = []

    def watch(news: Progress) -> None:
        notices.append(news.notice)
        if len(notices) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_ray(train_ldm_worker, replace(tiny_config(folder, "interrupted"), launch=LAUNCH), LAUNCH, "test", watch)
    waiting, stopping, given_up = notices
    assert waiting == "waiting for 2 workers with 1 CPU each: the cluster has 0 CPU (0 free)"
    assert stopping.startswith("stopping: ")
    assert given_up == "given up: what was saved last stands"


def test_a_cluster_that_does_not_answer_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, float]:
        raise ConnectionError("no answer")

    monkeypatch.setattr(ray, "cluster_resources", fail)
    expected = "waiting for 2 workers with 1 CPU each: the cluster does not tell what it has (ConnectionError)"
    assert missing(LAUNCH) == expected


@pytest.mark.slow
def test_a_node_that_is_there_takes_the_place_of_the_one_that_vanishes_with_the_main_worker(
    cluster: Cluster, folder: Path
) -> None:
    cluster.add_node(num_cpus=1)
    config = replace(tiny_config(folder, "replaced"), launch=LAUNCH)
    died, resumed = trained_without_a_node(cluster, 0, config)
    assert re.match(DIED, died)[1] == "0"
    assert resumed == "resumed at 32 samples"
    assert same_weights(folder, "unbroken", "replaced")


def wait_until(is_so: Callable[[], bool], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
