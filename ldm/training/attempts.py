"""The attempts of a training: each start of its workers, by a person or by Ray, as a folder of the run's record.

`attempts/0001/attempt.json` says where and when an attempt ran, how far it came and why it ended; the configuration,
packages and changes of code that it ran with lie beside it. One that was killed can't say so: the next one closes it,
at the time and the sample that were last heard of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

from ldm import storage

ATTEMPTS_FOLDER = "attempts"
ATTEMPT_FILE = "attempt.json"
NO_GOODBYE = "it ended without a word: it was killed, or its machine was lost"


class Status(StrEnum):
    """How an attempt stands, in MLflow's words."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    KILLED = "KILLED"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a training's workers.

    Attributes:
        number: from 1.
        started_ms: when it began, in milliseconds since 1970.
        heard_ms: when it was last heard of; the end of one that ended.
        tags: where it ran and with which code.
        status: how it stands.
        why: why it ended.
        samples_at_start: samples that were behind the training; None until its workers have said so.
        samples_at_end: samples that were behind it when it was last heard of.
    """

    number: int
    started_ms: int
    heard_ms: int
    tags: dict[str, str] = field(default_factory=dict)
    status: Status = Status.RUNNING
    why: str = ""
    samples_at_start: int | None = None
    samples_at_end: int | None = None

    def heard(self, now_ms: int, samples_seen: int) -> Self:
        """Return the attempt after it said how far it is."""
        first = samples_seen if self.samples_at_start is None else self.samples_at_start
        return replace(self, heard_ms=now_ms, samples_at_start=first, samples_at_end=samples_seen)

    def ended(self, now_ms: int, status: Status, why: str) -> Self:
        """Return the attempt at its end."""
        return replace(self, heard_ms=now_ms, status=status, why=why)

    def described(self) -> dict[str, str]:
        """Return all of it as tags of text; what is not known is left out."""
        known = {"samples_at_start": self.samples_at_start, "samples_at_end": self.samples_at_end}
        told = {name: str(value) for name, value in known.items() if value is not None}
        return {"attempt": str(self.number), **self.tags, **told, **({"why": self.why} if self.why else {})}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Return the attempt that `to_dict` described."""
        return cls(**{**raw, "status": Status(raw["status"])})


def read_attempts(record: str) -> list[Attempt]:
    """Return the attempts of a record in their order; none for an older record."""
    folders = [storage.join(record, ATTEMPTS_FOLDER, name) for name in _names(record)]
    there = [path for folder in folders if storage.exists(path := storage.join(folder, ATTEMPT_FILE))]
    return [Attempt.from_dict(json.loads(storage.read_text(path))) for path in there]


def attempt_folder(record: str, number: int) -> str:
    """Return where an attempt's files lie."""
    return storage.join(record, ATTEMPTS_FOLDER, f"{number:04d}")


def begin_attempt(record: str, tags: Mapping[str, str], files: Mapping[str, bytes], now_ms: int) -> Attempt:
    """Write down a new attempt and return it; those that were left open are closed as killed.

    Args:
        record: local folder of the run's record.
        tags: what is known of it from the start.
        files: names to contents of what lies beside it.
        now_ms: the time, in milliseconds since 1970.
    """
    before = read_attempts(record)
    for left in before:
        if left.status is Status.RUNNING:
            keep_attempt(record, left.ended(left.heard_ms, Status.KILLED, NO_GOODBYE))
    number = before[-1].number + 1 if before else 1
    for name, content in files.items():
        storage.write_bytes(storage.join(attempt_folder(record, number), name), content)
    attempt = Attempt(number=number, started_ms=now_ms, heard_ms=now_ms, tags=dict(tags))
    keep_attempt(record, attempt)
    return attempt


def keep_attempt(record: str, attempt: Attempt) -> None:
    """Write an attempt as it now stands; it exists from the first time on."""
    path = storage.join(attempt_folder(record, attempt.number), ATTEMPT_FILE)
    storage.write_text(path, json.dumps(attempt.to_dict(), indent=1))


def _names(record: str) -> list[str]:
    return sorted(filter(str.isdigit, storage.list_names(storage.join(record, ATTEMPTS_FOLDER))), key=int)
