"""The record of a run: numbers and pictures in a local folder, whatever else may be down.

`record.jsonl` holds one entry a line, `pictures/` the grids. A mirror (MLflow) is sent each entry after it is on disk;
`sent` counts those that arrived. When the mirror fails, the run goes on, says so loudly, and a replay sends the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image as PILImage

from ldm import storage
from ldm.training.full_disk import FullDiskError, is_full
from ldm.types import Image

RECORD_FILE = "record.jsonl"
SENT_FILE = "sent"


class Tracker(Protocol):
    """Where numbers and pictures go."""

    def log_metrics(self, metrics: Mapping[str, float], samples_seen: int) -> None:
        """Record metrics at a time of the clock."""
        ...

    def log_picture(self, name: str, images: Image, samples_seen: int) -> None:
        """Record a grid of images, shape (b, 3, y, x) in [-1, 1]."""
        ...


class Mirror(Protocol):
    """A place that entries of a record are copied to."""

    def send(self, folder: Path, entry: Mapping[str, Any]) -> None:
        """Copy one entry.

        Raises:
            MirrorError: if the place can't be reached.
        """
        ...


class MirrorError(OSError):
    """A mirror could not be reached."""


class SilentTracker:
    """The tracker of the processes that record nothing."""

    def log_metrics(self, metrics: Mapping[str, float], samples_seen: int) -> None:
        """Ignore the metrics; the main process records them."""

    def log_picture(self, name: str, images: Image, samples_seen: int) -> None:
        """Ignore the picture; the main process records it."""


class Record:
    """The record of one run on disk.

    Args:
        folder: local folder of the record.
        mirror: where entries are copied to, or None.
        notify: called with a sentence that a person must see, when the mirror fails.
    """

    def __init__(self, folder: str, mirror: Mirror | None, notify: Callable[[str], None]) -> None:
        self._folder = Path(folder)
        with self._room():
            self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / RECORD_FILE
        self._mirror = mirror
        self._notify = notify
        if self._file.is_file() and not self._file.read_bytes().endswith(b"\n"):
            with self._room(), self._file.open("a") as file:  # what a killed writer left of its last line ends here
                file.write("\n")

    def log_metrics(self, metrics: Mapping[str, float], samples_seen: int) -> None:
        """Record metrics at a time of the clock."""
        now = int(time.time() * 1000)
        self._append({"metrics": dict(metrics), "samples_seen": samples_seen, "time_ms": now})

    def log_picture(self, name: str, images: Image, samples_seen: int) -> None:
        """Save a grid as PNG and record where it lies."""
        path = self._folder / "pictures" / f"{name}_{samples_seen:09d}.png"
        with self._room():
            path.parent.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(grid_of(images)).save(path)
        self._append({"picture": str(path.relative_to(self._folder)), "samples_seen": samples_seen})

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            raise FullDiskError(
                f"{self._folder} took no more of the record ({error}): make room and start the same command again; it "
                "goes on from the latest checkpoint"
            ) from error

    def _append(self, entry: dict[str, Any]) -> None:
        with self._room(), self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self._mirror is None:
            return
        try:
            with self._room():
                send_pending(self._folder, self._mirror)
        except MirrorError as error:
            self._mirror = None
            self._notify(str(error))


def send_pending(folder: Path, mirror: Mirror) -> int:
    """Send the entries that have not arrived yet and return how many those were."""
    mark = folder / SENT_FILE
    first = int(mark.read_text()) if mark.is_file() else 0
    sent = 0
    for number, entry in _entries(folder / RECORD_FILE, first):
        if entry is not None:
            mirror.send(folder, entry)
            sent += 1
        storage.write_text(str(mark), str(number + 1))
    return sent


def forget_sent(folder: str) -> None:
    """Let the next sending begin anew: the record goes to another run."""
    (Path(folder) / SENT_FILE).unlink(missing_ok=True)


def grid_of(images: Image, columns: int = 0, gap: int = 2) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return one uint8 picture (rows, columns, 3) of a batch in [-1, 1], white gaps between."""
    batch = (
        ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    count, height, width, _ = batch.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(batch):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def _entries(record: Path, start: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (line number, entry) from a line on; None stands for a line that a killed writer left torn."""
    with record.open() as file:
        for number, line in enumerate(file):
            if number >= start and line.endswith("\n"):
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError:
                    yield number, None
