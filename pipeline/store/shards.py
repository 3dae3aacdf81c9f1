"""Tars that any WebDataset reader reads, each with an index of where every member's bytes lie.

Order: rows → tar (fixed owner, no times, one set of members in all rows) → index (safetensors): `offsets` and `sizes`,
int64, shape (row, member), `keys`, uint8, shape (row, 24), and the members' suffixes in its metadata. With it a row is
one seek, and rows of one shape are one gather from a memory map.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy
import webdataset
from numpy.typing import NDArray

from ldm.storage import is_local, open_atomic, read_bytes, read_range, write_bytes
from pipeline.store.manifest import FileRecord, shard_path
from pipeline.store.schema import Row, Split

BLOCK_BYTES = 512
"""A tar holds a header block before each member and pads its content to whole blocks (POSIX.1-1988, ustar)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """Where the bytes of a tar's rows lie.

    Attributes:
        keys: the rows' keys, in the order of the tar.
        suffixes: the members that every row has, in the order of the tar, such as ("json", "png", "txt").
        offsets: first byte of each member's content, int64, shape (row, member).
        sizes: bytes of each member's content, int64, shape (row, member).
    """

    keys: tuple[str, ...]
    suffixes: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def column(self, suffix: str) -> int:
        """Return the column of a member.

        Raises:
            ValueError: if rows have no such member.
        """
        if suffix not in self.suffixes:
            raise ValueError(f"the shard has no member {suffix!r}; it has {', '.join(self.suffixes)}")
        return self.suffixes.index(suffix)


class _HashingFile:
    """Passes bytes on to a file while counting and digesting them."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, chunk: bytes) -> int:
        self.sha256.update(chunk)
        self.num_bytes += len(chunk)
        return self.file.write(chunk)

    def flush(self) -> None:
        self.file.flush()

    def record(self) -> FileRecord:
        return FileRecord(self.num_bytes, self.sha256.hexdigest())


def write_shard(root: str, split: Split, name: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, FileRecord]:
    """Publish a shard's tar and index and return their records under "tar" and "index".

    Equal rows give equal bytes. Rows hold `__key__` and bytes under each suffix; all have the same suffixes.

    Raises:
        ValueError: if a row lacks a member that the first one has, has more, or repeats a key.
    """
    keys: list[str] = []
    sizes: list[list[int]] = []
    suffixes: tuple[str, ...] = ()
    with open_atomic(shard_path(root, split, name, "tar")) as file:
        hashing = _HashingFile(file)
        with webdataset.TarWriter(hashing, mtime=0, encoder=False, user="ldm", group="ldm") as tar:
            for row in rows:
                members = tuple(sorted(member for member in row if member != "__key__"))
                suffixes = suffixes or members
                if members != suffixes:
                    raise ValueError(f"row {row['__key__']} has members {members}, the shard's rows have {suffixes}")
                tar.write(row)
                keys.append(row["__key__"])
                sizes.append([len(row[member]) for member in members])
    index = _index_of(keys, suffixes, sizes)
    return {"tar": hashing.record(), "index": _write_index(shard_path(root, split, name, "index"), index)}


def read_index(path: str) -> ShardIndex:
    """Return the index that `write_shard` published."""
    content = read_bytes(path)
    tensors = safetensors.numpy.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    suffixes = tuple(json.loads(header["__metadata__"]["suffixes"]))
    keys = tuple(bytes(key).decode() for key in tensors["keys"])
    return ShardIndex(keys=keys, suffixes=suffixes, offsets=tensors["offsets"], sizes=tensors["sizes"])


def read_rows(path: str) -> Iterator[Row]:
    """Yield the rows of any WebDataset tar in order: `__key__` and the bytes of each member by suffix.

    Raises:
        tarfile.ReadError: if the tar is truncated or is none.
    """
    with _open(path) as file:
        members = webdataset.tariterators.tar_file_iterator(file)
        named = ({**member, "__url__": path} for member in members)
        for sample in webdataset.tariterators.group_by_keys(named):
            yield {suffix: content for suffix, content in sample.items() if suffix != "__url__"}


def read_row(path: str, index: ShardIndex, row: int) -> Row:
    """Return one row of a tar by seeking to it."""
    start, stop = int(index.offsets[row, 0]), int(index.offsets[row, -1] + index.sizes[row, -1])
    content = read_range(path, start, stop)
    places = zip(index.suffixes, index.offsets[row] - start, index.sizes[row], strict=True)
    members = {suffix: content[offset : offset + size] for suffix, offset, size in places}
    return {"__key__": index.keys[row], **members}


def _open(path: str) -> IO[bytes]:
    """Open a local file for seeking; fetch one that lies elsewhere whole, since shards are small enough for memory."""
    return Path(path).open("rb") if is_local(path) and "://" not in path else io.BytesIO(read_bytes(path))


def _index_of(keys: list[str], suffixes: tuple[str, ...], sizes: list[list[int]]) -> ShardIndex:
    if len(set(keys)) != len(keys):
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated} stands twice in one shard")
    table = np.array(sizes, dtype=np.int64).reshape(len(keys), len(suffixes))
    spans = BLOCK_BYTES + -(-table // BLOCK_BYTES) * BLOCK_BYTES  # header, then content padded to whole blocks
    ends = np.cumsum(spans).reshape(table.shape)
    return ShardIndex(keys=tuple(keys), suffixes=suffixes, offsets=ends - spans + BLOCK_BYTES, sizes=table)


def _write_index(path: str, index: ShardIndex) -> FileRecord:
    width = len(index.keys[0]) if index.keys else 0
    letters = np.frombuffer("".join(index.keys).encode(), dtype=np.uint8).reshape(len(index.keys), width)
    tensors: dict[str, NDArray[Any]] = {"keys": letters, "offsets": index.offsets, "sizes": index.sizes}
    # One metadata entry only: safetensors writes several in no fixed order.
    content = safetensors.numpy.save(tensors, metadata={"suffixes": json.dumps(index.suffixes)})
    write_bytes(path, content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
