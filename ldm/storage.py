"""Files anywhere fsspec reaches (local, `s3://`, `https://`), published whole or not at all.

Order of a write: temporary name beside the target → flush to disk → rename. On object stores an upload is visible only
when it is complete, which is the same promise.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
from aiohttp import ClientError
from botocore.exceptions import BotoCoreError
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

CHUNK_BYTES = 1 << 20
STREAM_BLOCK_BYTES = 8 << 20
"""Asked for at once where a remote file is streamed; s3fs by itself asks for 50 MiB and holds as much."""
# s3fs remembers listings, and then neither sees what other processes wrote nor that they replaced a file.
UNCACHED = {"use_listings_cache": False}
# A store under load answers 503 and drops connections: botocore then waits a little longer each time, at random.
PATIENT = {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 10}}}
NUM_ATTEMPTS = 4
"""Times that `download` asks for a file."""
FIRST_PAUSE_SECONDS = 0.5
"""Before its second attempt; doubled before each further one."""
STATE_FACTS = ("size", "ETag", "LastModified", "Last-Modified", "mtime", "created")
"""What file systems say of a file that changes with its content; each says some of it."""
WEB = ("http://", "https://")
OBJECT_STORES = ("s3://", "s3a://")


PLACE_ERRORS = (OSError, ClientError, BotoCoreError)
"""What a place raises that can't be read or written; a store's own errors are no OSErrors."""


class TransferError(OSError):
    """A place did not answer, or broke off in the middle of a file."""


def join(root: str, *parts: str) -> str:
    """Return `root/part/...` for a local path or a URL."""
    return "/".join([root.rstrip("/"), *parts])


def exists(path: str) -> bool:
    """Say whether a file or folder is there."""
    system, inner = located(path)
    if not path.startswith(WEB):
        return bool(system.exists(inner))
    try:  # fsspec's own `exists` asks a web server for the whole file, and hangs up when that begins to come
        return bool(system.info(inner))
    except FileNotFoundError:
        return False


def is_local(path: str) -> bool:
    """Say whether `path` lies on this machine's own file system."""
    return isinstance(located(path)[0], LocalFileSystem)


def is_same_place(one: str, other: str) -> bool:
    """Say whether two addresses name one folder or file: by relative paths and links too."""
    if is_local(one) and is_local(other):
        first, second = (Path(located(str(path))[1]).expanduser().resolve() for path in (one, other))
        return first == second
    return one.rstrip("/") == other.rstrip("/")


def read_bytes(path: str) -> bytes:
    """Return the whole content of a file.

    Raises:
        FileNotFoundError: if there is none.
    """
    with _opened(path) as file:
        content: bytes = file.read()
    return content


def read_range(path: str, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of a file."""
    with _opened(path) as file:
        file.seek(start)
        content: bytes = file.read(stop - start)
    return content


def read_chunks(path: str) -> Iterator[bytes]:
    """Yield a file's bytes in chunks, of which only a few are in memory.

    Raises:
        FileNotFoundError: if there is none.
        PermissionError: if it may not be read.
        TransferError: if its place does not answer or breaks off.
    """
    try:
        system, inner = located(path)
        with system.open(inner, "rb", block_size=STREAM_BLOCK_BYTES) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (FileNotFoundError, PermissionError):
        raise
    except PLACE_ERRORS as error:
        raise TransferError(f"{path} did not come: {type(error).__name__} {error}") from error


def read_text(path: str) -> str:
    """Return the whole content of a UTF-8 file."""
    return read_bytes(path).decode()


def list_names(folder: str) -> list[str]:
    """Return the sorted names inside a folder; an absent folder is empty."""
    system, inner = located(folder)
    if not system.exists(inner):
        return []
    # A store may list the folder's own marker, `folder/`, beside what lies in it.
    inside = [path.rstrip("/") for path in system.ls(inner, detail=False) if path.rstrip("/") != inner.rstrip("/")]
    return sorted(path.rsplit("/", 1)[-1] for path in inside)


def write_bytes(path: str, content: bytes) -> None:
    """Publish `content` under `path`, atomically."""
    with open_atomic(path) as file:
        file.write(content)


def write_text(path: str, content: str) -> None:
    """Publish UTF-8 text under `path`, atomically."""
    write_bytes(path, content.encode())


@contextmanager
def open_atomic(path: str) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes the name `path` only when the block ends without an error."""
    system, inner = located(path)
    if not isinstance(system, LocalFileSystem):
        # An upload stream that is closed by an error would publish what it had; a whole local file can't.
        with tempfile.NamedTemporaryFile() as spool:
            yield spool
            spool.flush()
            system.put_file(spool.name, inner)
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: str) -> int:
    """Delete what interrupted writers left in a local folder; return how many files that were."""
    system, inner = located(folder)
    if not isinstance(system, LocalFileSystem) or not Path(inner).is_dir():
        return 0
    leftovers = [path for path in Path(inner).rglob(".*.partial") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def sha256_of(path: str) -> str:
    """Return the sha256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with _opened(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(folder: str, needed_bytes: int = 0) -> None:
    """Refuse, before any work, an output folder that cannot take the result.

    Raises:
        ValueError: if the folder cannot be written, or its disk has less than `needed_bytes` free.
    """
    system, inner = located(folder)
    try:
        probe = join(folder, f".probe-{uuid.uuid4().hex[:8]}")
        write_bytes(probe, b"probe")
        system.rm(located(probe)[1])
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error}") from error
    free = free_bytes(folder)
    if free is not None and free < needed_bytes:
        raise ValueError(f"{folder} needs about {needed_bytes / 1e6:,.1f} MB free, its disk has {free / 1e6:,.1f} MB")


def free_bytes(folder: str) -> int | None:
    """Return what is free on the disk of a folder that is there; None where nobody can tell."""
    system, inner = located(folder)
    return shutil.disk_usage(inner).free if isinstance(system, LocalFileSystem) else None


def folder_bytes(folder: str) -> int:
    """Return the bytes of all files below a folder together."""
    system, inner = located(folder)
    return int(sum(system.sizes(system.find(inner))))


def copy_file(source: str, target: str) -> None:
    """Publish a copy of a file, atomically, streamed in chunks."""
    with _opened(source) as reader, open_atomic(target) as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)


def local_copy(url: str, folder: str) -> str:
    """Return a local path of a file: itself, or a copy below `folder` that is made once for each state of the file.

    Processes of one machine wait for each other, so that only the first one copies. Nothing deletes old copies.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    system, inner = located(url)
    if isinstance(system, LocalFileSystem):
        return inner
    facts = system.info(inner)
    state = [url, *(str(facts.get(name)) for name in STATE_FACTS)]
    copy = Path(folder, hashlib.sha256("\n".join(state).encode()).hexdigest()[:32], Path(urlsplit(inner).path).name)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with copy.with_name(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists():
            copy_file(url, str(copy))
    return str(copy)


def list_files(folder: str) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to it."""
    system, inner = located(folder)
    if not system.exists(inner):
        return []
    prefix = inner.rstrip("/") + "/"
    return sorted(path.removeprefix(prefix) for path in system.find(inner))


def download(source: str, target: Path, sha256: str) -> bool:
    """Copy a remote file to a local path, again where the transfer fails, and say whether its digest is the given one.

    What comes wrong is asked for once more too: only what comes wrong every time was stored wrong.

    Raises:
        TransferError: if the source broke off at the last attempt.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(NUM_ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        digest = hashlib.sha256()
        try:
            with target.open("wb") as file:
                for chunk in read_chunks(source):
                    digest.update(chunk)
                    file.write(chunk)
        except TransferError as error:
            if attempt + 1 == NUM_ATTEMPTS:
                raise TransferError(f"{error} ({NUM_ATTEMPTS} attempts)") from error
            continue
        if digest.hexdigest() == sha256:
            return True
    return False


def synchronise(folder: Path) -> None:
    """Wait until all files of a local folder are on its disk."""
    for path in [*folder.rglob("*"), folder]:
        synchronise_file(path)


def synchronise_file(path: Path) -> None:
    """Wait until a local file, or a folder's list of names, is on its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: str) -> None:
    """Delete a file if it is there."""
    system, inner = located(path)
    if system.exists(inner):
        system.rm(inner)


def remove_folder(path: str) -> None:
    """Delete a folder and what lies in it."""
    system, inner = located(path)
    system.rm(inner, recursive=True)


def located(path: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system that a path lies on, and its name there; listings are not remembered."""
    system, inner = url_to_fs(path, **_options(path))
    return system, inner


def _opened(path: str) -> fsspec.core.OpenFile:
    return fsspec.open(path, "rb", **_options(path))


def _options(path: str) -> dict[str, Any]:
    return UNCACHED | PATIENT if path.startswith(OBJECT_STORES) else UNCACHED
