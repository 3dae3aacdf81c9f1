"""What evaluation and sampling leave in MLflow: figures on the run and the version, pictures among the run's files."""

from __future__ import annotations

import logging
from typing import Any

from jobs.session import without_warnings
from jobs.wiring.evaluate import REPORT_FILE, EvaluateConfig
from jobs.wiring.recording import run_of
from jobs.wiring.registering import registered_model
from jobs.wiring.sample import SampleConfig
from ldm import storage
from ldm.training.record import MirrorError

logger = logging.getLogger(__name__)


def publish_evaluation(config: EvaluateConfig, report: dict[str, Any], has_passed: bool) -> None:
    """Write an evaluation on the run and the registered version; a champion is a version that passed."""
    run_id, uri = run_of(config.record).get("run_id", ""), config.tracking.uri
    if not (uri and run_id):
        return
    # Optional: a machine without MLflow evaluates with --tracking.uri "".
    with without_warnings():  # MLflow's advice on annotations
        from ldm.registry import RegisteredModel, RegistryError, record_evaluation
    from ldm.training.tracking import log_file, log_values

    try:
        log_values(uri, run_id, {f"evaluation_{name}": value for name, value in report["metrics"].items()})
        log_file(uri, run_id, storage.join(config.root, REPORT_FILE))
    except MirrorError as error:
        logger.warning("the evaluation is in %s only: %s", storage.join(config.root, REPORT_FILE), error)
        return
    version = registered_model(config.root, report["model"], uri)
    if not version:
        return
    model = RegisteredModel(**version)
    try:
        champion = record_evaluation(
            uri=uri, model=model, protocol_digest=report["protocol"], metrics=report["metrics"], has_passed=has_passed
        )
    except RegistryError as error:
        logger.warning("the evaluation is not on the registered version: %s", error)
        return
    if has_passed:
        state = f"is now version {champion}"
    elif champion == model.version:
        state = f"stays version {champion}, which passed before and did not now: move the alias if it must not serve"
    else:
        state = f"stays version {champion}: this one did not pass" if champion else "is nothing yet: it did not pass"
    print(f"registry  models:/{model.name}@champion {state}")


def publish_picture(config: SampleConfig, path: str) -> None:
    """Copy a picture to the files of the run that trained the model."""
    run_id = run_of(config.record).get("run_id", "")
    if config.tracking.uri and run_id and storage.is_local(path):
        from ldm.training.tracking import log_file

        try:
            log_file(config.tracking.uri, run_id, path, "pictures")
        except MirrorError as error:
            logger.warning("the picture is in %s only: %s", path, error)
