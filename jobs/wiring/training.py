"""What both trainings do around their worker: check the output, open the MLflow run, keep an attempt, launch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from jobs.session import TrainingBar, is_main_process, ray_session, stop_request, terminated_like_interrupted
from jobs.wiring.attempts import AttemptKeeper, introduced
from jobs.wiring.initial_model import InitialModel, initial_inputs
from jobs.wiring.provenance import provenance
from jobs.wiring.recording import save_run_config
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import TrainLdmConfig
from ldm import storage
from ldm.config import Config
from ldm.training.attempts import read_attempts
from ldm.training.local_launch import LaunchConfig, Outcome, Where, ignore, run_here
from ldm.training.loop import Progress
from ldm.training.memory import FP32, MOMENTS
from ldm.training.page import DataInput, write_inputs
from pipeline.store.manifest import Manifest
from pipeline.store.schema import Split

TrainingConfig = TrainAutoencoderConfig | TrainLdmConfig


def run_training(
    config: TrainingConfig,
    worker: Callable[..., Outcome],
    *,
    title: str,
    num_parameters: int,
    data: Manifest,
    data_uri: str,
    repeats: str = "",
    initial: InitialModel | None = None,
) -> Outcome:
    """Run a training to its end, or until it is asked to stop, and return its outcome.

    Args:
        config: the whole configuration.
        worker: what every process of it runs.
        title: its name in MLflow and on the terminal.
        num_parameters: how many weights a checkpoint holds.
        data: manifest of what it is trained on.
        data_uri: where that lies.
        repeats: id of the MLflow run that it repeats; empty for none.
        initial: the model that it begins with, if it does.

    Raises:
        KeyboardInterrupt: after a stop that was asked for; the state is saved.
        ValueError: for what a person can fix.
    """
    run_id = ""
    keeper: AttemptKeeper | None = None
    if is_main_process():
        # One more than stay: the next is written before the oldest goes.
        num_checkpoints = config.loop.keep_checkpoints + 1 + config.loop.num_kept_for_good
        bytes_per_weight = FP32 + MOMENTS + FP32 * len(config.ema.half_lives)
        storage.check_writable(config.root, num_checkpoints * num_parameters * bytes_per_weight)
        storage.check_writable(config.record)
        save_run_config(config, config.root)
        save_run_config(config, config.record)
        write_inputs(config.record, inputs_of(data, data_uri, initial))
        made_with = provenance()
        begun = read_attempts(config.record)  # a run that can be made only now is still the one that began then
        tags = begun[0].tags if begun else made_with.tags
        run_id = _open_run(config, title, {**tags, **({"repeats": repeats} if repeats else {})})
        if run_id:
            print(f"MLflow    run {run_id} at {config.tracking.uri}: --from-run repeats it")
        keeper = AttemptKeeper(config.record, made_with, config.tracking.uri, run_id)
    with keeper or nullcontext(ignore) as watch:
        outcome = launch(partial(introduced, worker=worker, run_id=run_id), config, config.launch, title, watch=watch)
        if not outcome["is_finished"]:
            raise KeyboardInterrupt
    return outcome


def inputs_of(data: Manifest, uri: str, initial: InitialModel | None = None) -> list[DataInput]:
    """Return what a training is fed, with digests: the folder that it reads, what that was made from, and a model."""
    rows = {split.value: data.num_rows(split) for split in Split}
    given = DataInput(name=data.kind, uri=uri, digest=data.digest, context="training", profile=rows)
    if "dataset" not in data.summary:
        return [given, *initial_inputs(initial)]
    digest = str(data.summary["dataset"])  # latents know their dataset by its digest alone
    source = DataInput(name="dataset", uri=uri, digest=digest, context=f"source of {data.kind}", profile={})
    return [given, source, *initial_inputs(initial)]


def launch(
    worker: Callable[..., Outcome],
    config: Config,
    where: LaunchConfig,
    title: str,
    *,
    works_alone: bool = False,
    watch: Callable[[Progress], None] = ignore,
) -> Outcome:
    """Run a worker where its configuration says, with a progress bar, and return its outcome.

    A worker that works alone, without other ranks (an evaluation, a drawing), starts faster on Ray. Whoever else
    watches is told of all progress before the bar is.
    """
    with TrainingBar(title) if is_main_process() else nullcontext(partial(_show_alarm, title)) as bar:

        def tell(progress: Progress) -> None:
            watch(progress)
            bar(progress)

        if where.where is Where.HERE:
            with stop_request() as should_stop:
                return run_here(worker, config, tell, should_stop)
        # Optional: a machine without Ray works with --launch.where here.
        from ldm.training.launch import run_alone_on_ray, run_on_ray

        with ray_session(), terminated_like_interrupted():
            if works_alone:
                return run_alone_on_ray(worker, config, where, tell)
            return run_on_ray(worker, config, where, title, tell)


def _show_alarm(title: str, progress: Progress) -> None:
    """Show what a process of torchrun's that has no bar must say."""
    print(f"{title}: {progress.notice}", file=sys.stderr)


def _open_run(config: TrainingConfig, title: str, tags: dict[str, str]) -> str:
    if not config.tracking.uri:
        return ""
    # Optional: a machine without MLflow trains with --tracking.uri "".
    from ldm.training.tracking import open_run

    return open_run(config.tracking, config.record, title, config.flat(), tags)
