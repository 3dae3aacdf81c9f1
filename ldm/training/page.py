"""What a training's page says beside its numbers, as files of its record: enough to repeat it.

`run.yaml` is the configuration, `inputs.json` the data with their digests, `environment.txt` the installed packages,
`changes.diff` what was not committed. A tracking server is sent copies; `RunPage` is what comes back from there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm import storage

CONFIG_FILE = "run.yaml"
INPUTS_FILE = "inputs.json"
ENVIRONMENT_FILE = "environment.txt"
CHANGES_FILE = "changes.diff"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInput:
    """Data that a run was fed.

    Attributes:
        name: what they are called in MLflow.
        uri: where they lie.
        digest: the digest of their manifest.
        context: what for, as "training".
        profile: counts and facts worth a glance.
    """

    name: str
    uri: str
    digest: str
    context: str
    profile: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPage:
    """What a tracking server knows of a run, to repeat it.

    Attributes:
        run_id: the run.
        config: text of its configuration.
        environment: text of its packages; empty where it has none.
        tags: its tags, those of the code among them.
        digest_of_input: names of its data to their digests, or to as much of them as the server keeps.
    """

    run_id: str
    config: str
    environment: str
    tags: dict[str, str]
    digest_of_input: dict[str, str]


def write_inputs(folder: str, inputs: Sequence[DataInput]) -> None:
    """Keep the names and digests of a run's data in its record."""
    content = [asdict(given) for given in inputs]
    storage.write_text(storage.join(folder, INPUTS_FILE), json.dumps(content, indent=1))


def read_inputs(folder: str) -> list[DataInput]:
    """Return what `write_inputs` kept; nothing for an older record."""
    path = storage.join(folder, INPUTS_FILE)
    return [DataInput(**raw) for raw in json.loads(storage.read_text(path))] if storage.exists(path) else []
