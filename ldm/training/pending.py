"""A checkpoint that is not published yet: what each process writes of it, and the thread that does so meanwhile."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ldm import storage
from ldm.training.snapshot import Snapshot
from ldm.training.state import TrainState

Made = TypeVar("Made")
Parts = Mapping[str, Snapshot]
"""The parts of a run, by the folders that they get in a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a process wrote of a checkpoint.

    Attributes:
        digests: of its files, by their paths in the checkpoint.
        seconds: that it took.
    """

    digests: dict[str, str]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A checkpoint that is being written in the background.

    Attributes:
        state: of the run when its copy was taken.
        is_kept: whether it stays for good.
        writing: what this process writes of it.
        taking_seconds: that the copy took.
    """

    state: TrainState
    is_kept: bool
    writing: Future[Written]
    taking_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A checkpoint that was written in the background and counts from now on.

    Attributes:
        samples_seen: of its state.
        stall_seconds: for which training stood still, to take the copy and to publish it.
        background_seconds: that the slowest process wrote for.
    """

    samples_seen: int
    stall_seconds: float
    background_seconds: float


def write_parts(parts: Parts, target: str) -> Written:
    """Write a process's parts into a folder, which may be remote, without a word to the other processes."""
    started = time.monotonic()
    if storage.is_local(target):
        digests = _write_local(parts, Path(target))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            digests = _write_local(parts, Path(scratch))
            for path in digests:
                storage.copy_file(str(Path(scratch, path)), storage.join(target, path))
    return Written(digests=digests, seconds=time.monotonic() - started)


def in_thread(call: Callable[[], Made]) -> Future[Made]:
    """Run a call in a thread of its own."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    made = thread.submit(call)
    thread.shutdown(wait=False)  # it ends with its call
    return made


def _write_local(parts: Parts, folder: Path) -> dict[str, str]:
    """Write down to the disk, and return the files' digests by path."""
    digests = {}
    for part, snapshot in parts.items():
        snapshot.write(folder / part)
        for name in snapshot.files:
            digests[f"{part}/{name}"] = storage.sha256_of(str(folder / part / name))
            storage.synchronise_file(folder / part / name)
    return digests
