"""A training's attempts while it runs: begun by its driver, told by its workers, ended with it, sent to MLflow.

Order: the driver writes the attempt down → each worker's first word is where it runs → progress moves the attempt on →
the driver's end, whatever it is, ends it. Workers that Ray starts again say their first word again: the next attempt.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import torch

from jobs.wiring.provenance import Provenance
from ldm import storage
from ldm.config import Config
from ldm.training.attempts import Attempt, Status, begin_attempt, keep_attempt
from ldm.training.local_launch import Outcome
from ldm.training.loop import Progress
from ldm.training.page import CONFIG_FILE
from ldm.training.record import MirrorError
from ldm.training.world import World

logger = logging.getLogger(__name__)
MAX_WHY_CHARS = 1_000


def introduced(
    config: Config,
    world: World,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    *,
    worker: Callable[..., Outcome],
    run_id: str,
) -> Outcome:
    """Run a training's worker after a first word on where its ranks run."""
    report(Progress(done=0, total=0, facts=whereabouts(world)))
    return worker(config, world, report, should_stop, run_id=run_id)


def whereabouts(world: World) -> dict[str, str]:
    """Return the hosts and devices of all ranks; all processes call it together."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    hosts, devices = zip(*world.gather((platform.node(), device)), strict=True)
    return {
        "host": ", ".join(dict.fromkeys(hosts)),
        "ranks": str(world.size),
        "device": ", ".join(dict.fromkeys(devices)),
    }


class AttemptKeeper:
    """Keeps the attempts of one start of a training; its block is the training, and it is called with the progress.

    Args:
        record: local folder of the run's record, which holds the resolved configuration.
        made_with: code and packages.
        uri: MLflow's; empty for none.
        run_id: the training's run there; empty while MLflow can't be reached.
    """

    def __init__(self, record: str, made_with: Provenance, uri: str, run_id: str) -> None:
        self._record = record
        self._made_with = made_with
        self._uri = uri
        self._run_id = run_id
        self._attempt: Attempt | None = None
        self._has_workers = False
        self._last_notice = ""
        self._is_reached = bool(run_id)

    @property
    def _current(self) -> Attempt:
        assert self._attempt is not None, "an attempt begins with the block"
        return self._attempt

    def __enter__(self) -> AttemptKeeper:
        """Begin an attempt, and bring what the run's page says to MLflow."""
        self._begin()
        self._send(is_whole_page=True)
        return self

    def __call__(self, progress: Progress) -> None:
        """Take in what the training reports."""
        self._last_notice = progress.notice or self._last_notice
        if progress.facts:
            self._meet_workers(progress.facts)
        if progress.total:
            is_first = self._current.samples_at_start is None
            self._keep(self._current.heard(_now_ms(), progress.done))
            if is_first and self._is_reached:
                self._send()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the attempt as the training ended."""
        status, why = ending(error)
        self._keep(self._current.ended(_now_ms(), status, why))
        self._send()
        if self._run_id:
            from ldm.training.tracking import end_run

            end_run(self._uri, self._run_id, status.value)

    def _begin(self) -> None:
        config = storage.read_bytes(storage.join(self._record, CONFIG_FILE))
        files = {CONFIG_FILE: config, **self._made_with.files}
        self._attempt = begin_attempt(self._record, self._made_with.tags, files, _now_ms())

    def _meet_workers(self, facts: dict[str, str]) -> None:
        if self._has_workers:
            heard = f"; heard last: {self._last_notice}" if self._last_notice else ""
            why = f"a worker died, and Ray started all of them again{heard}"[:MAX_WHY_CHARS]
            self._keep(self._current.ended(self._current.heard_ms, Status.KILLED, why))
            self._begin()
        self._has_workers = True
        self._keep(replace(self._current, tags={**self._current.tags, **facts}))

    def _keep(self, attempt: Attempt) -> None:
        self._attempt = attempt
        try:
            keep_attempt(self._record, attempt)
        except OSError as error:  # a record must not end a training, nor hide why one ended
            logger.warning("the attempt can't be kept in %s: %s", self._record, error)

    def _send(self, *, is_whole_page: bool = False) -> None:
        if not self._run_id:
            return
        # Optional: a machine without MLflow keeps the local record.
        from ldm.training.tracked_page import send_attempts, send_page

        try:
            (send_page if is_whole_page else send_attempts)(self._uri, self._run_id, self._record)
            self._is_reached = True
        except MirrorError as error:
            self._is_reached = False
            logger.warning("%s; what it lacks is kept in %s, for jobs.replay_record", error, self._record)


def ending(error: BaseException | None) -> tuple[Status, str]:
    """Return how and why a training ended, by what ended it."""
    if error is None:
        return Status.FINISHED, "it came to its end"
    if isinstance(error, KeyboardInterrupt):
        return Status.KILLED, "it was asked to stop, by Ctrl-C or SIGTERM"
    return Status.FAILED, f"{type(error).__name__}: {error}"[:MAX_WHY_CHARS]


def _now_ms() -> int:
    return int(time.time() * 1000)
