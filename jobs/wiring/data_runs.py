"""The MLflow run of a data job: its configuration, its counts, the digest of what it made, and its report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from jobs.session import code_version, without_warnings
from jobs.wiring.recording import save_run_config
from ldm import storage
from ldm.config import Config
from ldm.training.record import MirrorError
from ldm.training.tracking_config import TrackingConfig

logger = logging.getLogger(__name__)
PUBLISHED_FILE = "published.json"
"""In the record's folder, written last: which digest MLflow has the tags, the figures and the report of."""


def is_published(tracking: TrackingConfig, record: str, digest: Mapping[str, str]) -> bool:
    """Say whether MLflow has all of what was made; a call that was killed, or met no server, left that undone.

    Where no server is given, nothing is due.
    """
    if not tracking.uri:
        return True
    path = storage.join(record, PUBLISHED_FILE)
    return bool(record) and storage.exists(path) and json.loads(storage.read_text(path)) == _mark(tracking, digest)


def publish_report(
    config: Config,
    tracking: TrackingConfig,
    record: str,
    title: str,
    metrics: Mapping[str, float],
    digest: Mapping[str, str],
    page: str,
) -> None:
    """Bring what a data job made into MLflow, where it has a server; the data do not depend on it.

    Args:
        config: the job's whole configuration.
        tracking: the server.
        record: local folder that remembers the run.
        title: the run's name.
        metrics: what was counted and measured.
        digest: name and digest of what was made, as a tag; it is set anew each time, for the data may have grown.
        page: path of the report.

    Raises:
        ValueError: if there is a server and no folder to remember the run in.
    """
    if not tracking.uri:
        return
    if not record:
        raise ValueError("tracking.uri needs a folder under --record, where the MLflow run is remembered")
    # Optional: a machine without MLflow keeps the report beside the data.
    with without_warnings():
        from ldm.training.tracking import end_run, log_file, log_tags, log_values, open_run
    save_run_config(config, record)
    tags = {**digest, **code_version()}
    run_id = open_run(tracking, record, title, config.flat(), tags)
    if not run_id:
        return
    try:
        log_tags(tracking.uri, run_id, tags)
        log_values(tracking.uri, run_id, dict(metrics))
        log_file(tracking.uri, run_id, page)
    except MirrorError as error:
        logger.warning("the report is in %s only: %s", page, error)
        return
    end_run(tracking.uri, run_id, "FINISHED")
    storage.write_text(storage.join(record, PUBLISHED_FILE), json.dumps(_mark(tracking, digest), indent=1))


def _mark(tracking: TrackingConfig, digest: Mapping[str, str]) -> dict[str, str]:
    return {"uri": tracking.uri, **digest}
