"""Laws of a data job's MLflow run: it ends up with report and digest of what is there, whenever it was killed."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from jobs.wiring.data_runs import PUBLISHED_FILE
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig, publish, show
from jobs.wiring.shard_dataset import ShardDatasetConfig, report_page
from jobs.wiring.shard_dataset import publish as publish_dataset
from ldm.config import Config
from ldm.training.tracking import open_run
from ldm.training.tracking_config import TrackingConfig
from pipeline.effort import Effort
from pipeline.latent_plan import plan_latents
from pipeline.latent_report import write_latent_report
from pipeline.report import REPORT_NAME, write_report
from pipeline.run import RunReport
from tests.small_datasets import add_images, folder_config, made, run_here
from tests.tiny_latents import latents_config, write_autoencoder, write_dataset


def runs(config: PrecomputeLatentsConfig | ShardDatasetConfig) -> list[Run]:
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    return list(client.search_runs([experiment.experiment_id])) if experiment is not None else []


def artifacts(config: PrecomputeLatentsConfig | ShardDatasetConfig) -> list[str]:
    (run,) = runs(config)
    return [file.path for file in MlflowClient(config.tracking.uri).list_artifacts(run.info.run_id)]


def values(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def config(tmp_path: Path, uri: str) -> PrecomputeLatentsConfig:
    """Latents to be made of two shards, with an MLflow on SQLite."""
    write_dataset(tmp_path / "dataset", sizes=(3,))
    write_autoencoder(tmp_path / "autoencoder")
    plain = latents_config(tmp_path)
    tracking = TrackingConfig(uri=uri, experiment=tmp_path.name)
    return PrecomputeLatentsConfig(**values(plain), tracking=tracking, record=str(tmp_path / "record"))


def make(config: PrecomputeLatentsConfig) -> RunReport:
    return run_here(plan_latents(config))


def test_run_of_a_cache_that_grew_has_the_digest_of_what_is_there(
    config: PrecomputeLatentsConfig, tmp_path: Path
) -> None:
    first = make(config)
    publish(config, first)
    assert runs(config)[0].data.tags["latents_digest"] == first.manifest.digest
    assert runs(config)[0].data.metrics["shards"] == 2
    write_dataset(tmp_path / "dataset", sizes=(3, 4))
    second = make(config)
    assert second.manifest.digest != first.manifest.digest
    publish(config, second)
    (run,) = runs(config)
    assert run.data.tags["latents_digest"] == second.manifest.digest
    assert run.data.metrics["shards"] == 3
    assert run.info.status == "FINISHED"


def test_call_after_a_kill_between_page_and_mlflow_brings_the_report(config: PrecomputeLatentsConfig) -> None:
    report = make(config)
    write_latent_report(config)  # and here the job was killed
    again = make(config)
    assert again.num_shards == 0
    publish(config, again)
    assert artifacts(config) == [REPORT_NAME]
    assert runs(config)[0].data.tags["latents_digest"] == report.manifest.digest


def test_call_after_a_kill_while_mlflow_was_told_brings_the_rest(config: PrecomputeLatentsConfig) -> None:
    make(config)
    write_latent_report(config)
    open_run(config.tracking, config.record, "latents", config.flat(), {})  # and here
    assert artifacts(config) == []
    publish(config, make(config))
    assert artifacts(config) == [REPORT_NAME]
    assert runs(config)[0].info.status == "FINISHED"


def test_call_that_meets_no_server_is_made_good_by_the_next(
    config: PrecomputeLatentsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = TrackingConfig(uri="http://127.0.0.1:9", experiment=config.tracking.experiment)
    publish(replace(config, tracking=away), make(config))
    assert not (Path(config.record) / PUBLISHED_FILE).exists()
    publish(config, make(config))
    assert artifacts(config) == [REPORT_NAME]


def test_call_with_nothing_new_leaves_mlflow_alone(config: PrecomputeLatentsConfig) -> None:
    publish(config, make(config))
    (before,) = runs(config)
    publish(config, make(config))
    (after,) = runs(config)
    assert after.info.end_time == before.info.end_time


def test_dataset_is_brought_into_mlflow_after_a_kill_and_anew_when_it_grew(tmp_path: Path, uri: str) -> None:
    add_images(tmp_path / "images", range(6))
    plain = folder_config(tmp_path / "dataset", tmp_path / "images")
    tracking = TrackingConfig(uri=uri, experiment=tmp_path.name)
    config = ShardDatasetConfig(**values(plain), tracking=tracking, record=str(tmp_path / "record"))
    made(config)
    write_report(config.root)  # and here the job was killed
    for numbers in (range(0), range(6, 12)):
        add_images(tmp_path / "images", numbers)
        report = made(config)
        publish_dataset(config, report, report_page(config, report))
        (run,) = runs(config)
        assert run.data.tags["dataset_digest"] == report.manifest.digest
        assert artifacts(config) == [REPORT_NAME]


def test_job_shows_what_the_workers_did_and_nothing_where_they_did_nothing(config: PrecomputeLatentsConfig) -> None:
    report = make(config)
    stream = io.StringIO()
    with redirect_stdout(stream):
        show(report)
    assert stream.getvalue() == ""
    report.work.add(
        Effort(worker="here 7", begun=0, ended=2, num_rows=7, num_bytes=3, busy_seconds=1.5, wait_seconds=0.1)
    )
    with redirect_stdout(stream):
        show(report)
    assert "here 7" in stream.getvalue()
    assert "75.0 %" in stream.getvalue()
