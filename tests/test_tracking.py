"""A run's record and its mirror in MLflow: on SQLite, on a real server, and while the server is dead."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient

from jobs.wiring.recording import open_record
from jobs.wiring.registering import register_model
from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from ldm.registry import record_evaluation
from ldm.training.attempts import begin_attempt
from ldm.training.loop import Progress
from ldm.training.page import DataInput
from ldm.training.record import Record, grid_of
from ldm.training.tracked_page import log_inputs
from ldm.training.tracking import open_run, replay
from ldm.training.tracking_config import TrackingConfig
from pipeline.store.manifest import load_manifest
from tests.ranks import alone
from tests.servers import mlflow_server
from tests.tiny_latents import write_latents
from tests.tiny_training import longer, run, tiny_config


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, uri: str) -> Iterator[tuple[TrainLdmConfig, str]]:
    """A finished tiny training with its run in MLflow."""
    folder = tmp_path_factory.mktemp("trained")
    write_latents(folder)
    config = tiny_config(folder)
    config = replace(config, tracking=TrackingConfig(uri=uri, experiment="tiny", model_name="tiny"))
    run_id = open_run(config.tracking, config.record, "tiny", config.flat(), {"who": "a test"})
    manifest = load_manifest(config.latents)
    given = DataInput(
        name="latents", uri=config.latents, digest=manifest.digest, context="training", profile={"rows": 1}
    )
    log_inputs(uri, run_id, [given])
    train_ldm_worker(config, alone(), lambda _: None, lambda: False, run_id=run_id)
    return config, run_id


def entries(folder: str) -> int:
    return len((Path(folder) / "record.jsonl").read_text().splitlines())


def test_a_run_holds_the_whole_configuration_metrics_over_time_and_its_data(
    trained: tuple[TrainLdmConfig, str], uri: str
) -> None:
    config, run_id = trained
    run = MlflowClient(uri).get_run(run_id)
    assert run.data.params["optim.lr"] == "0.001"
    assert set(config.flat()) <= set(run.data.params)
    assert run.data.tags["who"] == "a test"
    assert run.inputs.dataset_inputs[0].dataset.digest == load_manifest(config.latents).digest[:36]
    for name in ("loss", "grad_norm", "learning_rate", "images_per_second", "data_wait_seconds"):
        steps = [metric.step for metric in MlflowClient(uri).get_metric_history(run_id, name)]
        assert steps == list(range(8, 65, 8)), name
    assert [m.step for m in MlflowClient(uri).get_metric_history(run_id, "validation_loss")] == [0, 32, 64]
    assert "system/rank_0/process_memory_usage_megabytes" in run.data.metrics


def test_an_opened_run_is_found_again(trained: tuple[TrainLdmConfig, str]) -> None:
    config, run_id = trained
    assert open_run(config.tracking, config.record, "tiny", {}, {}) == run_id


def test_the_registered_model_draws_the_same_pixels_in_a_fresh_process(
    trained: tuple[TrainLdmConfig, str], uri: str, tmp_path: Path
) -> None:
    config, run_id = trained
    version = register_model(config)
    assert version is not None
    assert register_model(config) == version, "a finished model is registered once"
    client_version = MlflowClient(uri).get_model_version(version.name, version.version)
    tags = client_version.tags
    manifest = load_manifest(config.latents)
    assert tags["latents_digest"] == manifest.digest
    assert tags["dataset_digest"] == manifest.summary["dataset"]
    assert tags["autoencoder_digest"] == manifest.identity["autoencoder"]
    assert "code_commit" in tags
    assert client_version.run_id == run_id
    script = (
        "import sys, numpy, mlflow; mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(sys.argv[2])\n"
        "numpy.save(sys.argv[3], model.predict(['a red square', 'blue'], params={'seed': 5, 'num_steps': 4}))"
    )
    for name in ("one", "two"):
        command = [sys.executable, "-c", script, uri, version.uri, str(tmp_path / name)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert one.shape == (2, 16, 16, 3)
    assert one.dtype == np.uint8
    assert (one == two).all()
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(version.uri)
    here = loaded.predict(["a red square", "blue"], params={"seed": 5, "num_steps": 4})
    table = pd.DataFrame({"prompt": ["a red square", "blue"], "seed": [5, 6], "steps": [4, 4], "width": [16, 24]})
    by_table = loaded.predict(table)
    assert [drawn.shape for drawn in by_table] == [(16, 16, 3), (16, 24, 3)]
    assert abs(by_table[0].astype(int) - here[0].astype(int)).max() <= 1
    assert abs(here.astype(int) - one.astype(int)).max() <= 1  # the child process may use another number of threads


def test_an_evaluation_is_written_on_the_version_and_only_a_passed_one_makes_a_champion(
    trained: tuple[TrainLdmConfig, str], uri: str
) -> None:
    config, _ = trained
    version = register_model(config)
    assert version is not None
    client = MlflowClient(uri)
    fails = {"uri": uri, "model": version, "protocol_digest": "p", "metrics": {"psnr": 20.5}, "has_passed": False}
    assert record_evaluation(**fails) == "", "no version is the champion"
    assert client.get_model_version(version.name, version.version).tags["evaluation.psnr"] == "20.5"
    assert "champion" not in client.get_registered_model(version.name).aliases
    assert record_evaluation(**{**fails, "has_passed": True}) == version.version
    assert str(client.get_model_version_by_alias(version.name, "champion").version) == version.version
    assert record_evaluation(**fails) == version.version, "what has passed once is replaced, never taken away"


def test_a_model_that_changed_behind_its_pointer_is_refused(trained: tuple[TrainLdmConfig, str], uri: str) -> None:
    config, _ = trained
    version = register_model(config)
    assert version is not None
    card = Path(config.model_folder) / "model.json"
    kept = card.read_text()
    card.write_text(json.dumps({**json.loads(kept), "guidance": 9.0}))
    mlflow.set_tracking_uri(uri)
    with pytest.raises(Exception, match="was registered as model"):
        mlflow.pyfunc.load_model(version.uri)
    card.write_text(kept)


def test_a_version_still_draws_its_own_pixels_after_a_longer_training(tmp_path: Path, uri: str) -> None:
    write_latents(tmp_path)
    config = replace(
        tiny_config(tmp_path, "longer", total_samples=16), tracking=TrackingConfig(uri=uri, model_name="longer")
    )
    mlflow.set_tracking_uri(uri)
    drawn = []
    for total_samples in (16, 32):
        config = longer(config, total_samples)
        open_run(config.tracking, config.record, "longer", {}, {})
        run(config)
        begin_attempt(config.record, {"code_commit": f"of {total_samples}", "host": "here"}, {}, now_ms=1)
        version = register_model(config)
        assert version is not None
        tags = MlflowClient(uri).get_model_version(version.name, version.version).tags
        assert tags["code_commit"] == f"of {total_samples}", "the code that trained it, whatever code registers it"
        assert "host" not in tags
        drawn.append(mlflow.pyfunc.load_model(version.uri).predict(["a red heart"], params={"num_steps": 2}))
    again = mlflow.pyfunc.load_model("models:/longer/1").predict(["a red heart"], params={"num_steps": 2})
    assert (again == drawn[0]).all()
    assert (drawn[0] != drawn[1]).any()


def test_a_dead_server_costs_nothing_and_its_record_is_replayed_into_a_live_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = str(tmp_path / "record")
    notices: list[str] = []
    with mlflow_server(tmp_path / "server") as server:
        config = TrackingConfig(uri=server.uri, experiment="mortal")
        run_id = open_run(config, folder, "mortal", {"lr": "1"}, {})
        tracker = open_record(folder, server.uri, run_id, alone(), lambda progress: notices.append(progress.notice))
        tracker.log_metrics({"loss": 3.0}, 1)
        server.kill()
        tracker.log_metrics({"loss": 2.0}, 2)
        tracker.log_picture("grid", torch.zeros(4, 3, 8, 8), 2)
        tracker.log_metrics({"loss": 1.0}, 3)
        assert entries(folder) == 4
        assert len(notices) == 1
        assert "training goes on" in notices[0]
        assert f"python -m jobs.replay_record {folder} --uri {server.uri}" in notices[0]
        assert open_run(config, folder, "mortal", {}, {}) == "", "no run can be opened while the server is dead"
        server.start()
        assert replay(folder, server.uri) == (run_id, 3)
        assert replay(folder, server.uri) == (run_id, 0), "nothing is sent twice"
        client = MlflowClient(server.uri)
        losses = {metric.step: metric.value for metric in client.get_metric_history(run_id, "loss")}
        assert losses == {1: 3.0, 2: 2.0, 3: 1.0}
        assert [file.path for file in client.list_artifacts(run_id, "pictures")] == ["pictures/grid_000000002.png"]


def test_a_run_without_a_server_at_its_start_still_records_and_says_how_to_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, dead = str(tmp_path / "record"), "http://127.0.0.1:9"
    assert open_run(TrackingConfig(uri=dead, experiment="late"), folder, "late", {"lr": "1"}, {}) == ""
    notices: list[Progress] = []
    open_record(folder, dead, "", alone(), notices.append).log_metrics({"loss": 1.0}, 1)
    assert "does not answer" in notices[0].notice
    run_id, sent = replay(folder, uri)
    assert sent == 1
    assert MlflowClient(uri).get_run(run_id).data.params == {"lr": "1"}


def test_a_record_without_a_mirror_needs_no_mlflow(tmp_path: Path) -> None:
    Record(str(tmp_path), None, lambda _: None).log_metrics({"loss": 1.0}, 1)
    assert entries(str(tmp_path)) == 1


def test_a_grid_places_rows_in_order_between_white_gaps() -> None:
    images = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    canvas = grid_of(images, columns=2, gap=1)
    assert canvas.shape == (7, 7, 3)
    assert canvas[1, 1, 0] == 0
    assert canvas[1, 4, 0] == 128
    assert canvas[4, 1, 0] == 255
    assert (canvas[0] == 255).all()
