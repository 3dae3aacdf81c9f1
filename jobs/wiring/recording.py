"""A training's record and its MLflow run, put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm import storage
from ldm.config import Config
from ldm.training.checkpoint import CheckpointStore
from ldm.training.loop import Progress
from ldm.training.page import CONFIG_FILE
from ldm.training.record import Mirror, Record, SilentTracker, Tracker
from ldm.training.world import World


def save_run_config(config: Config, root: str) -> None:
    """Save the resolved configuration, which `--config` reads back."""
    storage.write_text(storage.join(root, CONFIG_FILE), config.to_yaml())


def open_record(folder: str, uri: str, run_id: str, world: World, report: Callable[[Progress], None]) -> Tracker:
    """Return the tracker of one process: the main one writes the record and mirrors it into an MLflow run."""
    if not world.is_main:
        return SilentTracker()

    def notify(sentence: str) -> None:
        report(Progress(done=0, total=0, notice=sentence))

    return Record(folder, _mirror(folder, uri, run_id, notify), notify)


def run_of(folder: str) -> dict[str, Any]:
    """Return what `run.json` knows of a record's MLflow run; empty without one."""
    path = Path(folder) / "run.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return known


def first_validation(root: str) -> dict[str, float]:
    """Return a training's first validation, from its latest checkpoint.

    Raises:
        ValueError: if there is no checkpoint.
    """
    checkpoints = storage.join(root, "checkpoints")
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    state = CheckpointStore(checkpoints, {}, 1, alone).latest_state()
    if state is None:
        raise ValueError(f"{checkpoints} holds no checkpoint")
    return state.first_validation


def _mirror(folder: str, uri: str, run_id: str, notify: Callable[[str], None]) -> Mirror | None:
    if not uri:
        return None
    # Optional: a machine without MLflow keeps the local record.
    from ldm.training.tracking import MlflowMirror, offline_notice

    if not run_id:
        notify(offline_notice(folder, uri))
        return None
    return MlflowMirror(uri, run_id)
