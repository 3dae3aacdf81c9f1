"""One source row → the members of one row of a tar, or the reason why not, and its ledger line either way.

Order: captions scrubbed → filters on captions and listed columns → (bytes fetched) → header measured → filters on what
was measured → picture → its map → fingerprints → members `jpg|png|webp`, `txt`, `json`, `map.png`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.ingest.captions import scrub
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.filters import kept_captions, reject_before_fetch, reject_measured
from pipeline.ingest.fingerprints import perceptual_hash, pixel_sha256
from pipeline.ingest.semantic_map import MAP_MEMBER, placed_map
from pipeline.ingest.transforms import Measured, Picture, measure, render, thumbnail
from pipeline.sources.source import BROKEN
from pipeline.store.ledger import LedgerLine
from pipeline.store.schema import Reject, Row, SourceRow, json_text


@dataclass(frozen=True, slots=True)
class Candidate:
    """A source row that passed everything that can be said without its bytes.

    Attributes:
        row: the row as its source gave it.
        captions: what is left of its captions.
        line: its ledger line so far.
    """

    row: SourceRow
    captions: tuple[str, ...]
    line: LedgerLine


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate.

    Attributes:
        line: its ledger line.
        members: the row of the tar, or None where it was rejected.
        payload: the bytes of a rejected image that was recognised, for a thumbnail.
    """

    line: LedgerLine
    members: Row | None = None
    payload: bytes | None = None


def candidate_of(row: SourceRow, position: int, config: DatasetConfig) -> Candidate | LedgerLine:
    """Return a row that is worth its download, or the line that says why it is not."""
    attributes = json_text(row.attributes)
    if row.members is not None:  # finished rows pass as they are
        return Candidate(row, row.captions, LedgerLine.of(row, position, row.captions, attributes))
    texts = [scrub(caption, config.scrub) for caption in row.captions]
    found = Counter[str]()
    for text in texts:
        found.update(text.counts)
    captions = kept_captions([text.text for text in texts], config.filters)
    shown = row.captions if isinstance(captions, Reject) else captions
    line = LedgerLine.of(row, position, shown, attributes)
    line = replace(line, scrubbed=json_text(dict(found)))
    if isinstance(captions, Reject):
        return rejected(line, captions)
    reject = reject_before_fetch(row, captions, config.filters)
    return Candidate(row, captions, line) if reject is None else rejected(line, reject)


def outcome_of(candidate: Candidate, payload: bytes | Reject, config: DatasetConfig) -> Outcome:
    """Return what becomes of a candidate whose bytes, or the reason why there are none, are here."""
    if candidate.row.members is not None:
        return _passed(candidate.line, candidate.row.key, candidate.row.members)
    if isinstance(payload, Reject):
        found = str(candidate.row.attributes.get(BROKEN, ""))  # the source says what is wrong, where it knows
        return Outcome(rejected(candidate.line, replace(payload, detail=payload.detail or found)))
    digest = hashlib.sha256(payload).hexdigest()
    line = replace(candidate.line, num_bytes=len(payload), payload_sha256=digest)
    measured = measure(payload, config.picture)
    if isinstance(measured, Reject):
        return Outcome(rejected(line, measured))
    line = replace(line, original_width=measured.width, original_height=measured.height)
    reject = reject_measured(measured.width, measured.height, len(payload), config.filters)
    if reject is not None:
        return Outcome(rejected(line, reject), payload=payload)
    picture = render(payload, measured, config.picture)
    if isinstance(picture, Reject):
        return Outcome(rejected(line, picture))
    semantic_map = candidate.row.semantic_map
    placed = None if semantic_map is None else placed_map(semantic_map, measured, config.picture)
    if isinstance(placed, Reject):
        return Outcome(rejected(line, placed))
    line = replace(
        line,
        original_width=picture.original_width,
        original_height=picture.original_height,
        pixel_sha256=pixel_sha256(picture.pixels),
        perceptual_hash=perceptual_hash(picture.pixels),
    )
    members = _members(candidate, line, picture)
    return Outcome(line, members=members if placed is None else members | {MAP_MEMBER: placed})


def rejected(line: LedgerLine, reject: Reject) -> LedgerLine:
    """Return the line of a row that is left out."""
    return replace(line, status=reject.reason, detail=reject.detail)


def thumbnail_of(payload: bytes, config: DatasetConfig) -> bytes:
    """Return a small JPEG of an image, or nothing where it can't be decoded."""
    measured = measure(payload, config.picture)
    picture = render(payload, measured, config.picture) if isinstance(measured, Measured) else measured
    return b"" if isinstance(picture, Reject) else thumbnail(picture.pixels)


def _members(candidate: Candidate, line: LedgerLine, picture: Picture) -> Row:
    height, width = picture.pixels.shape[:2]
    facts = {
        "captions": candidate.captions,
        "width": width,
        "height": height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "sha256": hashlib.sha256(picture.content).hexdigest(),
        "payload_sha256": line.payload_sha256,
        "pixel_sha256": line.pixel_sha256,
        "perceptual_hash": None if line.perceptual_hash is None else f"{line.perceptual_hash:016x}",
        "num_bytes": line.num_bytes,
        "url": candidate.row.url,
        "attributes": candidate.row.attributes,
    }
    return {
        "__key__": candidate.row.key,
        picture.suffix: picture.content,
        "txt": candidate.captions[0].encode("utf-8", "replace"),
        "json": json_text(facts).encode(),
    }


def _passed(line: LedgerLine, key: str, members: Mapping[str, bytes]) -> Outcome:
    """Return a finished row untouched; what its line says of the picture stands in its JSON."""
    facts = json.loads(members.get("json", b"{}"))
    hashed = facts.get("perceptual_hash")
    line = replace(
        line,
        original_width=int(facts.get("original_width") or 0),
        original_height=int(facts.get("original_height") or 0),
        num_bytes=int(facts.get("num_bytes") or 0),
        payload_sha256=str(facts.get("payload_sha256") or ""),
        pixel_sha256=str(facts.get("pixel_sha256") or ""),
        perceptual_hash=int(hashed, 16) if hashed else None,
    )
    return Outcome(line, members={"__key__": key, **members})
