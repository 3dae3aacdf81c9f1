"""Laws of a worker that has several shards at once: the same bytes, no worker idle, and a death blamed on its cause."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
from rich.console import Console

from pipeline.effort import Effort, WorkByWorker, work_table
from pipeline.encode import EncodeStage
from pipeline.latent_config import LatentsConfig
from pipeline.latent_plan import plan_latents
from pipeline.plan import Plan, Resources, ShardTask, Stage, missing
from pipeline.progress import ShardProgress, counts_table
from pipeline.run import MAX_STARTS, ShardWorker, run
from pipeline.starts import Turns
from pipeline.store.manifest import ShardRecord
from pipeline.store.schema import Split
from tests.small_datasets import contents
from tests.tiny_latents import carry_out, latents_config, write_autoencoder, write_dataset

SIZES = (9, 5, 6, 7, 8)
NUM_SHARDS = len(SIZES) + 1


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of six shards, an autoencoder, and the latents made one shard at a time."""
    folder = tmp_path_factory.mktemp("inputs")
    write_dataset(folder / "dataset", sizes=SIZES)
    write_autoencoder(folder / "autoencoder")
    carry_out(plan_latents(latents_config(folder)))
    return folder


class MarkedStage:
    """An encode stage that leaves the number of its process in a new file whenever it begins a shard.

    It may wait for others to be begun too, and kill its process at one shard, a shard's length after it began.
    """

    def __init__(self, config: LatentsConfig, marks: str, num_to_meet: int = 1, deadly: str = "") -> None:
        self.encode = EncodeStage(config)
        self.marks, self.num_to_meet, self.deadly = Path(marks), num_to_meet, deadly
        (self.marks / f"built-{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, task: ShardTask) -> ShardRecord:
        name = f"{task.split.value}-{task.name}"
        (self.marks / f"begun-{name}-{os.getpid()}-{time.monotonic_ns()}").touch()
        deadline = time.monotonic() + 30
        while len(self.begun()) < self.num_to_meet and time.monotonic() < deadline:
            time.sleep(0.01)
        if len(self.begun()) < self.num_to_meet:
            raise TimeoutError("no other shard was begun beside this one")
        if name == self.deadly:
            time.sleep(0.3)  # so that the shard beside it is in its middle
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.deadly:
            time.sleep(0.6)
        return self.encode(task)

    def begun(self) -> list[str]:
        return [path.name for path in self.marks.glob("begun-*")]


def marked(config: LatentsConfig, marks: Path, resources: Resources, **fields: object) -> Plan:
    marks.mkdir()
    stage = partial(MarkedStage, config, str(marks), **fields)  # type: ignore[arg-type]
    return replace(plan_latents(config), make_stage=stage, resources=resources)


def test_shards_encoded_by_two_threads_at_once_are_those_encoded_one_by_one(inputs: Path, tmp_path: Path) -> None:
    plan = plan_latents(latents_config(inputs, root=str(tmp_path / "latents"), flip=True))
    alone = plan_latents(latents_config(inputs, root=str(tmp_path / "alone"), flip=True))
    stage, other = plan.make_stage(), alone.make_stage()
    assert isinstance(stage, EncodeStage)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(stage, plan.tasks))
    assert together == [other(task) for task in alone.tasks]
    assert contents(tmp_path / "latents") == contents(tmp_path / "alone")
    timers = [stage.take_timers(task) for task in plan.tasks]
    assert all(timer.busy_seconds > 0 for timer in timers)


def test_networks_are_never_in_use_twice(inputs: Path, tmp_path: Path) -> None:
    plan = plan_latents(latents_config(inputs, root=str(tmp_path / "latents"), batch_size=1))
    stage = plan.make_stage()
    assert isinstance(stage, EncodeStage)
    inside, most = [0], [0]

    def watch(module: object, *_: object) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])

    def leave(module: object, *_: object) -> None:
        inside[0] -= 1

    for network in (stage._encoder.autoencoder.encoder, *(tower._model for tower in stage._text.towers)):
        network.register_forward_pre_hook(watch)
        network.register_forward_hook(leave)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(stage, plan.tasks))
    assert most == [1]
    assert inside == [0]


@pytest.mark.usefixtures("local_ray")
def test_worker_with_two_shards_at_once_makes_the_same_bytes_with_one_stage(inputs: Path, tmp_path: Path) -> None:
    config = latents_config(inputs, root=str(tmp_path / "latents"))
    resources = Resources(max_actors=1, tasks_at_once=2)
    report = run(marked(config, tmp_path / "marks", resources, num_to_meet=2))
    assert report.num_shards == NUM_SHARDS
    assert contents(tmp_path / "latents") == contents(inputs / "latents")
    assert len(list((tmp_path / "marks").glob("built-*"))) == 1


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("num_tasks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_few_shards_are_shared_out_to_all_workers(inputs: Path, tmp_path: Path, num_tasks: int) -> None:
    """Each begins only once as many are begun as there are workers, so one worker that had taken all would not end."""
    config = latents_config(inputs, root=str(tmp_path / "latents"))
    plan = marked(config, tmp_path / "marks", Resources(max_actors=2, tasks_at_once=2), num_to_meet=2)
    run(replace(plan, tasks=plan.tasks[:num_tasks], summarize=lambda records: {}))
    workers = {path.name.split("-")[3] for path in (tmp_path / "marks").glob("begun-*")}
    assert len(workers) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_shard_that_kills_every_worker_takes_no_other_with_it(inputs: Path, tmp_path: Path) -> None:
    config = latents_config(inputs, root=str(tmp_path / "latents"))
    resources = Resources(max_actors=1, tasks_at_once=2)
    plan = marked(config, tmp_path / "marks", resources, deadly="train-000002")
    with pytest.raises(RuntimeError, match=rf"1 shards failed .*\n.*train/000002 .* process died {MAX_STARTS} times"):
        run(plan)
    assert [(task.split, task.name) for task in missing(plan)] == [(Split.TRAIN, "000002")]
    starts = Counter("-".join(path.name.split("-")[1:3]) for path in (tmp_path / "marks").glob("begun-*"))
    assert starts.pop("train-000002") == MAX_STARTS
    assert max(starts.values()) == 2, "a shard that was beside the deadly one is begun once more, and then alone"


def test_stage_that_one_thread_builds_is_not_built_by_another(inputs: Path, tmp_path: Path) -> None:
    """What `ShardWorker` promises, without Ray's part of it."""
    built = []

    def build() -> Stage:
        built.append(threading.get_ident())
        time.sleep(0.1)
        return plan.make_stage()

    plan = plan_latents(latents_config(inputs, root=str(tmp_path / "latents")))
    worker = ShardWorker(plan.root, build, None)
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda _: worker.built(), range(2)))
    assert made[0] is made[1]
    assert len(built) == 1


def test_turns_let_many_in_together_and_one_alone() -> None:
    turns = Turns()
    inside: list[str] = []
    seen: list[tuple[str, ...]] = []

    def enter(name: str, is_alone: bool) -> None:
        with turns.alone() if is_alone else turns.together():
            inside.append(name)
            time.sleep(0.02)
            seen.append(tuple(inside))
            inside.remove(name)

    with ThreadPoolExecutor(8) as threads:
        for number in range(40):
            threads.submit(enter, f"{'alone' if number % 4 == 0 else 'together'}-{number}", number % 4 == 0)
    assert len(seen) == 40
    assert all(len(names) == 1 for names in seen if any("alone" in name for name in names))
    assert any(len(names) > 1 for names in seen)


def effort(worker: str, begun: float, ended: float, rows: int, busy: float, wait: float) -> Effort:
    return Effort(
        worker=worker,
        begun=begun,
        ended=ended,
        num_rows=rows,
        num_bytes=1000 * rows,
        busy_seconds=busy,
        wait_seconds=wait,
    )


def test_work_of_workers_adds_up_to_shares_of_their_time() -> None:
    work = WorkByWorker()
    for one in (
        effort("a", 100.0, 110.0, 50, 8.0, 1.0),
        effort("a", 105.0, 120.0, 50, 10.0, 3.0),  # at once with the first
        effort("b", 100.0, 110.0, 20, 2.0, 6.0),
    ):
        work.add(one)
    first = work.by_name()["a"]
    assert (first.num_shards, first.num_rows, first.worker_seconds) == (2, 100, 20.0)
    assert (first.busy_share, first.wait_share, first.rows_per_second) == (0.9, 0.2, 5.0)
    everyone = work.together()
    assert everyone.busy_share == pytest.approx(20 / 30)
    assert everyone.rows_per_second == pytest.approx(4.0)
    stream = io.StringIO()
    Console(file=stream, width=200).print(work_table(work, 25.0))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stream.getvalue().splitlines() if "│" in line]
    assert rows[0] == ["a", "2", "100", "20.0", "5.0", "90.0 %", "20.0 %", "0.1"]
    assert rows[-1] == ["all", "3", "120", "25.0", "4.8", "66.7 %", "33.3 %", "0.1"]


def test_progress_says_how_fast_a_worker_is_how_busy_and_how_long_it_waits() -> None:
    stream = io.StringIO()
    with ShardProgress("latents", num_shards=2, num_there=0, console=Console(file=stream)) as progress:
        progress.advance(50, {"ok": 50}, effort("a", 0.0, 10.0, 50, 9.0, 0.5))
        progress.advance(30, {"ok": 30}, effort("b", 0.0, 10.0, 30, 7.0, 1.5))
    (line,) = stream.getvalue().splitlines()
    assert "80 rows, " in line
    assert ", 2 workers at 4.0 images/s, encoder busy 80 %, data wait 10 %, " in line


def test_progress_of_a_few_rows_names_their_rate_and_the_only_worker() -> None:
    stream = io.StringIO()
    progress = ShardProgress("generated", num_shards=1, num_there=0, console=Console(file=stream))
    progress.started -= 20.0
    progress.advance(5, {"ok": 5, "bad_cell": 2}, effort("a", 0.0, 10.0, 5, 9.0, 0.5))
    assert "5 rows, 0.25 rows/s, 71.4 % ok (bad_cell 2), 1 worker at 0.5 images/s" in stream.getvalue()


def test_title_over_a_narrow_table_of_counts_stands_on_one_line() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print(counts_table({"ok": 7}))
    assert stream.getvalue().splitlines()[0].strip() == "input rows by what became of them"


@pytest.mark.usefixtures("local_ray")
def test_report_of_a_run_holds_what_each_worker_did_and_records_hold_nothing_of_it(
    inputs: Path, tmp_path: Path
) -> None:
    config = latents_config(inputs, root=str(tmp_path / "latents"))
    report = run(plan_latents(config))
    everyone = report.work.together()
    assert everyone.num_shards == NUM_SHARDS
    assert everyone.num_rows == report.num_rows
    assert everyone.num_bytes == sum(shard.num_bytes for shard in report.manifest.shards)
    assert 0.0 < everyone.busy_share < 1.0
    assert 0.0 <= everyone.wait_share < 1.0
    assert everyone.worker_seconds / len(report.work.by_name()) < report.seconds
    assert contents(tmp_path / "latents") == contents(inputs / "latents")
    assert run(plan_latents(config)).work.by_name() == {}


@pytest.mark.parametrize("remote, expected", [(False, 1), (True, 2)])
def test_plan_has_two_shards_at_once_where_the_dataset_lies_elsewhere(
    inputs: Path, remote: bool, expected: int, request: pytest.FixtureRequest
) -> None:
    config = latents_config(inputs)
    if remote:
        s3, root = request.getfixturevalue("s3"), request.getfixturevalue("s3_root")
        s3.client().put(str(inputs / "dataset"), root, recursive=True)
        config = replace(config, dataset=root)
    assert plan_latents(config).resources.tasks_at_once == expected
    assert plan_latents(replace(config, shards_at_once=3)).resources.tasks_at_once == 3
    with pytest.raises(ValueError, match="shards_at_once must be at least 1, got 0"):
        replace(config, shards_at_once=0)
