"""The journal of a dataset: which shards it is to have, generation by generation, and what each is made of.

`<root>/plans/NNNNNN.json` is one generation and is never changed once it is there: the first run plans one, rows that
were added to the source another, and so do rows that are tried again and filters that changed. Shards that a later
generation replaced are dropped. So adding rows changes no byte of what is there, and a run that was killed finds in the
journal what it had meant to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from ldm.config import digest_of
from ldm.storage import join, list_names, read_bytes, write_text
from pipeline.store.schema import JSON, Split

PLANS = "plans"
"""Folder of the generations."""


class Cause(StrEnum):
    """Why a generation was planned."""

    SOURCE = "source"
    """Rows that the source has and the dataset has not seen."""
    RETRY = "retry"
    """Rows that failed before."""
    REFILTER = "refilter"
    """Other filters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """One shard to make, and of what.

    Attributes:
        split: the part that it belongs to.
        name: its name in the folder, such as "000000".
        source_name: the name of the rows at their source.
        source_payload: what the source needs besides to find them.
        previous: the source's file, where an older version of it was read before: rows seen then are left out.
        retries: earlier shards made of the same rows, oldest first; only rows that failed there are made.
        retry: which failures are tried again, "transient" or "all"; empty where this is no retry.
        amends: the shard whose rows are filtered anew; those that stay are copied.
        num_rows: rows that go in, where known.
    """

    split: Split
    name: str
    source_name: str
    source_payload: str = ""
    previous: str = ""
    retries: tuple[str, ...] = ()
    retry: str = ""
    amends: str = ""
    num_rows: int = 0

    @property
    def digest(self) -> str:
        """Digest of what the shard is made of."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, JSON]:
        """Return plain data that `from_dict` reads back; what says nothing is left out."""
        facts = asdict(self) | {"split": self.split.value, "retries": list(self.retries)}
        return {name: value for name, value in facts.items() if value}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PlannedShard:
        """Return the shard that `to_dict` described."""
        return cls(**{**raw, "split": Split(raw["split"]), "retries": tuple(raw.get("retries", ()))})


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Shards that were planned together.

    Attributes:
        number: place in the journal, from 0.
        cause: why it was planned.
        source_digest: digest of the source when it was looked at.
        filters: the filters that the whole dataset has from here on.
        shards: what is to be made.
        dropped: shards, as "train/000003", that are no part of the dataset any more.
    """

    number: int
    cause: Cause
    source_digest: str
    filters: Mapping[str, JSON]
    shards: tuple[PlannedShard, ...]
    dropped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, JSON]:
        """Return plain data that `from_dict` reads back."""
        return {
            "number": self.number,
            "cause": self.cause.value,
            "source_digest": self.source_digest,
            "filters": dict(self.filters),
            "dropped": list(self.dropped),
            "shards": [shard.to_dict() for shard in self.shards],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Generation:
        """Return the generation that `to_dict` described."""
        shards = tuple(PlannedShard.from_dict(shard) for shard in raw["shards"])
        return cls(**{**raw, "cause": Cause(raw["cause"]), "dropped": tuple(raw["dropped"]), "shards": shards})


@dataclass(frozen=True, slots=True)
class Journal:
    """Every generation of a dataset, oldest first."""

    generations: tuple[Generation, ...] = ()
    digests: tuple[str, ...] = field(default=())

    @property
    def latest(self) -> Generation | None:
        """The newest generation."""
        return self.generations[-1] if self.generations else None

    @property
    def dropped(self) -> frozenset[str]:
        """Shards that are no part of the dataset any more."""
        return frozenset(place for generation in self.generations for place in generation.dropped)

    def shards(self) -> list[tuple[int, PlannedShard]]:
        """Return the shards that the dataset is to have, each with its generation, oldest first.

        One that amends another takes that one's generation and place: its rows keep their order among all others.
        """
        places: dict[str, tuple[int, PlannedShard]] = {}
        place_of: dict[str, str] = {}
        for generation in self.generations:
            for shard in generation.shards:
                own = place(shard.split, shard.name)
                if shard.amends:
                    first = place_of[shard.amends]
                    places[first] = (places[first][0], shard)
                    place_of[own] = first
                else:
                    places[own] = (generation.number, shard)
                    place_of[own] = own
        return [entry for entry in places.values() if place(entry[1].split, entry[1].name) not in self.dropped]

    def replaced_by(self) -> dict[str, str]:
        """Return the shard that now stands for each one that was amended."""
        now: dict[str, str] = {}
        for generation in self.generations:
            for shard in generation.shards:
                if shard.amends:
                    own = place(shard.split, shard.name)
                    now = {old: own if new == shard.amends else new for old, new in now.items()} | {shard.amends: own}
        return now

    def next_names(self) -> dict[Split, int]:
        """Return the number of each split's next shard; numbers are never given twice."""
        taken: dict[Split, int] = dict.fromkeys(Split, 0)
        for generation in self.generations:
            for shard in generation.shards:
                taken[shard.split] = max(taken[shard.split], int(shard.name) + 1)
        return taken


def place(split: Split, name: str) -> str:
    """Return how the journal calls a shard: "train/000003"."""
    return f"{split.value}/{name}"


def read_journal(root: str) -> Journal:
    """Return the journal of a folder; empty where nothing was planned yet."""
    folder = join(root, PLANS)
    names = [name for name in list_names(folder) if name.endswith(".json") and not name.startswith(".")]
    contents = [read_bytes(join(folder, name)) for name in names]
    generations = tuple(Generation.from_dict(json.loads(content)) for content in contents)
    return Journal(generations, tuple(hashlib.sha256(content).hexdigest() for content in contents))


def append_generation(root: str, generation: Generation) -> None:
    """Publish a generation: from here on every run makes what of it is missing.

    Raises:
        ValueError: if another run has appended one meanwhile.
    """
    names = [name for name in list_names(join(root, PLANS)) if name.endswith(".json") and not name.startswith(".")]
    if len(names) != generation.number:
        raise ValueError(f"{root} got another plan meanwhile ({names[-1]}): is another run at work on it?")
    content = json.dumps(generation.to_dict(), indent=1, sort_keys=True, ensure_ascii=True) + "\n"
    write_text(join(root, PLANS, f"{generation.number:06d}.json"), content)


def named(journal: Journal, shards: Iterable[PlannedShard]) -> tuple[PlannedShard, ...]:
    """Return shards with the next free names of their splits, in order."""
    numbers = journal.next_names()
    found: list[PlannedShard] = []
    for shard in shards:
        raw = shard.to_dict() | {"name": f"{numbers[shard.split]:06d}"}
        found.append(PlannedShard.from_dict(raw))
        numbers[shard.split] += 1
    return tuple(found)


def chains(shards: Sequence[tuple[int, PlannedShard]]) -> dict[str, list[PlannedShard]]:
    """Return the shards made of the same source rows, oldest first, by the rows' name at their source."""
    found: dict[str, list[PlannedShard]] = {}
    for _, shard in shards:
        found.setdefault(shard.source_name, []).append(shard)
    return found
