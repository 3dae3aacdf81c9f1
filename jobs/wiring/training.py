"""What both trainings do around their worker: check the output, open the MLflow run, launch, close the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from jobs.session import (
    TrainingBar,
    code_version,
    is_main_process,
    ray_session,
    stop_request,
    terminated_like_interrupted,
)
from jobs.wiring.recording import CONFIG_FILE, save_run_config
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import TrainLdmConfig
from ldm import storage
from ldm.config import Config
from ldm.training.local_launch import LaunchConfig, Outcome, Where, run_here
from ldm.training.loop import Progress
from ldm.training.record import MirrorError
from pipeline.store.manifest import Manifest
from pipeline.store.schema import Split

logger = logging.getLogger(__name__)
TrainingConfig = TrainAutoencoderConfig | TrainLdmConfig
CHECKPOINT_BYTES_PER_WEIGHT = 16
"""Weight, two moments of Adam and the average, each of four bytes."""


def run_training(
    config: TrainingConfig,
    worker: Callable[..., Outcome],
    *,
    title: str,
    num_parameters: int,
    data: Manifest,
    data_uri: str,
) -> Outcome:
    """Run a training to its end, or until it is asked to stop, and return its outcome.

    Raises:
        KeyboardInterrupt: after a stop that was asked for; the state is saved.
        ValueError: for what a person can fix.
    """
    is_main = is_main_process()
    run_id = ""
    if is_main:
        # One more than stay: the next is written before the oldest goes.
        num_checkpoints = config.loop.keep_checkpoints + 1 + config.loop.num_kept_for_good
        storage.check_writable(config.root, num_checkpoints * num_parameters * CHECKPOINT_BYTES_PER_WEIGHT)
        storage.check_writable(config.record)
        save_run_config(config, config.root)
        save_run_config(config, config.record)
        run_id = _open_run(config, title, data, data_uri)
    placed = partial(worker, run_id=run_id)
    status = "FAILED"
    try:
        outcome = launch(placed, config, config.launch, title)
        status = "FINISHED" if outcome["is_finished"] else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if is_main and run_id:
            _end_run(config, run_id, status)
    if not outcome["is_finished"]:
        raise KeyboardInterrupt
    return outcome


def launch(
    worker: Callable[..., Outcome], config: Config, where: LaunchConfig, title: str, *, works_alone: bool = False
) -> Outcome:
    """Run a worker where its configuration says, with a progress bar, and return its outcome.

    A worker that works alone, without other ranks (an evaluation, a drawing), starts faster on Ray.
    """
    with TrainingBar(title) if is_main_process() else nullcontext(partial(_show_alarm, title)) as bar:
        if where.where is Where.HERE:
            with stop_request() as should_stop:
                return run_here(worker, config, bar, should_stop)
        # Optional: a machine without Ray works with --launch.where here.
        from ldm.training.launch import run_alone_on_ray, run_on_ray

        with ray_session(), terminated_like_interrupted():
            if works_alone:
                return run_alone_on_ray(worker, config, where, bar)
            return run_on_ray(worker, config, where, title, bar)


def _show_alarm(title: str, progress: Progress) -> None:
    """Show what a process of torchrun's that has no bar must say."""
    print(f"{title}: {progress.notice}", file=sys.stderr)


def _open_run(config: TrainingConfig, title: str, data: Manifest, data_uri: str) -> str:
    if not config.tracking.uri:
        return ""
    # Optional: a machine without MLflow trains with --tracking.uri "".
    from ldm.training.tracking import DataInput, log_file, log_inputs, open_run

    run_id = open_run(config.tracking, config.record, title, config.flat(), code_version())
    if run_id:
        rows = {split.value: data.num_rows(split) for split in Split}
        given = DataInput(name=data.kind, uri=data_uri, digest=data.digest, context="training", profile=rows)
        try:
            log_inputs(config.tracking.uri, run_id, [given])
            log_file(config.tracking.uri, run_id, storage.join(config.record, CONFIG_FILE))
        except MirrorError as error:
            logger.warning("%s", error)
    return run_id


def _end_run(config: TrainingConfig, run_id: str, status: str) -> None:
    from ldm.training.tracking import end_run

    end_run(config.tracking.uri, run_id, status)
