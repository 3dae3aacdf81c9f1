"""The finished model as a version in the MLflow registry, once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jobs.session import code_version, without_warnings
from jobs.wiring.recording import run_of
from jobs.wiring.train_ldm import TrainLdmConfig
from ldm import storage
from ldm.model_card import load_card, model_digest
from ldm.training.attempts import read_attempts

if TYPE_CHECKING:
    from ldm.registry import RegisteredModel

REGISTERED_FILE = "registered.json"
CODE_TAGS = ("code_", "environment_", "mlflow.source.")
"""What the names of an attempt's tags on its code and packages begin with."""


def register_model(config: TrainLdmConfig) -> RegisteredModel | None:
    """Register the finished model if it is not; None where no registry is configured or it can't be reached."""
    run_id = run_of(config.record).get("run_id", "")
    if not (config.tracking.uri and config.tracking.model_name):
        return None
    if not run_id:
        print(f"not registered: start the same command again when MLflow at {config.tracking.uri} answers")
        return None
    # Optional: a machine without MLflow trains with --tracking.uri "".
    with without_warnings():  # MLflow's advice on annotations
        from ldm.registry import RegisteredModel, RegistryError, register

    known = registered_model(config.root, model_digest(load_card(config.model_folder)), config.tracking.uri)
    if known:
        return RegisteredModel(**known)
    try:
        made = register(
            uri=config.tracking.uri,
            run_id=run_id,
            name=config.tracking.model_name,
            folder=config.model_folder,
            tags=_code_of(config.record),
        )
    except RegistryError as error:
        print(f"not registered: {error}; start the same command again when MLflow at {config.tracking.uri} answers")
        return None
    content = {"model": model_digest(load_card(config.model_folder)), "registry": config.tracking.uri}
    version = {"name": made.name, "version": made.version, "uri": made.uri}
    storage.write_text(
        storage.join(config.root, REGISTERED_FILE), json.dumps({**content, "version": version}, indent=1)
    )
    return made


def _code_of(record: str) -> dict[str, str]:
    """Return the code that the model was trained with last, which may not be the code that registers it."""
    latest = read_attempts(record)[-1:]
    known = {name: value for attempt in latest for name, value in attempt.tags.items() if name.startswith(CODE_TAGS)}
    return known or code_version()


def registered_model(root: str, digest: str, uri: str) -> dict[str, str]:
    """Return name, version and uri of the version that was registered for this model at this registry, or nothing."""
    path = storage.join(root, REGISTERED_FILE)
    if not storage.exists(path):
        return {}
    known = json.loads(storage.read_text(path))
    if known["model"] != digest or known["registry"] != uri:
        return {}
    version: dict[str, str] = known["version"]
    return version
