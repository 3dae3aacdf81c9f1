"""Attempts of a training: nested runs under one, closed whatever ended them, replayed after a server was dead."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from jobs.wiring.attempts import AttemptKeeper, ending
from jobs.wiring.provenance import Provenance
from jobs.wiring.recording import run_of, save_run_config
from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from jobs.wiring.training import run_training
from ldm.training.attempts import NO_GOODBYE, Status, begin_attempt, keep_attempt, read_attempts
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import Progress
from ldm.training.machine_load import MachineLoad
from ldm.training.page import DataInput, write_inputs
from ldm.training.tracking import MlflowMirror, open_run, replay
from ldm.training.tracking_config import TrackingConfig
from ldm.training.world import World
from pipeline.store.manifest import load_manifest
from tests.ranks import run_ranks
from tests.servers import mlflow_server
from tests.tiny_latents import write_latents
from tests.tiny_training import tiny_config

MADE_WITH = Provenance(tags={"code_commit": "c0ffee"}, files={"environment.txt": b"torch==2\n"})
KILLED_PROGRAM = """
import sys
from pathlib import Path
from jobs.wiring.train_ldm import TrainLdmConfig
from tests.test_attempts import dies_at_24, started
started(TrainLdmConfig.from_yaml(Path(sys.argv[1]).read_text()), dies_at_24)
"""


RAY_PROGRAM = """
import sys
from pathlib import Path
from jobs.session import prepare
from jobs.wiring.train_ldm import TrainLdmConfig
from tests.test_attempts import loses_a_rank_once, started
prepare()
started(TrainLdmConfig.from_yaml(Path(sys.argv[1]).read_text()), loses_a_rank_once)
"""


def started(config: TrainLdmConfig, worker: Callable[..., Outcome] = train_ldm_worker) -> Outcome:
    """Start a training as its job does."""
    data = load_manifest(config.latents)
    return run_training(config, worker, title="tiny", num_parameters=1, data=data, data_uri=config.latents)


def doing_at(samples: int, deed: Callable[[], object]) -> Callable[..., Outcome]:
    """Return a worker to which something happens when so many samples are behind it."""

    def worker(
        config: TrainLdmConfig,
        world: World,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        *,
        run_id: str,
    ) -> Outcome:
        def told(progress: Progress) -> None:
            report(progress)
            if progress.done >= samples:
                deed()

        return train_ldm_worker(config, world, told, should_stop, run_id=run_id)

    return worker


def refuse() -> None:
    raise ValueError("a row that can't be")


def loses_a_rank_once(
    config: TrainLdmConfig,
    world: World,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    *,
    run_id: str,
) -> Outcome:
    """Train on several ranks, of which one dies at 24 samples of the first attempt."""
    has_died = Path(config.root) / "died"

    def die() -> None:
        if world.rank == 1 and not has_died.exists():
            has_died.touch()
            signal.raise_signal(signal.SIGKILL)

    return doing_at(24, die)(config, world, report, should_stop, run_id=run_id)


dies_at_24 = doing_at(24, lambda: signal.raise_signal(signal.SIGKILL))


def children_of(uri: str, run_id: str) -> dict[str, Run]:
    """Return the nested runs of a run by name."""
    client = MlflowClient(uri)
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_every_start_of_a_training_is_a_nested_run_and_the_curves_are_the_parents(tmp_path: Path, uri: str) -> None:
    write_latents(tmp_path)
    config = replace(tiny_config(tmp_path), tracking=TrackingConfig(uri=uri, experiment="attempts"))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_PROGRAM, str(tmp_path / "run.yaml")], cwd=Path(__file__).parents[1], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(KeyboardInterrupt):
        started(config, doing_at(32, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(ValueError, match="a row that can't be"):
        started(config, doing_at(56, refuse))
    assert started(config)["is_finished"]
    client, run_id = MlflowClient(uri), run_of(config.record)["run_id"]
    parent, attempts = client.get_run(run_id), children_of(uri, run_id)
    assert parent.info.status == "FINISHED"
    assert {*range(8, 65, 8)} == {metric.step for metric in client.get_metric_history(run_id, "loss")}
    asked = ("why", "samples_at_start", "samples_at_end")
    told = {name: (run.info.status, *(run.data.tags[tag] for tag in asked)) for name, run in attempts.items()}
    assert told == {
        "attempt 1": ("KILLED", NO_GOODBYE, "0", "24"),
        "attempt 2": ("KILLED", "it was asked to stop, by Ctrl-C or SIGTERM", "16", "40"),
        "attempt 3": ("FAILED", "ValueError: a row that can't be", "40", "56"),
        "attempt 4": ("FINISHED", "it came to its end", "48", "64"),
    }
    in_order = [attempts[f"attempt {number}"] for number in range(1, 5)]
    times = [time for run in in_order for time in (run.info.start_time, run.info.end_time)]
    assert times == sorted(times)
    for run in in_order:
        assert (run.data.tags["ranks"], run.data.tags["device"]) == ("1", "cpu")
        assert run.data.tags["host"]
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"run.yaml", "environment.txt"} <= files
    assert {"run.yaml", "environment.txt"} <= {file.path for file in client.list_artifacts(run_id)}
    manifest = load_manifest(config.latents)
    inputs = {given.dataset.name: given.dataset.digest for given in parent.inputs.dataset_inputs}
    assert inputs == {"latents": manifest.digest[:36], "dataset": str(manifest.summary["dataset"])[:36]}


@pytest.mark.slow
def test_a_rank_that_dies_under_ray_ends_an_attempt_and_the_next_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    write_latents(tmp_path)
    launch = LaunchConfig(num_workers=2, cpus_per_worker=0.5)
    config = replace(tiny_config(tmp_path), launch=launch)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", RAY_PROGRAM, str(tmp_path / "run.yaml")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = read_attempts(config.record)
    assert first.status is Status.KILLED
    assert first.why.startswith("a worker died, and Ray started all of them again")
    assert (second.status, second.why) == (Status.FINISHED, "it came to its end")
    assert (first.samples_at_start, second.samples_at_start, second.samples_at_end) == (0, 16, 64)
    assert first.tags["ranks"] == second.tags["ranks"] == "2"
    assert first.started_ms <= first.heard_ms <= second.started_ms <= second.heard_ms


def test_workers_that_say_their_first_word_again_are_another_attempt(tmp_path: Path) -> None:
    record = str(tmp_path)
    save_run_config(TrackingConfig(), record)
    with AttemptKeeper(record, MADE_WITH, "", "") as keeper:
        for start in (0, 160):
            keeper(Progress(done=0, total=0, facts={"host": "a, b", "ranks": "2", "device": "cpu"}))
            for done in (start, start + 80):
                keeper(Progress(done=done, total=320))
            keeper(Progress(done=0, total=0, notice="worker 1 died"))
    first, second = read_attempts(record)
    assert (first.status, first.samples_at_start, first.samples_at_end) == (Status.KILLED, 0, 80)
    assert first.why == "a worker died, and Ray started all of them again; heard last: worker 1 died"
    assert (second.status, second.samples_at_start, second.samples_at_end) == (Status.FINISHED, 160, 240)
    assert first.tags == second.tags == {"code_commit": "c0ffee", "host": "a, b", "ranks": "2", "device": "cpu"}


@pytest.mark.slow  # tests/test_tracking.py has a whole training whose server is dead
def test_attempts_made_while_the_server_is_dead_reach_it_by_a_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record = str(tmp_path / "record")
    with mlflow_server(tmp_path / "server") as server:
        config = TrackingConfig(uri=server.uri, experiment="mortal")
        save_run_config(config, record)
        write_inputs(record, [DataInput(name="latents", uri="there", digest="d1", context="training", profile={})])
        run_id = open_run(config, record, "mortal", {}, MADE_WITH.tags)
        with AttemptKeeper(record, MADE_WITH, server.uri, run_id) as keeper:
            server.kill()
            keeper(Progress(done=0, total=100))
            keeper(Progress(done=60, total=100))
        assert open_run(config, record, "mortal", {}, {}) == "", "the server is still dead"
        with pytest.raises(KeyboardInterrupt), AttemptKeeper(record, MADE_WITH, server.uri, "") as keeper:
            keeper(Progress(done=60, total=100))
            raise KeyboardInterrupt
        (tmp_path / "record" / "record.jsonl").touch()
        server.start()
        for _ in range(2):  # what is there is not made twice
            assert replay(record, server.uri) == (run_id, 0)
            attempts = children_of(server.uri, run_id)
            assert {name: run.info.status for name, run in attempts.items()} == {
                "attempt 1": "FINISHED",
                "attempt 2": "KILLED",
            }
        kept = read_attempts(record)
        assert [attempts[f"attempt {one.number}"].info.end_time for one in kept] == [one.heard_ms for one in kept]
        client = MlflowClient(server.uri)
        assert client.get_run(run_id).info.status == "KILLED", "the run ends as its latest attempt did"
        assert {file.path for file in client.list_artifacts(run_id)} == {"run.yaml", "environment.txt"}
        assert [given.dataset.digest for given in client.get_run(run_id).inputs.dataset_inputs] == ["d1"]


def test_a_replay_of_a_training_that_goes_on_leaves_its_run_open(tmp_path: Path, uri: str) -> None:
    record = str(tmp_path)
    run_id = open_run(TrackingConfig(uri=uri, experiment="open"), record, "open", {}, {})
    (tmp_path / "record.jsonl").touch()
    attempt = begin_attempt(record, {}, {}, now_ms=1)
    assert replay(record, uri) == (run_id, 0)
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    keep_attempt(record, attempt.ended(2, *ending(RuntimeError("lost"))))
    replay(record, uri)
    assert MlflowClient(uri).get_run(run_id).info.status == "FAILED"


def test_more_metrics_than_a_request_takes_arrive_whole(tmp_path: Path, uri: str) -> None:
    record = str(tmp_path)
    run_id = open_run(TrackingConfig(uri=uri, experiment="many"), record, "many", {}, {})
    names = {f"system/rank_{number}/cpu_utilization_percentage": float(number) for number in range(2_001)}
    MlflowMirror(uri, run_id).send(tmp_path, {"metrics": names, "time_ms": 1, "samples_seen": 1})
    assert MlflowClient(uri).get_run(run_id).data.metrics == names


def loads_of(world: World, folder: str) -> None:
    loads = MachineLoad().of_ranks(world)
    Path(folder, f"{world.rank}.txt").write_text("\n".join(f"{name} {value}" for name, value in loads.items()))


def test_every_rank_is_measured_under_its_number_and_all_know_the_same(tmp_path: Path) -> None:
    run_ranks(2, loads_of, str(tmp_path))
    one, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert one == other
    value_of = {name: float(value) for name, value in (line.split() for line in one.splitlines())}
    measured = (
        "cpu_utilization_percentage",
        "system_memory_usage_percentage",
        "process_cpu_utilization_percentage",
        "process_memory_usage_megabytes",
    )
    assert set(value_of) == {f"system/rank_{rank}/{name}" for rank in (0, 1) for name in measured}
    for rank in (0, 1):
        assert value_of[f"system/rank_{rank}/process_memory_usage_megabytes"] > 20
        assert 0 < value_of[f"system/rank_{rank}/system_memory_usage_percentage"] < 100
