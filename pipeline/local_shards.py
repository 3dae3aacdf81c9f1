"""Files of a finished folder on this machine: checked against the manifest, fetched where they lie elsewhere.

Order: every file that the manifest names is there, whole → its sha256 is compared, on demand → a shard of a
non-local root is copied into the cache folder the first time it is asked for, and its sha256 compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ldm.storage import exists, is_local, join, list_names, read_bytes, sha256_of, write_bytes
from pipeline.store.manifest import FileRecord, Manifest, ShardRecord, shard_path
from pipeline.store.schema import Split

NUM_READERS = 8

SuffixesOf = Callable[[ShardRecord], Sequence[str]]
"""Returns which files of a shard are used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalShards:
    """One split's shards, each file of which can be had as a local path.

    Attributes:
        root: the finished folder, anywhere.
        shards: the split's records, in the manifest's order.
        suffixes_of: the files of a shard that are used, such as "tar" and "index".
        cache_folder: where copies of a non-local root's files go; unused for a local one.
    """

    root: str
    shards: tuple[ShardRecord, ...]
    suffixes_of: SuffixesOf
    cache_folder: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return tuple(shard.num_rows for shard in self.shards)

    def fetch(self, names: Sequence[tuple[int, str]]) -> None:
        """Copy files, given by shard and suffix, of a non-local root at once; does nothing for a local one."""
        if names and not is_local(self.root):
            with ThreadPoolExecutor(NUM_READERS) as readers:
                list(readers.map(lambda name: self.path(*name), names))

    def path(self, shard: int, suffix: str) -> Path:
        """Return the local path of a file, copying it first if need be.

        Raises:
            ValueError: if the bytes that came are not those of the manifest.
        """
        record = self.shards[shard]
        source = shard_path(self.root, record.split, record.name, suffix)
        if is_local(self.root):
            return Path(source.removeprefix("file://"))
        expected = record.files[suffix]
        # The digest in the name keeps copies of two versions of one folder apart.
        target = Path(self.cache_folder, record.split.value, f"{record.name}-{expected.sha256[:16]}.{suffix}")
        if not (target.exists() and target.stat().st_size == expected.num_bytes):
            content = read_bytes(source)
            _check_digest(source, hashlib.sha256(content).hexdigest(), expected)
            write_bytes(str(target), content)
        return target


def open_local_shards(
    manifest: Manifest,
    root: str,
    split: Split,
    suffixes_of: SuffixesOf,
    *,
    cache_folder: str = "",
    has_digest_check: bool = False,
) -> LocalShards:
    """Return a split's shards after checking that every file the manifest names is there and whole.

    Raises:
        ValueError: if the split has no rows, a file is missing, truncated or (checked on demand) altered, each named,
            or the root is not local and no cache folder is given.
    """
    shards = tuple(shard for shard in manifest.shards_of(split) if shard.num_rows)
    if not shards:
        raise ValueError(f"{root} has no rows in its split {split.value!r}")
    if not is_local(root) and not cache_folder:
        raise ValueError(f"{root} is not on this machine: give a cache_folder for local copies of its shards")
    local = LocalShards(root=root, shards=shards, suffixes_of=suffixes_of, cache_folder=cache_folder)
    names = [(number, suffix) for number, shard in enumerate(shards) for suffix in suffixes_of(shard)]
    problems = _size_problems(local, names) if is_local(root) else _absences(local, split, names)
    if not problems and has_digest_check:
        with ThreadPoolExecutor(NUM_READERS) as readers:
            problems = [
                problem for problem in readers.map(lambda name: _digest_problem(local, *name), names) if problem
            ]
    if problems:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"{len(problems)} of {len(names)} files of {root} cannot be used:\n  {shown}")
    return local


def _size_problems(local: LocalShards, names: Sequence[tuple[int, str]]) -> list[str]:
    problems = []
    for shard, suffix in names:
        path, expected = local.path(shard, suffix), local.shards[shard].files[suffix].num_bytes
        if not path.exists():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected:
            problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {expected}")
    return problems


def _absences(local: LocalShards, split: Split, names: Sequence[tuple[int, str]]) -> list[str]:
    """Return which files of a remote root are missing: one listing; sizes and digests are compared when copied."""
    there = set(list_names(join(local.root, split.value))) if exists(local.root) else set()
    wanted = [f"{local.shards[shard].name}.{suffix}" for shard, suffix in names]
    return [f"{join(local.root, split.value, name)} is missing" for name in wanted if name not in there]


def _digest_problem(local: LocalShards, shard: int, suffix: str) -> str | None:
    try:
        path = str(local.path(shard, suffix))
        _check_digest(path, sha256_of(path), local.shards[shard].files[suffix])
    except ValueError as error:
        return str(error)
    return None


def _check_digest(path: str, found: str, expected: FileRecord) -> None:
    if found != expected.sha256:
        raise ValueError(f"{path} has sha256 {found}, the manifest says {expected.sha256}")
