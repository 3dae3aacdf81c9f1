"""Checkpoints: the state to resume, published whole, verified on load, bound to the run that made it.

Order of a save: every process writes its files beside the target → their digests are gathered → the main process writes
`state.json` with them, renames the folder and writes `latest` last → older ones beyond the last N are removed, but for
those that hold a file `keep`: the loop leaves one in every K-th sample's, and a person may in any. In the background, a
copy of the state is taken first, a thread of each process writes from it, and the rest is done when all have written.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.training.full_disk import FullDiskError, written_by_all
from ldm.training.pending import Parts, Pending, Published, Written, in_thread, write_parts
from ldm.training.saved_state import Resumable
from ldm.training.snapshot import HostMemory
from ldm.training.state import TrainState
from ldm.training.world import World

logger = logging.getLogger(__name__)
STATE_FILE = "state.json"
LATEST_FILE = "latest"
KEEP_FILE = "keep"
"""A checkpoint's folder that holds a file of this name stays, as long as it is whole."""


class CheckpointStore:
    """The checkpoints of one run under one folder, which may be remote.

    Args:
        root: folder or URL that every process reaches.
        identity: what a state must have been made with to be resumed (configuration, digests of the data).
        keep: how many of the latest stay.
        world: the group of processes.
    """

    def __init__(self, root: str, identity: Mapping[str, Any], keep: int, world: World) -> None:
        self.root = root
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._keep = keep
        self._latest_saved = ""
        self.damaged: list[str] = []
        self._world = world
        self._memory = HostMemory()
        self._pending: Pending | None = None

    def save(
        self,
        engines: Mapping[str, Resumable],
        state: TrainState,
        *,
        is_kept: bool = False,
        in_place_of_latest: bool = False,
    ) -> None:
        """Publish the state; all processes call it together.

        Args:
            engines: the parts of the run, by name.
            state: where it stands.
            is_kept: whether this checkpoint stays for good.
            in_place_of_latest: whether the one before it goes, though it would be among the latest.

        Raises:
            ValueError: in every process, if a disk took no more; the last checkpoint stands.
        """
        self.finish()
        name = _name_of(state)
        if self._world.any(name == self._latest_saved):
            return  # a stop that falls on a checkpoint: the same state is there
        replaced = self.names()[-1:] if in_place_of_latest else []
        self._prepare(name)
        write = partial(write_parts, _parts(engines), self._place_of_parts(name))
        self._publish(write, state, replaced, is_kept=is_kept)

    def begin(self, engines: Mapping[str, Resumable], state: TrainState, *, is_kept: bool = False) -> None:
        """Take a copy of the state and begin to write it in the background; all processes call it together.

        It counts for nothing until `finish`, `save` or another `begin` publishes it.

        Args:
            engines: the parts of the run, by name.
            state: where it stands.
            is_kept: whether this checkpoint stays for good.

        Raises:
            ValueError: in every process, if a disk takes no more; the last checkpoint stands.
        """
        self.finish()
        started = time.monotonic()
        name = _name_of(state)
        if self._world.any(name == self._latest_saved):
            return
        self._prepare(name)
        copies = self._memory.copied(_parts(engines))
        writing = in_thread(partial(write_parts, copies, self._place_of_parts(name)))
        taking_seconds = time.monotonic() - started
        self._pending = Pending(state=state, is_kept=is_kept, writing=writing, taking_seconds=taking_seconds)

    def is_written(self) -> bool:
        """Say whether all processes have written what was begun and not published yet; all call it together."""
        return self._pending is not None and not self._world.any(not self._pending.writing.done())

    def finish(self) -> Published | None:
        """Publish what was begun, once all of it is written; None if there is nothing. All processes call it together.

        Raises:
            ValueError: in every process, if a disk took no more; the last checkpoint stands.
        """
        if self._pending is None:
            return None
        started = time.monotonic()
        pending, self._pending = self._pending, None
        background_seconds = self._publish(pending.writing.result, pending.state, [], is_kept=pending.is_kept)
        return Published(
            samples_seen=pending.state.samples_seen,
            stall_seconds=pending.taking_seconds + time.monotonic() - started,
            background_seconds=background_seconds,
        )

    def abandon(self) -> None:
        """Wait for what this process still writes, and publish none of it: where a training fails, nobody can."""
        if self._pending is not None:
            self._pending.writing.exception()
            self._pending = None

    def _prepare(self, name: str) -> None:
        self._refuse_full_disk()
        if self._world.is_main and storage.is_local(self.root):
            shutil.rmtree(self._partial(name), ignore_errors=True)
            self._partial(name).mkdir(parents=True)
        self._world.barrier()

    def _publish(self, write: Callable[[], Written], state: TrainState, replaced: list[str], *, is_kept: bool) -> float:
        """Publish a checkpoint once `write` has written its parts; return the seconds of the slowest process."""
        name = _name_of(state)
        try:
            written = written_by_all(write, self._world)
            digests = {path: digest for each in written for path, digest in each.digests.items()}
            content = {"state": state.to_dict(), "identity": self._identity, "files": digests}
            written_by_all(partial(self._complete, name, content, is_kept=is_kept), self._world)
            written_by_all(partial(self._point_to, name), self._world)
        except FullDiskError as error:
            raise self._filled_up(name, error) from error
        if self._world.is_main:
            self._forget(replaced)
            self._forget(self.names()[: -self._keep])
        self._latest_saved = name
        self._world.barrier()
        return max(each.seconds for each in written)

    def _complete(self, name: str, content: Mapping[str, Any], *, is_kept: bool) -> None:
        """Write what makes a checkpoint of the parts that all processes have written."""
        if not self._world.is_main:
            return
        folder = self._place_of_parts(name)
        if is_kept:
            storage.write_text(storage.join(folder, KEEP_FILE), "")
        storage.write_text(storage.join(folder, STATE_FILE), json.dumps(content, indent=1, sort_keys=True))
        if storage.is_local(self.root):
            storage.synchronise(Path(folder))  # or the name may outlive a power loss that its files do not
            shutil.rmtree(Path(self.root) / name, ignore_errors=True)
            Path(folder).rename(Path(self.root) / name)

    def _point_to(self, name: str) -> None:
        if self._world.is_main:
            storage.write_text(storage.join(self.root, LATEST_FILE), name)

    def _filled_up(self, name: str, error: FullDiskError) -> ValueError:
        """Take away what was written of a checkpoint, and return what a person can do."""
        place = self.root if storage.is_local(self.root) else tempfile.gettempdir()
        free = shutil.disk_usage(place).free
        if self._world.is_main and storage.is_local(self.root):
            shutil.rmtree(self._partial(name), ignore_errors=True)
        # A store may have got a part of it.
        last = [name for name in self.names() if storage.exists(storage.join(self.root, name, STATE_FILE))][-1:]
        return ValueError(
            f"{place} took no more while the checkpoint of sample {int(name):,} was written ({error}; "
            f"{free / 1e6:,.1f} MB were free): make room and start the same command again; it goes on from "
            + (f"sample {int(last[0]):,}" if last else "the start")
        )

    def _refuse_full_disk(self) -> None:
        """Say what to do while the last checkpoint is still whole; the next one is as large as it was."""
        last = self._world.gather(self.names()[-1:])[0]  # a rank may see another listing for a moment
        free = storage.free_bytes(self.root) if last and self._world.is_main else None
        needed = storage.folder_bytes(storage.join(self.root, last[0])) if free is not None else 0
        if self._world.any(free is not None and free < needed):
            raise ValueError(
                f"{self.root} has no room for another checkpoint ({needed / 1e6:,.1f} MB): make room and start the "
                f"same command again; it goes on from sample {int(last[0]):,}"
            )

    @property
    def latest_samples(self) -> int:
        """Samples seen of the checkpoint that was saved or restored last; 0 without one."""
        return int(self._latest_saved or 0)

    def restore(self, engines: Mapping[str, Resumable], before: int | None = None) -> TrainState | None:
        """Load the latest whole checkpoint into the engines; None if there is none.

        Args:
            engines: the parts of the run, by name.
            before: only checkpoints of fewer samples seen are taken; None takes all.

        Raises:
            ValueError: if it was made with another configuration or other data, naming each difference.
        """
        self.finish()
        self.damaged = []
        names = [name for name in self._world.gather(self.names())[0] if before is None or int(name) < before]
        for name in reversed(names):
            with self._reading(name) as (folder, found):
                problem = next(filter(None, self._world.gather(found)), "")
                if problem:
                    logger.warning("checkpoint %s is not used: %s", storage.join(self.root, name), problem)
                    self.damaged.append(name)
                    continue
                content = json.loads((folder / STATE_FILE).read_text())
                self._refuse_another_run(content["identity"], name)
                for part, engine in engines.items():
                    engine.load(folder / part)
            self._remove_damaged()
            self._latest_saved = name
            return TrainState(**content["state"])
        self._remove_damaged()
        return None

    def _remove_damaged(self) -> None:
        """Take away what can't be used: it would count among the latest, or take up room."""
        self._world.barrier()
        if self._world.is_main:
            for name in self.damaged:
                storage.remove_folder(storage.join(self.root, name))
            for folder in Path(self.root).glob(".*.partial") if storage.is_local(self.root) else ():
                shutil.rmtree(folder, ignore_errors=True)
        self._world.barrier()

    def names(self) -> list[str]:
        """Return the names of the published checkpoints, oldest first."""
        return [name for name in storage.list_names(self.root) if name.isdigit()]

    def latest_state(self) -> TrainState | None:
        """Return where the run stands by its latest checkpoint, without loading weights."""
        for name in reversed(self.names()):
            path = storage.join(self.root, name, STATE_FILE)
            if storage.exists(path) and (content := _content(storage.read_bytes(path))):
                return TrainState(**content["state"])
        return None

    def check_identity(self) -> None:
        """Refuse early, before any process is started, a folder that holds another run.

        Raises:
            ValueError: naming each difference.
        """
        for name in self.names()[-1:]:
            path = storage.join(self.root, name, STATE_FILE)
            if storage.exists(path) and (content := _content(storage.read_bytes(path))):
                self._refuse_another_run(content["identity"], name)

    def _problem_of(self, folder: Path) -> str:
        if not (folder / STATE_FILE).is_file():
            return "it has no state.json"
        if not (content := _content((folder / STATE_FILE).read_bytes())):
            return "its state.json can't be read"
        for path, digest in content["files"].items():
            if not (folder / path).is_file():
                return f"{path} is missing"
            if storage.sha256_of(str(folder / path)) != digest:
                return f"{path} is not the file that was saved (its sha256 differs)"
        return ""

    def _refuse_another_run(self, saved: Mapping[str, Any], name: str) -> None:
        differences = sorted(_differences("", saved, self._identity))
        if differences:
            listed = "\n  ".join(differences)
            raise ValueError(
                f"{storage.join(self.root, name)} is a checkpoint of another run:\n  {listed}\n"
                "Take another --root, or the configuration that it was made with."
            )

    def _partial(self, name: str) -> Path:
        return Path(self.root) / f".{name}.partial"

    def _place_of_parts(self, name: str) -> str:
        """Where a checkpoint's files are written; in a store, where nothing can be renamed, `state.json` comes last."""
        return str(self._partial(name)) if storage.is_local(self.root) else storage.join(self.root, name)

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[Path, str]]:
        """Yield a local folder with what a checkpoint holds, and what is wrong with it; empty for nothing."""
        if storage.is_local(self.root):
            folder = Path(self.root) / name
            yield folder, self._problem_of(folder) if self._world.is_main else ""  # all see the same files
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch), self._downloaded(name, Path(scratch))

    def _downloaded(self, name: str, folder: Path) -> str:
        source = storage.join(self.root, name)
        if not storage.exists(storage.join(source, STATE_FILE)):
            return "it has no state.json"
        text = storage.read_bytes(storage.join(source, STATE_FILE))
        (folder / STATE_FILE).write_bytes(text)
        if not (content := _content(text)):
            return "its state.json can't be read"
        for path, digest in content["files"].items():
            if not storage.exists(storage.join(source, path)):
                return f"{path} is missing"
            if not storage.download(storage.join(source, path), folder / path, digest):
                return f"{path} is not the file that was saved (its sha256 differs)"
        return ""

    def _forget(self, names: list[str]) -> None:
        for name in names:
            if not storage.exists(storage.join(self.root, name, KEEP_FILE)):
                storage.remove_folder(storage.join(self.root, name))


def _name_of(state: TrainState) -> str:
    return f"{state.samples_seen:012d}"


def _parts(engines: Mapping[str, Resumable]) -> Parts:
    return {part: engine.snapshot() for part, engine in engines.items()}


def _content(text: bytes) -> dict[str, Any]:
    """Return what a state.json says; nothing if it was not written whole."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    is_whole = isinstance(content, dict) and {"state", "identity", "files"} <= set(content)
    return content if is_whole else {}


def _differences(where: str, saved: Any, now: Any) -> list[str]:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        names = sorted({*saved, *now})
        return [d for n in names for d in _differences(f"{where}.{n}" if where else n, saved.get(n), now.get(n))]
    return [] if saved == now else [f"{where}: the checkpoint has {saved!r}, this run {now!r}"]
