"""The ledger of a sharded folder: what is in it, what it was made from, and when a file counts as being there.

Order: claim the folder (`identity.json`) → write a shard's files → commit the shard (`<name>.record.json`, last) →
publish the whole (`manifest.json`). A file that no record names does not exist. Nothing here holds a time, a host or
the folder's own path, so the same work gives the same bytes anywhere.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from ldm.config import digest_of
from ldm.storage import exists, join, list_names, read_bytes, read_text, sha256_of, write_text
from pipeline.store.schema import JSON, SCHEMA_VERSION, Split

IDENTITY_NAME = "identity.json"
MANIFEST_NAME = "manifest.json"
RECORD_SUFFIX = "record.json"
logger = logging.getLogger(__name__)

NUM_READERS = 16
"""Records read at once: on an object store the time of a small read is nearly all waiting."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and digest of one published file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What one shard holds.

    Attributes:
        name: six or more digits, such as "000000".
        split: the part it belongs to.
        num_rows: rows in its tar.
        files: its files by suffix: `<root>/<split>/<name>.<suffix>`.
        counts: input rows by status; "ok" ones are in the tar.
        source: digest of what the shard was made of.
        details: further facts of the stage that made it, such as per-channel statistics.
    """

    name: str
    split: Split
    num_rows: int
    files: Mapping[str, FileRecord]
    counts: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    details: Mapping[str, JSON] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.num_bytes for file in self.files.values())

    def to_dict(self) -> dict[str, JSON]:
        """Return plain data that `from_dict` reads back to an equal record."""
        return asdict(self) | {"split": self.split.value}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ShardRecord:
        """Return the record that `to_dict` described."""
        files = {suffix: FileRecord(**file) for suffix, file in raw["files"].items()}
        return cls(**{**raw, "split": Split(raw["split"]), "files": files})


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole of a published folder.

    Attributes:
        kind: "dataset", "latents" or "generated".
        version: SCHEMA_VERSION of the code that wrote it.
        identity: what the folder was made from and how; two folders with equal identity have equal rows.
        shards: every shard, sorted by split and name.
        summary: totals over all shards, such as counts by status.
    """

    kind: str
    version: int
    identity: Mapping[str, JSON]
    shards: tuple[ShardRecord, ...]
    summary: Mapping[str, JSON]

    @property
    def digest(self) -> str:
        """Sha256 of the content: equal wherever and whenever the same rows were made."""
        return digest_of(self.to_dict())

    @property
    def image_size(self) -> int:
        """Side of a dataset's pictures in pixels; 0 where the folder holds none."""
        return int(self.identity.get("picture", {}).get("image_size", 0))

    def shards_of(self, split: Split) -> tuple[ShardRecord, ...]:
        """Return the shards of one split, by name."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_rows(self, split: Split) -> int:
        """Return how many rows a split holds."""
        return sum(shard.num_rows for shard in self.shards_of(split))

    def to_dict(self) -> dict[str, JSON]:
        """Return plain data that `from_dict` reads back to an equal manifest."""
        return {
            "kind": self.kind,
            "version": self.version,
            "identity": dict(self.identity),
            "summary": dict(self.summary),
            "shards": [shard.to_dict() for shard in self.shards],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Manifest:
        """Return the manifest that `to_dict` described."""
        return cls(**{**raw, "shards": tuple(ShardRecord.from_dict(shard) for shard in raw["shards"])})


def shard_path(root: str, split: Split, name: str, suffix: str) -> str:
    """Return where a shard's file lies."""
    return join(root, split.value, f"{name}.{suffix}")


def claim_root(root: str, kind: str, identity: Mapping[str, JSON]) -> None:
    """Write down what the folder is for, before any row; a folder already claimed for the same is left as it is.

    Raises:
        ValueError: if the folder holds something else; every entry that differs is named with both values.
    """
    claim = {"kind": kind, "version": SCHEMA_VERSION, "identity": dict(identity)}
    path = join(root, IDENTITY_NAME)
    if exists(path):
        differences = list(_differences("", json.loads(read_text(path)), json.loads(_json(claim))))
        if differences:
            raise ValueError(
                f"{root} holds another {kind} (choose another folder, or delete it):\n  " + "\n  ".join(differences)
            )
        return
    foreign = {MANIFEST_NAME, *Split}.intersection(list_names(root))
    if foreign:
        raise ValueError(f"{root} holds {', '.join(sorted(foreign))} but no {IDENTITY_NAME}: it was not made here")
    write_text(path, _json(claim))


def commit_shard(root: str, record: ShardRecord) -> None:
    """Make a shard exist, after all its files were published."""
    write_text(shard_path(root, record.split, record.name, RECORD_SUFFIX), _json(record.to_dict()))


def read_records(root: str) -> list[ShardRecord]:
    """Return every committed shard, sorted by split and name."""
    paths = [
        join(root, split.value, name)
        for split in Split
        for name in list_names(join(root, split.value))
        if name.endswith(f".{RECORD_SUFFIX}") and not name.startswith(".")
    ]
    with ThreadPoolExecutor(NUM_READERS) as readers:
        records = [record for record in readers.map(_read_record, paths) if record is not None]
    return sorted(records, key=lambda record: (record.split, record.name))


def publish_manifest(
    root: str,
    identity: Mapping[str, JSON],
    kind: str,
    summary: Mapping[str, JSON],
    records: Sequence[ShardRecord] | None = None,
) -> Manifest:
    """Write `manifest.json` from the given records, all that are there by default, and return it."""
    shards = tuple(read_records(root) if records is None else records)
    manifest = Manifest(kind=kind, version=SCHEMA_VERSION, identity=identity, shards=shards, summary=summary)
    write_text(join(root, MANIFEST_NAME), _json(manifest.to_dict()))
    return load_manifest(root)


def load_manifest(root: str) -> Manifest:
    """Return the manifest of a finished folder.

    Raises:
        ValueError: if there is none yet, or it was written under another schema version.
    """
    path = join(root, MANIFEST_NAME)
    if not exists(path):
        raise ValueError(
            f"{root} holds no {MANIFEST_NAME}: the job that fills it (jobs.shard_dataset for a dataset, "
            "jobs.precompute_latents for latents, jobs.sample --prompts-from for pictures) has not ended, or the path "
            "is wrong"
        )
    manifest = Manifest.from_dict(json.loads(read_bytes(path)))
    if manifest.version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {manifest.version}, this code reads {SCHEMA_VERSION}")
    return manifest


def count_by_split(records: Sequence[ShardRecord]) -> dict[str, dict[str, int]]:
    """Return input rows by status for each split, statuses sorted."""
    totals = {split.value: Counter[str]() for split in Split}
    for record in records:
        totals[record.split.value].update(record.counts)
    return {split: dict(sorted(counts.items())) for split, counts in totals.items()}


def verify(root: str) -> list[str]:
    """Read every byte of a finished folder again and return what is wrong with it, one sentence a problem."""
    manifest = load_manifest(root)
    files = [
        (shard_path(root, shard.split, shard.name, suffix), expected)
        for shard in manifest.shards
        for suffix, expected in shard.files.items()
    ]
    with ThreadPoolExecutor(NUM_READERS) as readers:
        problems = [problem for problem in readers.map(lambda pair: _problem_with(*pair), files) if problem]
    if list(manifest.shards) != read_records(root):
        problems.append(f"{root}: the shards' records are not those of {MANIFEST_NAME}")
    return problems


def _read_record(path: str) -> ShardRecord | None:
    """Return a shard's record, or None for a damaged one: without it the shard does not exist and is made again."""
    content = read_bytes(path)
    try:
        return ShardRecord.from_dict(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s can't be read and counts as absent: %s", path, error)
        return None


def _problem_with(path: str, expected: FileRecord) -> str | None:
    if not exists(path):
        return f"{path} is missing"
    found = sha256_of(path)
    if found != expected.sha256:
        return f"{path} has sha256 {found[:12]}, the manifest says {expected.sha256[:12]}"
    return None


def _differences(where: str, there: JSON, wanted: JSON) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for name in sorted(there.keys() | wanted.keys()):
            inner = f"{where}.{name}" if where else name
            yield from _differences(inner, there.get(name), wanted.get(name))
    elif there != wanted:
        yield f"{where} is {json.dumps(there)} there, {json.dumps(wanted)} here"


def _json(content: JSON) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
