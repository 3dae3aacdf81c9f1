"""Files of a finished folder on this machine: checked against the manifest, fetched where they lie elsewhere.

Order: every file that the manifest names is there, whole → its sha256 is compared, on demand → a shard of a
non-local root is copied into the cache folder when it is asked for, or ahead of that, and its sha256 compared.
"""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from ldm.storage import exists, is_local, join, list_names, sha256_of
from pipeline.shard_cache import CachedFile, ShardCache
from pipeline.store.manifest import FileRecord, Manifest, ShardRecord, shard_path
from pipeline.store.schema import Split

NUM_READERS = 8
MAX_OPEN = 1024
"""Shards that a loader keeps open, where the system allows for as many files."""
SPARE_FILES = 256
"""Files that a process may need beside them."""
CACHE_NAME = "shard-cache"
"""Folder of the copies inside the cache folder, which may hold a person's other things."""


class Holds:
    """Holds of several folders of copies."""

    def __init__(self, holds: ExitStack) -> None:
        self._holds = holds

    def close(self) -> None:
        """Let all folders be deleted when room is needed; a second call does nothing."""
        self._holds.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class FileGroup:
    """Files of one shard that are used together; a shard may have several groups.

    Attributes:
        record: the shard.
        suffixes: which of its files, such as ("tar", "index").
        num_rows: rows in them.
        shared: those of them that other groups of the shard use as well.
    """

    record: ShardRecord
    suffixes: tuple[str, ...]
    num_rows: int
    shared: tuple[str, ...] = ()

    def folder_name(self, suffix: str) -> str:
        """Return the folder of a file's copy: what groups share lies apart, so that each group can be deleted alone."""
        own = [name for name in self.suffixes if (name in self.shared) == (suffix in self.shared)]
        # The digest in the name keeps copies of two versions of one folder apart.
        digests = "".join(self.record.files[name].sha256 for name in sorted(own))
        return f"{self.record.name}-{hashlib.sha256(digests.encode()).hexdigest()[:16]}"


def max_open(files_of_shard: int) -> int:
    """Return how many shards a loader may keep open, each of which takes so many of the process's files."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(MAX_OPEN, (allowed - SPARE_FILES) // files_of_shard))


def groups_of(manifest: Manifest, split: Split, suffixes: tuple[str, ...]) -> list[FileGroup]:
    """Return one group for each shard of a split that has rows, in the manifest's order."""
    shards = [shard for shard in manifest.shards_of(split) if shard.num_rows]
    return [FileGroup(record=shard, suffixes=suffixes, num_rows=shard.num_rows) for shard in shards]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalShards:
    """Groups of files of one split, each of which can be had as local paths; a shard is one such group here.

    Attributes:
        root: the finished folder, anywhere.
        shards: the groups.
        cache: where copies of a non-local root's files lie; none for a local one.
    """

    root: str
    shards: tuple[FileGroup, ...]
    cache: ShardCache | None
    _used: dict[int, Holds] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return tuple(shard.num_rows for shard in self.shards)

    @property
    def is_limited(self) -> bool:
        """Whether only so many bytes of copies may be there, so that shards not in use should be closed."""
        return self.cache is not None and self.cache.limit_bytes > 0

    @contextmanager
    def paths(self, shard: int) -> Iterator[tuple[Path, ...]]:
        """Yield the local paths of a shard's files in the order of its suffixes, copied first if need be.

        No process deletes them before the block ends; what is mapped into memory by then stays readable.

        Raises:
            ValueError: if the bytes that came are not those of the manifest, or there is no room for them.
        """
        files = self._files(shard)
        holds = None if self.cache is None else self._held(shard)
        with nullcontext() if holds is None else closing(holds):
            yield tuple(file.target for file in files)

    def use(self, shards: Sequence[int]) -> None:
        """Have the files of all these shards here, several copied at once; does nothing for a local root.

        Under a limit they stay until the next call, and those of the call before may go.

        Raises:
            ValueError: as `paths`, or if the limit is less than these shards take.
        """
        if self.cache is None:
            return
        self.check_room(shards)
        with self._lock:
            for shard in self._used.keys() - set(shards):
                self._used.pop(shard).close()
            new = [shard for shard in shards if shard not in self._used]
            if new:
                with ThreadPoolExecutor(min(NUM_READERS, len(new))) as readers:
                    list(readers.map(self._use, new))

    def check_room(self, shards: Sequence[int]) -> None:
        """Refuse a limit that does not hold these shards at once; raises ValueError with both figures."""
        if self.cache is None or not self.cache.limit_bytes:
            return
        sizes = {file.target: file.record.num_bytes for shard in shards for file in self._files(shard)}
        needed = sum(sizes.values())
        if needed > self.cache.limit_bytes:
            raise ValueError(
                f"cache_bytes is {self.cache.limit_bytes:,}, and the {len(shards)} shards of {self.root} that rows "
                f"are drawn from at once take {needed:,}: raise it, or lower num_streams or block_rows"
            )

    @contextmanager
    def fetching_ahead(
        self, shards_between: Callable[[int, int], Sequence[int]]
    ) -> Iterator[Callable[[int, int], None]]:
        """Yield what begins to copy the shards of some positions in the background, and returns at once.

        Shards for which there is no room are left out. What goes wrong is raised when the shard is used, where all
        attempts are made again.
        """
        if self.cache is None:
            yield lambda start, stop: None
            return
        asked: set[int] = set()
        readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="ahead")

        def fetch(start: int, stop: int) -> None:
            shards = shards_between(start, stop)
            for shard in shards:
                if shard not in asked:
                    readers.submit(self._fetch, shard)
            asked.clear()
            asked.update(shards)

        try:
            yield fetch
        finally:
            readers.shutdown(wait=True, cancel_futures=True)

    def _files(self, shard: int) -> tuple[CachedFile, ...]:
        """Return a shard's files; those of a local root are their own copies."""
        record, suffixes = self.shards[shard].record, self.shards[shard].suffixes
        sources = [shard_path(self.root, record.split, record.name, suffix) for suffix in suffixes]
        if self.cache is None:
            targets = [Path(source.removeprefix("file://")) for source in sources]
        else:
            group, folder = self.shards[shard], self.cache.folder / record.split.value
            targets = [folder / group.folder_name(suffix) / f"{record.name}.{suffix}" for suffix in suffixes]
        return tuple(
            CachedFile(source=source, target=target, record=record.files[suffix])
            for source, target, suffix in zip(sources, targets, suffixes, strict=True)
        )

    def _held(self, shard: int, *, is_needed: bool = True) -> Holds | None:
        """Return holds of the folders of a shard's files; None if they are not needed and there is no room."""
        assert self.cache is not None
        by_folder: dict[Path, list[CachedFile]] = {}
        for file in self._files(shard):
            by_folder.setdefault(file.target.parent, []).append(file)
        with ExitStack() as undo:
            for files in by_folder.values():
                hold = self.cache.hold(files, is_needed=is_needed)
                if hold is None:
                    return None
                undo.callback(hold.close)
            return Holds(undo.pop_all())

    def _use(self, shard: int) -> None:
        holds = self._held(shard)
        assert holds is not None
        if not self.is_limited:  # nobody here deletes, and there may be more shards than a process may have files
            holds.close()
        self._used[shard] = holds

    def _fetch(self, shard: int) -> None:
        holds = self._held(shard, is_needed=False)
        if holds is not None:
            holds.close()


def open_local_shards(
    root: str,
    split: Split,
    groups: Sequence[FileGroup],
    *,
    cache_folder: str = "",
    cache_bytes: int = 0,
    has_digest_check: bool = False,
) -> LocalShards:
    """Return groups of files of a split after checking that every file the manifest names is there and whole.

    Raises:
        ValueError: if the split has no rows, a file is missing, truncated or (checked on demand) altered, each named,
            or the root is not local and no cache folder is given.
    """
    if not groups:
        raise ValueError(f"{root} has no rows in its split {split.value!r}")
    if not is_local(root) and not cache_folder:
        raise ValueError(f"{root} is not on this machine: give a cache_folder for local copies of its shards")
    cache = None if is_local(root) else ShardCache(Path(cache_folder, CACHE_NAME), cache_bytes)
    local = LocalShards(root=root, shards=tuple(groups), cache=cache)
    names = sorted({f"{group.record.name}.{suffix}" for group in groups for suffix in group.suffixes})
    problems = _size_problems(local) if cache is None else _absences(local, split, names)
    if not problems and has_digest_check:
        with ThreadPoolExecutor(NUM_READERS) as readers:
            found = readers.map(lambda shard: _digest_problems(local, shard), range(len(groups)))
            problems = [problem for of_shard in found for problem in of_shard]
    if problems:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"{len(problems)} of {len(names)} files of {root} cannot be used:\n  {shown}")
    return local


def _size_problems(local: LocalShards) -> list[str]:
    problems = []
    files = {file.target: file for shard in range(len(local.shards)) for file in local._files(shard)}
    for file in files.values():
        expected = file.record.num_bytes
        if not file.target.exists():
            problems.append(f"{file.target} is missing")
        elif file.target.stat().st_size != expected:
            problems.append(f"{file.target} has {file.target.stat().st_size} bytes, the manifest says {expected}")
    return problems


def _absences(local: LocalShards, split: Split, names: Sequence[str]) -> list[str]:
    """Return which files of a remote root are missing: one listing; sizes and digests are compared when copied."""
    there = set(list_names(join(local.root, split.value))) if exists(local.root) else set()
    return [f"{join(local.root, split.value, name)} is missing" for name in names if name not in there]


def _digest_problems(local: LocalShards, shard: int) -> list[str]:
    try:
        with local.paths(shard) as paths:
            group = local.shards[shard]
            records = [group.record.files[suffix] for suffix in group.suffixes]
            return [problem for path, record in zip(paths, records, strict=True) if (problem := _fault(path, record))]
    except ValueError as error:  # what came could not be copied
        return [str(error)]


def _fault(path: Path, expected: FileRecord) -> str:
    found = sha256_of(str(path))
    return "" if found == expected.sha256 else f"{path} has sha256 {found}, the manifest says {expected.sha256}"
