"""Reading a finished dataset back: every byte, every row and every ledger line against what the manifest says.

Order: journal → shards, several at once (digests → tar by webdataset → offsets of the index → ledger) → keys over all
shards. Nothing is trusted because something else says so: each fact is read where it lies.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ldm.storage import exists, read_bytes
from pipeline.store.journal import place, read_journal
from pipeline.store.ledger import LEDGER_SUFFIX, OK, read_ledger
from pipeline.store.manifest import Manifest, ShardRecord, load_manifest, shard_path, verify
from pipeline.store.schema import KEY_LENGTH
from pipeline.store.shards import ShardIndex, read_index, read_rows

NUM_SHARDS_AT_ONCE = 4
"""Shards in memory at once where they lie in an object store."""
KEYS_AT_ONCE = 40_000_000
"""Keys compared at once, 12 bytes each; more are looked at in several passes."""
PACKED_KEY = f"V{KEY_LENGTH // 2}"
MAX_LISTED = 3
"""Rows of one kind of problem that are named for a shard."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What reading a dataset back found.

    Attributes:
        num_shards: shards read.
        num_rows: rows in their tars.
        num_bytes: bytes of all files.
        problems: one sentence each; empty where all is well.
    """

    num_shards: int
    num_rows: int
    num_bytes: int
    problems: tuple[str, ...]


def verify_dataset(root: str) -> Verification:
    """Read a finished dataset back and return what is wrong with it.

    Raises:
        ValueError: if there is no manifest.
    """
    found = verify_shards(root)
    return replace(found, problems=(*_journal_problems(root, load_manifest(root)), *found.problems))


def verify_shards(root: str) -> Verification:
    """Read a finished folder of tars with ledgers back and return what is wrong with it, whatever it was planned by.

    Raises:
        ValueError: if there is no manifest.
    """
    manifest = load_manifest(root)
    problems = verify(root)
    with ThreadPoolExecutor(NUM_SHARDS_AT_ONCE) as readers:
        for found in readers.map(lambda shard: shard_problems(root, shard), manifest.shards):
            problems += found
    problems += repeated_keys(root, manifest.shards)
    return Verification(
        num_shards=len(manifest.shards),
        num_rows=sum(shard.num_rows for shard in manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        problems=tuple(problems),
    )


def shard_problems(root: str, shard: ShardRecord) -> list[str]:
    """Return what is wrong inside one shard; files that are missing are `manifest.verify`'s to name."""
    paths = {suffix: shard_path(root, shard.split, shard.name, suffix) for suffix in ("tar", "index", LEDGER_SUFFIX)}
    here = place(shard.split, shard.name)
    if not all(exists(path) for path in paths.values()):
        return []
    try:
        index = read_index(paths["index"])
        ledger = read_ledger(paths[LEDGER_SUFFIX], ["key", "source_row", "status"])
        problems = [
            *_tar_problems(paths["tar"], index),
            *_ledger_problems(ledger["key"].to_pylist(), ledger["status"].to_pylist(), index, shard),
        ]
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make a reader raise is what is looked for
        problems = [f"cannot be read: {type(error).__name__}: {error}"]
    return [f"{here}: {problem}" for problem in problems]


def repeated_keys(root: str, shards: Sequence[ShardRecord]) -> list[str]:
    """Return which keys stand in more than one row, in bounded memory."""
    num_passes = 1 + sum(shard.num_rows for shard in shards) // KEYS_AT_ONCE
    found: list[str] = []
    for turn in range(num_passes):
        parts = [_keys_of_pass(root, shard, turn, num_passes) for shard in shards]
        keys = np.concatenate([np.empty(0, PACKED_KEY), *parts])
        distinct, counts = np.unique(keys, return_counts=True)
        found += [bytes(key).hex() for key in distinct[counts > 1]]
    if not found:
        return []
    named = ", ".join(sorted(found)[:MAX_LISTED])
    return [f"{len(found)} keys stand in more than one row, such as {named}; duplicates.exact leaves such rows out"]


def _keys_of_pass(root: str, shard: ShardRecord, turn: int, num_passes: int) -> np.ndarray:
    path = shard_path(root, shard.split, shard.name, "index")
    try:
        content = b"".join(bytes.fromhex(key) for key in read_index(path).keys)
    except Exception:  # noqa: BLE001 - `shard_problems` names an index that can't be read, or whose keys are none
        return np.empty(0, PACKED_KEY)
    packed = np.frombuffer(content, PACKED_KEY)
    return packed[np.frombuffer(content, np.uint8).reshape(-1, KEY_LENGTH // 2)[:, 0] % num_passes == turn]


def _journal_problems(root: str, manifest: Manifest) -> Iterator[str]:
    journal = read_journal(root)
    if list(journal.digests) != manifest.summary.get("plans"):
        yield f"{root}: the plans are not those of the manifest"
    planned = {place(shard.split, shard.name) for _, shard in journal.shards()}
    there = {place(shard.split, shard.name) for shard in manifest.shards}
    for shard in sorted(planned - there):
        yield f"{shard} is planned but not in the manifest"
    for shard in sorted(there - planned):
        yield f"{shard} is in the manifest but in no plan"


def _tar_problems(path: str, index: ShardIndex) -> Iterator[str]:
    """Compare what webdataset reads with what lies at the offsets of the index, and pictures with their digests."""
    content = read_bytes(path)
    keys: list[str] = []
    for number, row in enumerate(read_rows(path)):
        keys.append(row["__key__"])
        if number >= len(index.keys):
            continue
        for suffix, offset, size in zip(index.suffixes, index.offsets[number], index.sizes[number], strict=True):
            if content[offset : offset + size] != row.get(suffix):
                yield f"the index does not point at {index.keys[number]}.{suffix}"
        yield from _digest_problems(row)
    if tuple(keys) != index.keys:
        yield f"the tar has {len(keys)} rows, the index {len(index.keys)}, or their keys differ"


def _digest_problems(row: dict[str, bytes]) -> Iterator[str]:
    said = json.loads(row.get("json", b"{}")).get("sha256")
    images = [content for suffix, content in row.items() if suffix in ("jpg", "png", "webp")]
    if said and images and hashlib.sha256(images[0]).hexdigest() != said:
        yield f"the picture of {row['__key__']!r} is not the one that its JSON names"


def _ledger_problems(
    keys: Sequence[str], statuses: Sequence[str], index: ShardIndex, shard: ShardRecord
) -> Iterator[str]:
    kept = [key for key, status in zip(keys, statuses, strict=True) if status == OK]
    if tuple(kept) != index.keys:
        yield f"the ledger has {len(kept)} kept rows, the tar {len(index.keys)}, or their keys differ"
    if dict(Counter(statuses)) != dict(shard.counts):
        yield f"the ledger counts {dict(Counter(statuses))}, the manifest {dict(shard.counts)}"
    if shard.num_rows != len(kept):
        yield f"the manifest says {shard.num_rows} rows, the ledger {len(kept)}"
