"""THE MLflow tracking file: runs, their files, and the mirror of a run's local record.

Order of a run: `open_run` makes it (or finds it again) → `send_page` (of `ldm.training.tracked_page`) says what it is →
`MlflowMirror` copies the record's entries as they come → `end_run`. What could not be sent, `replay` sends afterwards.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ldm import storage
from ldm.training.attempts import Status, read_attempts
from ldm.training.record import RECORD_FILE, MirrorError, forget_sent, send_pending
from ldm.training.tracked_page import first_line, reaching, send_page
from ldm.training.tracking_config import TrackingConfig

logger = logging.getLogger(__name__)
RUN_FILE = "run.json"
MAX_PARAM_CHARS = 6_000
MAX_METRICS_AT_ONCE = 1_000
"""MLflow refuses more; several hundred ranks have as many."""
EXPERIMENT_KIND, MODEL_DEVELOPMENT = "mlflow.experimentKind", "custom_model_development"
"""Which of its two pages MLflow shows for an experiment: this one has curves and models, the other prompts."""


class MlflowMirror:
    """Copies a record's entries into one MLflow run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._client = MlflowClient(uri)

    def send(self, folder: Path, entry: Mapping[str, Any]) -> None:
        """Copy one entry; see `Mirror.send`."""
        try:
            if "picture" in entry:
                self._client.log_artifact(self._run_id, str(folder / entry["picture"]), "pictures")
                return
            time_ms, step = entry["time_ms"], entry["samples_seen"]
            metrics = [Metric(name, float(value), time_ms, step) for name, value in entry["metrics"].items()]
            for start in range(0, len(metrics), MAX_METRICS_AT_ONCE):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + MAX_METRICS_AT_ONCE])
        except (MlflowException, OSError) as error:
            raise MirrorError(f"{offline_notice(str(folder), self._uri)} ({first_line(error)})") from error


def offline_notice(folder: str, uri: str) -> str:
    """Return what a person reads when MLflow does not answer."""
    return (
        f"MLflow at {uri} does not answer: training goes on, everything is kept in {Path(folder) / RECORD_FILE}. "
        f"Bring it into MLflow later with: python -m jobs.replay_record {folder} --uri {uri}"
    )


def open_run(config: TrackingConfig, folder: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """Return the id of the MLflow run of this record, made at the first call and found again at later ones.

    What makes the run is kept in `run.json`, so that a record made without a server can be replayed. An empty id means
    that MLflow can't be reached now.
    """
    path = storage.join(folder, RUN_FILE)
    known: dict[str, Any] = json.loads(storage.read_text(path)) if storage.exists(path) else {}
    is_same_place = known.get("uri", config.uri) == config.uri
    about = {
        "uri": config.uri,
        "run_id": str(known.get("run_id", "")) if is_same_place else "",
        "experiment_id": str(known.get("experiment_id", "")) if is_same_place else "",
        "name": name,
        "experiment": config.experiment,
        "params": dict(params),
        "tags": dict(tags),
    }
    is_reached = True
    try:
        about["run_id"], about["experiment_id"] = _ensure_run(config, about)
    except (MlflowException, OSError) as error:
        is_reached = False
        logger.warning("MLflow at %s does not answer: %s", config.uri, first_line(error))
    if known and about["run_id"] != known.get("run_id"):
        forget_sent(folder)
    storage.write_text(path, json.dumps(about, indent=1))
    return str(about["run_id"]) if is_reached else ""


def end_run(uri: str, run_id: str, status: str) -> None:
    """Mark a run FINISHED, KILLED or FAILED; a server that is away is warned about and does not undo the training."""
    try:
        MlflowClient(uri).set_terminated(run_id, status)
    except (MlflowException, OSError) as error:
        logger.warning("MLflow run %s could not be marked %s: %s", run_id, status, first_line(error))


def log_file(uri: str, run_id: str, path: str, folder: str = "") -> None:
    """Copy a file to a run's artifacts; raises MirrorError if MLflow can't be reached."""
    with reaching(uri), tempfile.TemporaryDirectory() as scratch:
        if not storage.is_local(path):
            local = storage.join(scratch, path.rsplit("/", 1)[-1])
            storage.copy_file(path, local)
            path = local
        MlflowClient(uri).log_artifact(run_id, path, folder or None)


def log_values(uri: str, run_id: str, metrics: Mapping[str, float]) -> None:
    """Record final measurements of a run; raises MirrorError if MLflow can't be reached."""
    now = int(time.time() * 1000)
    with reaching(uri):
        MlflowClient(uri).log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()])


def log_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run anew, as the digest of data that have grown; raises MirrorError if MLflow can't be reached."""
    with reaching(uri):
        MlflowClient(uri).log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def replay(folder: str, uri: str) -> tuple[str, int]:
    """Bring a record into MLflow and return (run id, number of entries sent); entries that are there stay.

    The run ends as its latest attempt did; one that has not ended yet, or was killed without a word, is left running.

    Raises:
        MirrorError: if MLflow can't be reached.
    """
    path = storage.join(folder, RUN_FILE)
    about = json.loads(storage.read_text(path))
    known = about["run_id"] if about["uri"] == uri else ""
    about |= {"uri": uri, "run_id": known}
    with reaching(uri):
        about["run_id"], about["experiment_id"] = _ensure_run(
            TrackingConfig(uri=uri, experiment=about["experiment"]), about
        )
        if about["run_id"] != known:
            forget_sent(folder)
        storage.write_text(path, json.dumps(about, indent=1))
        send_page(uri, about["run_id"], folder)
        sent = send_pending(Path(folder), MlflowMirror(uri, about["run_id"]))
        latest = read_attempts(folder)[-1:]
        status, end_ms = (latest[0].status, latest[0].heard_ms) if latest else (Status.FINISHED, None)
        if status is not Status.RUNNING:
            MlflowClient(uri).set_terminated(about["run_id"], status.value, end_ms)
    return about["run_id"], sent


def _ensure_run(config: TrackingConfig, about: Mapping[str, Any]) -> tuple[str, str]:
    """Return (run id, experiment id) of the run that `about` describes, made if it is not there."""
    client = MlflowClient(config.uri)
    if about["run_id"] and _is_known(client, about["run_id"]):
        client.update_run(about["run_id"], status="RUNNING")
        return about["run_id"], client.get_run(about["run_id"]).info.experiment_id
    experiment = client.get_experiment_by_name(config.experiment)
    experiment_id = (
        experiment.experiment_id
        if experiment is not None
        else client.create_experiment(
            config.experiment, artifact_location=_artifact_home(config), tags={EXPERIMENT_KIND: MODEL_DEVELOPMENT}
        )
    )
    run = client.create_run(experiment_id, run_name=about["name"], tags=dict(about["tags"]))
    params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in about["params"].items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    return run.info.run_id, experiment_id


def _is_known(client: MlflowClient, run_id: str) -> bool:
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _artifact_home(config: TrackingConfig) -> str | None:
    if config.artifacts:
        return str(Path(config.artifacts).resolve()) if storage.is_local(config.artifacts) else config.artifacts
    if config.uri.startswith("sqlite:///"):
        return str(Path(config.uri.removeprefix("sqlite:///")).resolve().parent / "mlflow-artifacts")
    return None
