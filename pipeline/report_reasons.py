"""Where on its way a row was lost, and what its reason means in a sentence."""

from __future__ import annotations

from enum import StrEnum

from pipeline.ingest.fetch import FETCH_REASONS
from pipeline.ingest.filters import CAPTION_COLUMNS, FILTER_REASONS, MEASURED_COLUMNS
from pipeline.ingest.picture import PICTURE_REASONS
from pipeline.ingest.rules import REASON_PREFIX
from pipeline.store.ledger import DUPLICATE_KEY, OK


class Stage(StrEnum):
    """The steps that a row passes, in their order; the value is what a person reads."""

    CAPTION = "Captions"
    COLUMN = "Listed columns"
    FETCH = "Fetching"
    DECODE = "Decoding"
    FILTER = "Filters"
    DUPLICATE = "Duplicates"
    OTHER = "Other reasons"
    KEPT = "Kept"


EXPLANATIONS = {
    Stage.CAPTION: "Rows without a caption that may stay are dropped before anything is fetched.",
    Stage.COLUMN: "What the listing itself says of a row is filtered before anything is fetched.",
    Stage.FETCH: "The bytes of the picture are downloaded, or read at the source.",
    Stage.DECODE: "The bytes are recognised and decoded as a picture.",
    Stage.FILTER: "The picture is measured and filtered.",
    Stage.DUPLICATE: "Rows that an earlier row of the dataset stands for are dropped.",
    Stage.OTHER: "What this report has no explanation for.",
}

CAPTION_REASONS = {
    "no_caption": "the row has no caption, or nothing of it is left after scrubbing",
    "caption_length": FILTER_REASONS["caption_length"],
}
DUPLICATE_REASONS = {
    DUPLICATE_KEY: "another row of the dataset has the same key",
    "duplicate_bytes": "an earlier row has the very same bytes",
    "duplicate_pixels": "an earlier row has the very same pixels",
    "near_duplicate": "an earlier picture looks nearly the same",
}


def stage_of(reason: str) -> Stage:
    """Return the step that a row with this status was lost at."""
    if reason == OK:
        return Stage.KEPT
    if reason.startswith(REASON_PREFIX):
        return _stage_of_column(reason.removeprefix(REASON_PREFIX))
    if reason in CAPTION_REASONS:
        return Stage.CAPTION
    if reason in FILTER_REASONS:
        return Stage.FILTER
    if reason in DUPLICATE_REASONS:
        return Stage.DUPLICATE
    if reason in FETCH_REASONS:
        return Stage.FETCH
    return Stage.DECODE if reason in PICTURE_REASONS else Stage.OTHER


def meaning_of(reason: str) -> str:
    """Return what a reason means in a sentence; nothing for one that no module explains."""
    if reason.startswith(REASON_PREFIX):
        return f"The row does not satisfy the rule on {reason.removeprefix(REASON_PREFIX)}."
    for known in (CAPTION_REASONS, FILTER_REASONS, DUPLICATE_REASONS, FETCH_REASONS, PICTURE_REASONS):
        if reason in known:
            return _sentence(known[reason])
    return ""


def _stage_of_column(column: str) -> Stage:
    """Return the step at which a rule on a column is applied: as soon as the column is known."""
    if column in CAPTION_COLUMNS:
        return Stage.CAPTION
    return Stage.FILTER if column in MEASURED_COLUMNS else Stage.COLUMN


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."
