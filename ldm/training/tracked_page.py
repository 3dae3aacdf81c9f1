"""THE MLflow page file: what a run's page says beside its numbers, sent from the record's files and read back.

`send_page` brings configuration, data, code and attempts (each a nested run), `read_page` what a repetition needs. All
of it can be sent again at any time: what is there already stays, what has changed since is set anew.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.entities import DatasetInput, InputTag, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ldm.training.attempts import ATTEMPT_FILE, Attempt, Status, attempt_folder, read_attempts
from ldm.training.page import CHANGES_FILE, CONFIG_FILE, ENVIRONMENT_FILE, DataInput, RunPage, read_inputs
from ldm.training.record import MirrorError

PARENT_TAG = "mlflow.parentRunId"
MAX_DIGEST_CHARS = 36
"""MLflow keeps so much of a digest."""
MAX_TAG_CHARS = 5_000
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def send_page(uri: str, run_id: str, folder: str) -> None:
    """Bring a record's configuration, data and attempts to its run, with the code and packages of the first attempt.

    Raises:
        MirrorError: if MLflow can't be reached.
    """
    with reaching(uri):
        client = MlflowClient(uri)
        first = Path(attempt_folder(folder, 1))
        for path in (Path(folder) / CONFIG_FILE, first / ENVIRONMENT_FILE, first / CHANGES_FILE):
            if path.is_file():
                client.log_artifact(run_id, str(path))
    log_inputs(uri, run_id, read_inputs(folder))
    send_attempts(uri, run_id, folder)


def log_inputs(uri: str, run_id: str, inputs: list[DataInput]) -> None:
    """Name the data that a run was fed, with digests, as MLflow dataset inputs.

    Raises:
        MirrorError: if MLflow can't be reached.
    """
    if not inputs:
        return
    entities = [
        DatasetInput(_ManifestDataset(data)._to_mlflow_entity(), [InputTag("mlflow.data.context", data.context)])
        for data in inputs
    ]
    with reaching(uri):
        MlflowClient(uri).log_inputs(run_id, datasets=entities)


def send_attempts(uri: str, run_id: str, folder: str) -> None:
    """Bring a record's attempts to MLflow, each as a run nested under the training's own.

    Raises:
        MirrorError: if MLflow can't be reached.
    """
    with reaching(uri):
        client = MlflowClient(uri)
        experiment_id = client.get_run(run_id).info.experiment_id
        there = {run.data.tags.get("attempt"): run for run in _children(client, experiment_id, run_id)}
        for attempt in read_attempts(folder):
            number = str(attempt.number)
            child = there.get(number) or client.create_run(
                experiment_id,
                start_time=attempt.started_ms,
                tags={PARENT_TAG: run_id, "attempt": number},
                run_name=f"attempt {number}",
            )
            _update(client, child, attempt, Path(attempt_folder(folder, attempt.number)))


def read_page(uri: str, run_id: str) -> RunPage:
    """Return what MLflow has of a run, to repeat it; of an attempt, its own files and its training's data.

    Raises:
        ValueError: if MLflow has no such run, or the run has no configuration among its files.
        MirrorError: if MLflow can't be reached.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError(f"there is no database at {uri}: say where the run is kept by --tracking.uri")
    with reaching(uri), TemporaryDirectory() as scratch:
        client = MlflowClient(uri)
        run = _run_of(client, uri, run_id)
        there = {file.path for file in client.list_artifacts(run_id)}
        if CONFIG_FILE not in there:
            raise ValueError(
                f"run {run_id} at {uri} has no {CONFIG_FILE} among its files, only {sorted(there)}: a training "
                "that was recorded by this project has one"
            )
        wanted = [name for name in (CONFIG_FILE, ENVIRONMENT_FILE) if name in there]
        texts = {name: Path(client.download_artifacts(run_id, name, scratch)).read_text() for name in wanted}
        parent = run.data.tags.get(PARENT_TAG)
        inputs = (client.get_run(parent) if parent else run).inputs
    fed = inputs.dataset_inputs if inputs else []
    return RunPage(
        run_id=run_id,
        config=texts[CONFIG_FILE],
        environment=texts.get(ENVIRONMENT_FILE, ""),
        tags=dict(run.data.tags),
        digest_of_input={given.dataset.name: given.dataset.digest for given in fed},
    )


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn what MLflow raises in the block into a MirrorError."""
    try:
        yield
    except MirrorError:
        raise
    except (MlflowException, OSError) as error:
        raise MirrorError(f"MLflow at {uri} does not answer: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return as much of an error as fits into a sentence."""
    return str(error).splitlines()[0][:200]


def _run_of(client: MlflowClient, uri: str, run_id: str) -> Run:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            raise ValueError(f"MLflow at {uri} has no run {run_id!r}; an id stands on the run's page") from error
        raise


def _children(client: MlflowClient, experiment_id: str, run_id: str) -> list[Run]:
    wanted = f"tags.`{PARENT_TAG}` = '{run_id}'"
    page = client.search_runs([experiment_id], wanted)
    found = list(page)
    while page.token:
        page = client.search_runs([experiment_id], wanted, page_token=page.token)
        found += page
    return found


def _update(client: MlflowClient, child: Run, attempt: Attempt, folder: Path) -> None:
    """Set the nested run to what the attempt says, unless it says so already."""
    tags = {name: value[:MAX_TAG_CHARS] for name, value in attempt.described().items()}
    is_same = tags.items() <= child.data.tags.items() and child.info.status == attempt.status
    if is_same:
        return
    for path in sorted(folder.iterdir()):
        if path.name != ATTEMPT_FILE and not path.name.startswith("."):  # half of a file that was never published
            client.log_artifact(child.info.run_id, str(path))
    client.log_batch(child.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    if attempt.status is not Status.RUNNING:
        with redirect_stdout(io.StringIO()):  # a server's client announces every run that ends: one is enough
            client.set_terminated(child.info.run_id, attempt.status.value, attempt.heard_ms)


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
        super().__init__(_ManifestSource(data.uri), name=data.name, digest=data.digest[:MAX_DIGEST_CHARS])

    def _compute_digest(self) -> str:
        return self._data.digest[:MAX_DIGEST_CHARS]

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
