"""Brings the local record of a run into MLflow, after a server was away.

python -m jobs.replay_record FOLDER --uri URI
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from jobs.command_line import report_errors
from jobs.session import prepare
from ldm.training.record import RECORD_FILE, MirrorError
from ldm.training.tracking import replay


@report_errors()
def main() -> None:
    """Send what MLflow does not have yet."""
    prepare()
    tyro.cli(_replay, description=__doc__)


def _replay(folder: Annotated[str, tyro.conf.Positional], uri: str) -> None:
    """Bring a record into MLflow.

    Args:
        folder: the record's folder, with record.jsonl and run.json in it.
        uri: MLflow tracking URI.
    """
    for name in (RECORD_FILE, "run.json"):
        if not (Path(folder) / name).is_file():
            raise ValueError(f"{folder} holds no record: it has no {name}")
    try:
        run_id, sent = replay(folder, uri)
    except MirrorError as error:
        raise ValueError(f"{error}; what was sent stays sent, start the same command again") from error
    print(f"{sent} entries sent to run {run_id} at {uri}")


if __name__ == "__main__":
    main()
