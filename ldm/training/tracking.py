"""THE MLflow tracking file: runs, their inputs and files, and the mirror of a run's local record.

Order of a run: `open_run` makes it (or finds it again) → `MlflowMirror` copies the record's entries as they come →
`log_inputs`, `log_file`, `end_run` at the end. What could not be sent, `replay` sends afterwards.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ldm import storage
from ldm.training.record import RECORD_FILE, MirrorError, forget_sent, send_pending
from ldm.training.tracking_config import TrackingConfig

logger = logging.getLogger(__name__)
RUN_FILE = "run.json"
MAX_PARAM_CHARS = 6_000
EXPERIMENT_KIND, MODEL_DEVELOPMENT = "mlflow.experimentKind", "custom_model_development"
"""Which of its two pages MLflow shows for an experiment: this one has curves and models, the other prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInput:
    """A dataset that a run was fed.

    Attributes:
        name: what it is called in MLflow.
        uri: where it lies.
        digest: the digest of its manifest.
        context: what for, as "training".
        profile: counts and facts worth a glance.
    """

    name: str
    uri: str
    digest: str
    context: str
    profile: dict[str, Any]


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
            self._client.log_batch(self._run_id, metrics=metrics)
        except (MlflowException, OSError) as error:
            raise MirrorError(f"{offline_notice(str(folder), self._uri)} ({_first_line(error)})") from error


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
        logger.warning("MLflow at %s does not answer: %s", config.uri, _first_line(error))
    if known and about["run_id"] != known.get("run_id"):
        forget_sent(folder)
    storage.write_text(path, json.dumps(about, indent=1))
    return str(about["run_id"]) if is_reached else ""


def log_inputs(uri: str, run_id: str, inputs: list[DataInput]) -> None:
    """Name the data that a run was fed, with digests, as MLflow dataset inputs.

    Raises:
        MirrorError: if MLflow can't be reached.
    """
    entities = [
        DatasetInput(_ManifestDataset(data)._to_mlflow_entity(), [InputTag("mlflow.data.context", data.context)])
        for data in inputs
    ]
    with _reaching(uri):
        MlflowClient(uri).log_inputs(run_id, datasets=entities)


def end_run(uri: str, run_id: str, status: str) -> None:
    """Mark a run FINISHED, KILLED or FAILED; a server that is away is warned about and does not undo the training."""
    try:
        MlflowClient(uri).set_terminated(run_id, status)
    except (MlflowException, OSError) as error:
        logger.warning("MLflow run %s could not be marked %s: %s", run_id, status, _first_line(error))


def log_file(uri: str, run_id: str, path: str, folder: str = "") -> None:
    """Copy a file to a run's artifacts; raises MirrorError if MLflow can't be reached."""
    with _reaching(uri), tempfile.TemporaryDirectory() as scratch:
        if not storage.is_local(path):
            local = storage.join(scratch, path.rsplit("/", 1)[-1])
            storage.copy_file(path, local)
            path = local
        MlflowClient(uri).log_artifact(run_id, path, folder or None)


def log_values(uri: str, run_id: str, metrics: Mapping[str, float]) -> None:
    """Record final measurements of a run; raises MirrorError if MLflow can't be reached."""
    now = int(time.time() * 1000)
    with _reaching(uri):
        MlflowClient(uri).log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()])


def log_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run anew, as the digest of data that have grown; raises MirrorError if MLflow can't be reached."""
    with _reaching(uri):
        MlflowClient(uri).log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def replay(folder: str, uri: str) -> tuple[str, int]:
    """Bring a record into MLflow and return (run id, number of entries sent); what is there is not sent again.

    Raises:
        MirrorError: if MLflow can't be reached.
    """
    path = storage.join(folder, RUN_FILE)
    about = json.loads(storage.read_text(path))
    known = about["run_id"] if about["uri"] == uri else ""
    about |= {"uri": uri, "run_id": known}
    with _reaching(uri):
        about["run_id"], about["experiment_id"] = _ensure_run(
            TrackingConfig(uri=uri, experiment=about["experiment"]), about
        )
        if about["run_id"] != known:
            forget_sent(folder)
        storage.write_text(path, json.dumps(about, indent=1))
        sent = send_pending(Path(folder), MlflowMirror(uri, about["run_id"]))
        MlflowClient(uri).set_terminated(about["run_id"])
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


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        raise MirrorError(f"MLflow at {uri} does not answer: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


class _ManifestSource(DatasetSource):
    """Where a manifest's data lies."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @staticmethod
    def _get_source_type() -> str:
        return "manifest"

    def load(self, **_: Any) -> str:
        """Return the folder or URL."""
        return self.uri

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return isinstance(raw_source, str)

    @classmethod
    def _resolve(cls, raw_source: Any) -> _ManifestSource:
        return cls(raw_source)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for MLflow."""
        return {"uri": self.uri}

    @classmethod
    def from_dict(cls, source_dict: dict[str, Any]) -> _ManifestSource:
        """Return the source that `to_dict` described."""
        return cls(source_dict["uri"])


class _ManifestDataset(Dataset):
    """A dataset whose digest is its manifest's."""

    def __init__(self, data: DataInput) -> None:
        self._data = data
        super().__init__(_ManifestSource(data.uri), name=data.name, digest=data.digest[:36])

    def _compute_digest(self) -> str:
        return self._data.digest[:36]

    @property
    def profile(self) -> dict[str, Any]:
        """Counts and facts worth a glance."""
        return self._data.profile

    @property
    def schema(self) -> None:
        """Return nothing: rows are files in tars."""
        return None

    def to_dict(self) -> dict[str, str]:
        """Return plain data for MLflow."""
        return {**super().to_dict(), "schema": "", "profile": json.dumps(self._data.profile)}
