"""Copies of remote shards on this machine: whole or not there, shared by its processes, held below a limit of bytes.

A shard is a folder of its files. Order: hold the folder (shared lock) → make room: under the lock of the whole cache,
folders that nobody holds are deleted, the longest unused first, and the files to come take up their full length → each
file is streamed into its partial (exclusive lock), digested on the way, tried again if it is not what it should be →
flush, rename. A process that finds a partial locked waits for it instead of downloading the file too.
Locks are flock(2)'s, so each ends with its process however that ends: what a killed process held may be deleted, and
its partials are taken over or removed by the next one. A lock is good only if its file still has its name, since
whoever held it before may have deleted or renamed it: all locking looks again after it waited.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ldm.storage import TransferError, read_chunks
from pipeline.store.manifest import FileRecord

NUM_ATTEMPTS = 4
"""Times that a file is downloaded before it is refused."""
FIRST_PAUSE_SECONDS = 0.5
"""Before the second attempt; doubled before each further one."""
ROOM_SECONDS = 120.0
"""How long room is waited for that other processes take up."""
POLL_SECONDS = 0.05
PARTIAL = ".partial"
LOCK_NAME = ".lock"
SHARD_NAME = re.compile(r".+-[0-9a-f]{16}")
"""What the folders of shards are called; nothing else is ever deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedFile:
    """A remote file and where its copy lies.

    Attributes:
        source: URL of the file.
        target: local path of the copy; the folder is its shard's alone.
        record: size and digest that it must have.
    """

    source: str
    target: Path
    record: FileRecord

    @property
    def partial(self) -> Path:
        """Where the copy lies before it is whole."""
        return self.target.with_name(f".{self.target.name}{PARTIAL}")

    @property
    def is_there(self) -> bool:
        """Whether the copy is whole: it got its name only then."""
        with suppress(FileNotFoundError):
            return self.target.stat().st_size == self.record.num_bytes
        return False


class Hold:
    """A shard's folder in the cache, not deleted by anybody until `close`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Let the folder be deleted when room is needed; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class ShardCache:
    """A folder of copies with a limit of bytes; any number of processes may use one folder."""

    def __init__(self, folder: Path, limit_bytes: int = 0) -> None:
        """Make the folder and remove the partials of dead processes; `limit_bytes` 0 is no limit."""
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)
        for shard in self._shard_folders():
            _bytes_of(shard)

    def hold(self, files: Sequence[CachedFile], *, is_needed: bool = True) -> Hold | None:
        """Return a hold of one shard's files, which are there and whole; download what is missing.

        Args:
            files: all in one folder.
            is_needed: whether to wait for room; if not, and there is none, nothing is done and None returned.

        Raises:
            ValueError: if what came was wrong at every attempt, or others hold so much that there is no room.
            TransferError: if the source broke off at every attempt.
        """
        folder = files[0].target.parent
        with ExitStack() as undo:
            hold = Hold(_held(folder))
            undo.callback(hold.close)
            while missing := [file for file in files if not file.is_there]:
                with ExitStack() as ended:
                    mine = self._reserved(missing, is_needed, ended)
                    if mine is None:
                        return None
                    for file, descriptor in mine:
                        _download(file, descriptor)
                if not mine:
                    _await(missing[0].partial)
            os.utime(folder)
            undo.pop_all()
        return hold

    def _reserved(
        self, missing: Sequence[CachedFile], is_needed: bool, ended: ExitStack
    ) -> list[tuple[CachedFile, int]] | None:
        """Return the locked partials of the files that no other process is downloading, each of full length.

        Returns None if there is no room and it is not needed. When `ended` ends, so do the partials.
        """
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            with self._accounting(), ExitStack() as undo:
                mine = [(file, number) for file in missing if (number := _locked_partial(file, undo)) is not None]
                shortage = self._shortage(mine)
                if shortage <= 0 or self._evict(shortage):
                    for file, number in mine:
                        os.ftruncate(number, file.record.num_bytes)
                    ended.enter_context(undo.pop_all())
                    return mine
            if not is_needed:
                return None
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.folder} may hold {self.limit_bytes:,} bytes (cache_bytes), and what its processes use now "
                    f"is {shortage:,} too many: the limit is for all processes of this machine together"
                )
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _accounting(self) -> Iterator[None]:
        """Keep all other processes with a limit from making room or taking it up."""
        if not self.limit_bytes:
            yield
            return
        descriptor = os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _shortage(self, mine: Sequence[tuple[CachedFile, int]]) -> int:
        """Return how many bytes must go before the partials `mine` may have their full length."""
        if not self.limit_bytes or not mine:
            return 0
        there = sum(_bytes_of(folder) for folder in self._shard_folders())
        reserved_before = sum(os.fstat(number).st_size for _, number in mine)
        return there - reserved_before + sum(file.record.num_bytes for file, _ in mine) - self.limit_bytes

    def _evict(self, shortage: int) -> bool:
        """Delete folders that nobody holds, the longest unused first; delete none if that is not enough."""
        freed = 0
        with ExitStack() as locks:
            chosen = []
            for folder in sorted(self._shard_folders(), key=_last_use):
                descriptor = _locked(folder, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if descriptor is None:
                    continue
                locks.callback(os.close, descriptor)
                chosen.append(folder)
                freed += _bytes_of(folder)
                if freed >= shortage:
                    for old in chosen:
                        _delete(old)
                    return True
        return False

    def _shard_folders(self) -> list[Path]:
        """Return the folders of all shards, of all splits and roots."""
        splits = [Path(entry.path) for entry in os.scandir(self.folder) if entry.is_dir()]
        inside = [Path(entry.path) for split in splits for entry in os.scandir(split) if entry.is_dir()]
        return [folder for folder in inside if SHARD_NAME.fullmatch(folder.name)]


def _held(folder: Path) -> int:
    """Return a descriptor with a shared lock of a folder, which is made if need be."""
    while True:
        with suppress(FileNotFoundError, FileExistsError):  # deleted in between, also between mkdir's own two looks
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(folder, os.O_RDONLY, fcntl.LOCK_SH)
            assert descriptor is not None
            return descriptor


def _locked(path: Path, flags: int, operation: int) -> int | None:
    """Return a descriptor that holds the lock of what has this name, or None if it would have to be waited for."""
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _has_name(descriptor, path):
            return descriptor
        os.close(descriptor)


def _has_name(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _locked_partial(file: CachedFile, ended: ExitStack) -> int | None:
    """Return the locked partial of a file, closed and deleted when `ended` ends; None if it is not ours to download."""
    descriptor = _locked(file.partial, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is None:
        return None
    ended.callback(_end_partial, file.partial, descriptor)
    return None if file.is_there else descriptor


def _end_partial(path: Path, descriptor: int) -> None:
    """Close a partial; delete it first if it has not become the file."""
    if _has_name(descriptor, path):
        path.unlink()
    os.close(descriptor)


def _await(partial: Path) -> None:
    """Wait until whoever downloads a file has ended, well or not."""
    with suppress(FileNotFoundError):
        descriptor = os.open(partial, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)


def _bytes_of(folder: Path) -> int:
    """Return the bytes of a shard's files and of partials that are being downloaded; delete the others' partials."""
    num_bytes = 0
    with suppress(FileNotFoundError):  # deleted meanwhile
        for name in os.listdir(folder):
            path = folder / name
            try:
                ownerless = None
                if name.endswith(PARTIAL):
                    ownerless = _locked(path, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if ownerless is None:
                    num_bytes += path.stat().st_size
                else:
                    _end_partial(path, ownerless)
            except FileNotFoundError:  # it became whole, and has its name now
                num_bytes += _size_of(folder / name.removeprefix(".").removesuffix(PARTIAL))
    return num_bytes


def _size_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _last_use(folder: Path) -> int:
    with suppress(FileNotFoundError):
        return folder.stat().st_mtime_ns
    return 0


def _delete(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _download(file: CachedFile, descriptor: int) -> None:
    """Fill a locked partial and give it the file's name.

    Raises:
        ValueError: if what came was wrong at every attempt, naming file, digests and attempts.
        TransferError: if the source broke off at the last attempt.
    """
    for attempt in range(NUM_ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        is_last = attempt + 1 == NUM_ATTEMPTS
        try:
            num_bytes, sha256 = _fill(file, descriptor)
        except TransferError as error:
            if is_last:
                raise TransferError(f"{error} ({NUM_ATTEMPTS} attempts)") from error
            continue
        if FileRecord(num_bytes, sha256) == file.record:
            os.fsync(descriptor)
            file.partial.replace(file.target)
            return
    raise ValueError(
        f"{file.source} has sha256 {sha256}, the manifest says {file.record.sha256}: "
        f"{num_bytes:,} bytes came of {file.record.num_bytes:,} ({NUM_ATTEMPTS} attempts)"
    )


def _fill(file: CachedFile, descriptor: int) -> tuple[int, str]:
    """Stream the source into a partial and return how many bytes came and their sha256; never write more than due."""
    digest, num_bytes = hashlib.sha256(), 0
    os.lseek(descriptor, 0, os.SEEK_SET)
    for chunk in read_chunks(file.source):
        digest.update(chunk)
        num_bytes += len(chunk)
        if num_bytes > file.record.num_bytes:
            break
        left = memoryview(chunk)
        while left:
            left = left[os.write(descriptor, left) :]
    return num_bytes, digest.hexdigest()
