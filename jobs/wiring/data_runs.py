"""The MLflow run of a data job: its configuration, its counts, the digest of what it made, and its report."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from jobs.session import code_version, without_warnings
from jobs.wiring.recording import save_run_config
from ldm.config import Config
from ldm.training.record import MirrorError
from ldm.training.tracking_config import TrackingConfig

logger = logging.getLogger(__name__)


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
        digest: name and digest of what was made, as a tag.
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
        from ldm.training.tracking import end_run, log_file, log_values, open_run
    save_run_config(config, record)
    run_id = open_run(tracking, record, title, config.flat(), {**digest, **code_version()})
    if not run_id:
        return
    try:
        log_values(tracking.uri, run_id, dict(metrics))
        log_file(tracking.uri, run_id, page)
    except MirrorError as error:
        logger.warning("the report is in %s only: %s", page, error)
        return
    end_run(tracking.uri, run_id, "FINISHED")
