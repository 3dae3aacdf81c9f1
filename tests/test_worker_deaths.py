"""Laws of workers that end before the driver: Ray Train starts them again, the end is the same, a person is told."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from jobs.session import ray_session
from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from ldm.training.launch import causes, reason, run_on_ray
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import Progress
from ldm.training.world import World
from tests.ranks import run_ranks
from tests.small_task import (
    TOTAL,
    GreedyTask,
    SmallLoader,
    SmallTask,
    StuckLoader,
    raise_as_a_gpu_does,
    small_engine,
    small_training,
)
from tests.tiny_latents import write_latents
from tests.tiny_training import same_weights, tiny_config

# Starting Ray's workers takes minutes on a machine that is busy with other things.
pytestmark = pytest.mark.timeout(900)
LIMIT_SECONDS = 4.0
LAUNCH = LaunchConfig(num_workers=2, cpus_per_worker=1.0, max_failures=2)
Report = Callable[[Progress], None]
Stops = Callable[[], bool]


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_session():
        yield


def launched(worker: Callable[..., Outcome], config: object) -> tuple[Outcome, list[str]]:
    """Run it on two of Ray Train's workers and return its outcome and what a person was told."""
    notices: list[str] = []
    outcome = run_on_ray(worker, config, LAUNCH, "test", lambda news: notices.append(news.notice))
    return outcome, [notice for notice in notices if notice]


def train_and_be_killed(config: TrainLdmConfig, world: World, report: Report, should_stop: Stops) -> Outcome:
    """Train, but for the first time rank 1's process is killed after its fifth step."""
    mark = Path(config.root).with_suffix(".killed")
    num_steps = iter(range(1, 1000))

    def stops() -> bool:
        if world.rank == 1 and next(num_steps) == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return should_stop()

    return train_ldm_worker(config, world, report, stops)


def train_as_rank(world: World, config: TrainLdmConfig) -> None:
    train_ldm_worker(config, world, lambda _: None, lambda: False)


@pytest.mark.slow  # tests/test_lost_nodes.py has one that ends with its node
@pytest.mark.usefixtures("_ray")
def test_a_worker_killed_amid_a_run_costs_nothing_but_time_and_is_told(tmp_path: Path) -> None:
    write_latents(tmp_path)
    run_ranks(2, train_as_rank, replace(tiny_config(tmp_path, "unbroken"), launch=LAUNCH))
    outcome, notices = launched(train_and_be_killed, replace(tiny_config(tmp_path, "killed"), launch=LAUNCH))
    assert (tmp_path / "killed.killed").exists()
    assert outcome["is_finished"]
    assert outcome["samples_seen"] == 64
    assert same_weights(tmp_path, "unbroken", "killed")
    died, resumed = [notice for notice in notices if not notice.startswith(("self-tests passed", "forecast "))]
    assert re.match(r"worker 1 died \(.+\): the workers are started again and go on from the latest checkpoint", died)
    assert "(1 more such starts are left)" in died
    assert resumed == "resumed at 32 samples"


def train_and_hang(folder: Path, world: World, report: Report, should_stop: Stops) -> Outcome:
    """Train, but for the first time rank 1's data stop coming."""
    is_first = not (folder / "run" / "latest").exists()
    state = small_training(
        SmallTask(small_engine(world, folder)),
        world,
        folder / "run",
        loader=StuckLoader(world) if is_first else SmallLoader(world),
        report=report,
        should_stop=should_stop,
        hang_minutes=LIMIT_SECONDS / 60,
    )
    return state.to_dict()


@pytest.mark.slow  # tests/test_watchdog.py has it without Ray
@pytest.mark.usefixtures("_ray")
def test_workers_that_hang_are_started_again_and_a_person_is_told_which_one_it_was(tmp_path: Path) -> None:
    outcome, notices = launched(train_and_hang, tmp_path)
    assert outcome["samples_seen"] == TOTAL
    hung, died, resumed = notices
    assert hung.startswith("rank 1 (host ")
    assert "waiting for data at sample 64" in hung.partition("; rank 0")[0]
    assert "died" in died
    assert resumed == "resumed at 64 samples"


def train_and_run_out(config: Path, world: World, report: Report, should_stop: Stops) -> Outcome:
    """Leave a folder for each attempt, and run out of memory on rank 1."""
    tempfile.mkdtemp(dir=config / "attempts")
    task = GreedyTask(small_engine(world, config))
    task.ask = raise_as_a_gpu_does if world.rank == 1 else lambda: None
    return small_training(task, world, config / "run", report=report, should_stop=should_stop).to_dict()


@pytest.mark.slow  # tests/test_out_of_memory.py has it without Ray
@pytest.mark.usefixtures("_ray")
def test_a_worker_that_runs_out_of_memory_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    with pytest.raises(ValueError, match="no memory is left on cpu: rank 1 .*--engine.micro-batch-size"):
        launched(train_and_run_out, tmp_path)
    assert len(list((tmp_path / "attempts").iterdir())) == 2


def dead(error: Exception) -> Exception:
    """Return what Ray Train finds of a worker that Ray says this about."""
    return WorkerHealthCheckFailedError("A worker health check failed.", error)


def test_the_reason_that_ray_gives_is_told_and_what_only_followed_from_it_is_not() -> None:
    said = "It died.\nWorker exit type: SYSTEM_ERROR Worker exit detail: End of file. Some common causes are (1)"
    gone = RayActorError("1", said)
    lack = OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node: 15 GB")
    lost = RuntimeError("Connection closed by peer")
    refused = ValueError("engine.micro_batch_size 3 does not divide")
    assert list(causes({0: lost, 1: dead(gone)})) == [1]
    assert list(causes({0: dead(gone), 1: refused})) == [1]
    assert list(causes({0: lost, 1: lost})) == [0, 1]
    assert reason(dead(gone)) == (
        "died (killed, crashed, or out of the machine's memory; Ray says SYSTEM_ERROR, End of file)"
    )
    assert reason(dead(lack)).startswith("was killed by Ray, for its machine was running out of memory (Task was kill")
    assert reason(lost) == "failed (RuntimeError: Connection closed by peer)"
