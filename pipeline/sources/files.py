"""Files of a source, wherever they lie: which there are, a digest of each, and views that read what is asked.

A file is named relative to its folder, or by its whole URL where it was given as one, so a folder may move.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from ldm import storage

NUM_READERS = 16
"""Files looked at at once: on an object store the time of a small read is nearly all waiting."""

EDGE_BYTES = 64 << 10
"""Bytes at either end of a file that its quick digest covers."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFile:
    """A file below a folder.

    Attributes:
        name: its path relative to the folder.
        num_bytes: its size; None for a symbolic link that leads nowhere.
    """

    name: str
    num_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a file lies; its name is never read as a URL's syntax, whatever it holds, unless it is one.

    Attributes:
        folder: a folder or URL; "" where the name is all.
        name: the path below it, or a whole URL.
    """

    folder: str
    name: str

    def located(self) -> tuple[Any, str]:
        """Return the file system and the path in it."""
        if not self.folder or "://" in self.name:
            return storage.located(self.name)
        system, inner = storage.located(self.folder)
        return system, f"{inner.rstrip('/')}/{self.name}"


def check_place(folder: str, files: Sequence[str]) -> None:
    """Refuse a source that says neither a folder nor files, or a file twice.

    Raises:
        ValueError: saying what is wanted.
    """
    if not folder and not files:
        raise ValueError("give a folder that can be listed, or the files one by one")
    if len(set(files)) != len(files):
        raise ValueError(f"files names {next(name for name in files if files.count(name) > 1)} twice")
    if not folder and any("://" not in name and not name.startswith("/") for name in files):
        raise ValueError("files without a folder must be whole paths or URLs")


def names_of_files(folder: str, files: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Return the sorted names of the files to read: those given, else all below the folder that end as asked.

    Names that begin with a dot or an underscore, at any depth, are other programs' business.

    Raises:
        ValueError: if there is none, or a given one ends in another way.
    """
    expected = ", ".join(suffixes)
    for name in files:
        if not name.lower().partition("?")[0].endswith(tuple(suffixes)):
            raise ValueError(f"{name} ends in none of {expected}")
    found = sorted(files) or [
        file.name
        for file in list_folder(folder)
        if file.name.lower().endswith(tuple(suffixes)) and not _is_hidden(file.name)
    ]
    if not found:
        raise ValueError(f"{folder} holds no file that ends in {expected}")
    return found


def list_folder(folder: str) -> list[FoundFile]:
    """Return every file below a folder at any depth, sorted by name.

    Links to files count as files, links to folders are not followed, and pipes and devices are left out.
    """
    system, inner = storage.located(folder)
    if storage.is_local(folder):
        return sorted(_walk(Path(inner)), key=lambda file: file.name)
    if not system.exists(inner):
        return []
    prefix = inner.rstrip("/") + "/"
    listed = system.find(inner, detail=True)
    found = [FoundFile(name=path.removeprefix(prefix), num_bytes=facts["size"]) for path, facts in listed.items()]
    return sorted((file for file in found if file.name), key=lambda file: file.name)


@contextmanager
def open_seekable(place: Place) -> Iterator[IO[bytes]]:
    """Yield a file that reads only the ranges it is asked for; a server that knows no ranges sends it whole once."""
    system, path = place.located()
    with system.open(path, "rb") as file:
        if _knows_ranges(file, path):
            yield file
            return
    with system.open(path, "rb", block_size=0) as stream, tempfile.TemporaryFile() as spool:
        while chunk := stream.read(storage.CHUNK_BYTES):
            spool.write(chunk)
        spool.seek(0)
        yield spool


def _knows_ranges(file: IO[bytes], path: str) -> bool:
    """Say whether a file's last byte can be had alone; all stores but some web servers can give it."""
    if not path.startswith(("http://", "https://")):
        return True
    try:
        file.seek(-1, os.SEEK_END)
        file.read(1)
    except (ValueError, TypeError):  # the server sent all of the file, or did not say how long it is
        return False
    return True


class WatchedFile(io.RawIOBase):
    """Passes reads on and remembers whether one failed: a library's error then tells a broken file from a network."""

    def __init__(self, file: IO[bytes]) -> None:
        """Keep the file."""
        super().__init__()
        self.file = file
        self.error: Exception | None = None

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer."""
        view = memoryview(buffer)
        content = self._passed(self.file.read, len(view))
        view[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        return self._passed(self.file.seek, offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self.file.tell()

    def _passed(self, call: Callable[..., Result], *arguments: int) -> Result:
        try:
            return call(*arguments)
        except Exception as error:
            self.error = error
            raise


def read_range(path: str, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file by one request."""
    system, inner = storage.located(path)
    content: bytes = system.cat_file(inner, start=start, end=stop)
    return content


def read_at_most(place: Place, max_bytes: int) -> bytes | None:
    """Return a file's bytes, or None if there are more than `max_bytes`."""
    system, path = place.located()
    with system.open(path, "rb") as file:
        content: bytes = file.read(max_bytes + 1)
    return content if len(content) <= max_bytes else None


def size_of(file: IO[bytes]) -> int:
    """Return how many bytes a seekable file has."""
    return file.seek(0, os.SEEK_END)


def quick_digest(file: IO[bytes]) -> str:
    """Return the sha256 of a seekable file's size and of its first and last 64 KiB."""
    size = size_of(file)
    digest = hashlib.sha256(str(size).encode())
    for start in sorted({0, max(0, size - EDGE_BYTES)}):
        file.seek(start)
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()


def each_at_once(work: Callable[[str], Result], names: Sequence[str]) -> list[Result]:
    """Return the result of `work` for every name, in their order, several running at once."""
    with ThreadPoolExecutor(NUM_READERS) as readers:
        return list(readers.map(work, names))


def _walk(root: Path) -> Iterator[FoundFile]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            try:
                facts = path.stat()
            except OSError:  # a link that leads nowhere, or round in a circle
                yield FoundFile(name=relative, num_bytes=None)
                continue
            if stat.S_ISREG(facts.st_mode):
                yield FoundFile(name=relative, num_bytes=facts.st_size)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))
