"""Which rows are worth keeping, as a list of rules on columns; each row that is left out gets the name of its reason.

A column is anything that a source says of a row (`punsafe`, `LICENSE`), or what is known of every row:
    before the bytes:  caption, caption_chars, num_captions, language, url, host, licence
    after them:        width, height, short_side, long_side, pixels, aspect, num_bytes      (of the upright original)
A source's own column of such a name is written `attributes.width`. Each rule is applied as soon as its column is known,
so that a row which its listing gives away is never fetched. Caption columns are those of the first caption kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from ldm.config import Config
from pipeline.ingest.language import language_of
from pipeline.ingest.rules import REASON_PREFIX, Rule, parse_rule
from pipeline.store.ledger import MAX_CAPTION_CHARS, OK
from pipeline.store.schema import JSON, Reject, SourceRow

CAPTION_COLUMNS = frozenset({"caption", "caption_chars", "num_captions", "language"})
LISTED_COLUMNS = CAPTION_COLUMNS | {"url", "host", "licence"}
"""Columns of every row that are known before its bytes are there."""
MEASURED_COLUMNS = frozenset({"width", "height", "short_side", "long_side", "pixels", "aspect", "num_bytes"})
"""Columns of every row that its bytes tell."""
SOURCE_PREFIX = "attributes."
"""Before the name of a source's column that is called like one of ours."""
LICENCE_NAMES = ("licence", "license", "LICENCE", "LICENSE", "Licence", "License")
"""What sources call the column of licences; the first that a row has counts."""
FILTER_REASONS = {
    "caption_length": "no caption has a length within the limits",
    "too_small": "the shorter side of the original is below the limit",
    "too_long": "the original is longer for its width than the limit",
}
"""Reasons of the limits and their meaning; a rule's reason is `filter_` and its column."""


LEDGER_COLUMNS = (
    "status",
    "url",
    "caption",
    "caption_chars",
    "num_captions",
    "original_width",
    "original_height",
    "num_bytes",
    "attributes",
)
"""What `changes` reads of a ledger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig(Config):
    """What a row must be like to be kept."""

    rules: tuple[Rule, ...] = ()
    """Rules on columns, all of which must hold; from a recipe or a file (`rules: [{column: punsafe, at_most: 0.5}]`).
    Flags change a rule that is there: `--filters.rules.0.at-most 0.3`."""
    where: tuple[str, ...] = ()
    """Further rules, as one writes them on a command line: `--filters.where "punsafe <= 0.5" "language in en, de"
    "host not in example.com" "caption not matches (?i)stock photo" "pwatermark <= 0.8 or missing"`."""
    min_side: int = 1
    """Shorter side of the original image in pixels, at least."""
    max_aspect: float = 100.0
    """Longer side over shorter side, at most."""
    min_caption_chars: int = 1
    """Letters of a caption, at least; shorter ones are dropped."""
    max_caption_chars: int = 1000
    """Letters of a caption, at most; longer ones are dropped."""
    max_captions: int = 16
    """Captions kept for one image, the first ones."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing passes, and rules that say nothing."""
        if self.min_side < 1:
            raise ValueError(f"min_side must be at least 1, got {self.min_side}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, got {self.max_aspect}")
        if not 1 <= self.min_caption_chars <= self.max_caption_chars:
            raise ValueError(
                f"min_caption_chars must be from 1 to max_caption_chars, got {self.min_caption_chars} and "
                f"{self.max_caption_chars}"
            )
        if self.max_captions < 1:
            raise ValueError(f"max_captions must be at least 1, got {self.max_captions}")
        _parsed(self.where)

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """Both lists of rules as one."""
        return (*self.rules, *_parsed(self.where))

    def fits(self, num_chars: int) -> bool:
        """Return whether a caption of so many letters is kept."""
        return self.min_caption_chars <= num_chars <= self.max_caption_chars

    def is_as_strict_on_captions(self, other: FilterConfig) -> bool:
        """Return whether no caption is kept that the other filters drop for its length."""
        return other.fits(self.min_caption_chars) and other.fits(self.max_caption_chars)


def laion_safety(
    punsafe: float | None = 0.5,
    pwatermark: float | None = 0.5,
    aesthetic: float | None = None,
    similarity: float | None = None,
) -> tuple[Rule, ...]:
    """Return rules on the scores that LAION lists with each address; None leaves a score out.

    Args:
        punsafe: most that the chance of an unsafe picture may be.
        pwatermark: most that the chance of a watermark may be.
        aesthetic: least aesthetic score, 0 to 10.
        similarity: least similarity of CLIP between picture and caption.
    """
    at_most = {"punsafe": punsafe, "pwatermark": pwatermark}
    at_least = {"AESTHETIC_SCORE": aesthetic, "similarity": similarity}
    return (
        *(Rule(column=name, at_most=float(bound)) for name, bound in at_most.items() if bound is not None),
        *(Rule(column=name, at_least=float(bound)) for name, bound in at_least.items() if bound is not None),
    )


def kept_captions(captions: Sequence[str], config: FilterConfig) -> tuple[str, ...] | Reject:
    """Return the captions worth keeping, spaces made single and repetitions dropped, in order.

    Reasons: "no_caption" where there was none, "caption_length" where all were too short or too long.
    """
    texts = [" ".join(caption.split()) for caption in captions]
    texts = [text for text in dict.fromkeys(texts) if text]
    if not texts:
        return Reject("no_caption")
    fitting = [text for text in texts if config.fits(len(text))]
    if not fitting:
        return Reject("caption_length", f"{len(texts[0])} letters")
    return tuple(fitting[: config.max_captions])


def reject_before_fetch(row: SourceRow, captions: Sequence[str], config: FilterConfig) -> Reject | None:
    """Return why a row is left out by what is known without its bytes, or None.

    Args:
        row: the row as its source gave it.
        captions: those of its captions that are kept, from `kept_captions`.
        config: the rules.
    """
    value_of = partial(_listed_value, captions=captions, url=row.url, attributes=row.attributes)
    return _first_reject((rule for rule in config.all_rules if rule.column not in MEASURED_COLUMNS), value_of)


def reject_measured(width: int, height: int, num_bytes: int, config: FilterConfig) -> Reject | None:
    """Return why a row whose bytes are here is left out by what they tell, or None; the sides are upright."""
    columns = measured_columns(width, height, num_bytes)
    return reject_shape(width, height, config) or _first_reject(
        (rule for rule in config.all_rules if rule.column in MEASURED_COLUMNS), columns.get
    )


def reject_shape(width: int, height: int, config: FilterConfig) -> Reject | None:
    """Return why an original of this size is left out ("too_small", "too_long"), or None."""
    short, long = sorted((width, height))
    if short < config.min_side:
        return Reject("too_small", f"{width}x{height}")
    if long > config.max_aspect * short:
        return Reject("too_long", f"{width}x{height}")
    return None


def is_filter_reason(reason: str) -> bool:
    """Return whether a row with this status was left out by a filter, so that another filter may let it in."""
    return reason in FILTER_REASONS or reason.startswith(REASON_PREFIX)


def measured_columns(width: int, height: int, num_bytes: int) -> dict[str, float]:
    """Return the value of every column in MEASURED_COLUMNS."""
    short, long = sorted((width, height))
    return {
        "width": width,
        "height": height,
        "short_side": short,
        "long_side": long,
        "pixels": width * height,
        "aspect": long / max(short, 1),
        "num_bytes": num_bytes,
    }


@dataclass(frozen=True, slots=True)
class FilterChange:
    """What other filters would do to a finished shard.

    Attributes:
        leaving: rows of the tar that would leave, for certain.
        maybe_entering: rows that the old filters left out and the new ones might let in.
        maybe_leaving: rows of the tar of which the ledger says too little, such as a caption that it holds in part.
        maybe_altered: rows of the tar that stay and might lose some of their captions.
    """

    leaving: int = 0
    maybe_entering: int = 0
    maybe_leaving: int = 0
    maybe_altered: int = 0

    @property
    def is_any(self) -> bool:
        """Whether the shard might come out otherwise."""
        return bool(self.leaving or self.maybe_entering or self.maybe_leaving or self.maybe_altered)


def changes(before: FilterConfig, after: FilterConfig, ledger: pa.Table) -> FilterChange:
    """Return what changed filters would do to a shard, from its ledger alone (`LEDGER_COLUMNS` of it).

    Rows of the tar are judged by the captions that they have: what the old filters dropped of them does not come back.
    `leaving` is exact but for the rows in `maybe_leaving`, which is 0 unless a rule looks into captions longer than
    the ledger keeps, the limits of captions change where rows have several, or a row came without its original's size.
    """
    if before == after:
        return FilterChange()
    lines = ledger.select(list(LEDGER_COLUMNS)).to_pylist()
    kept = [_fate(line, before, after) for line in lines if line["status"] == OK]
    out = [line for line in lines if is_filter_reason(line["status"])]
    return FilterChange(
        leaving=kept.count(_Fate.LEAVES),
        maybe_entering=sum(_may_enter(line, before, after) for line in out),
        maybe_leaving=kept.count(_Fate.MAY_LEAVE),
        maybe_altered=kept.count(_Fate.MAY_CHANGE),
    )


class _Fate(Enum):
    """What other filters do to a row of the tar."""

    STAYS = auto()
    LEAVES = auto()
    MAY_LEAVE = auto()
    MAY_CHANGE = auto()


def _fate(line: Mapping[str, Any], before: FilterConfig, after: FilterConfig) -> _Fate:
    num_captions, width, height = line["num_captions"], line["original_width"], line["original_height"]
    are_all_kept = num_captions <= 1 or before.is_as_strict_on_captions(after)
    is_first_kept = num_captions == 0 or after.fits(line["caption_chars"])
    if (num_captions == 1 and not is_first_kept) or (width and reject_shape(width, height, after)):
        return _Fate.LEAVES
    untold = _untold(line) | (CAPTION_COLUMNS if not is_first_kept else set() if are_all_kept else {"num_captions"})
    is_altered = not are_all_kept or num_captions > after.max_captions
    line = {**line, "num_captions": min(num_captions, after.max_captions)}
    passed = set(before.all_rules)
    rules = [rule for rule in after.all_rules if rule not in passed or (is_altered and rule.column in CAPTION_COLUMNS)]
    if _is_refused(line, rules, untold):
        return _Fate.LEAVES
    is_same_shape = (before.min_side, before.max_aspect) == (after.min_side, after.max_aspect)
    if not is_first_kept or not (width or is_same_shape) or any(rule.column in untold for rule in rules):
        return _Fate.MAY_LEAVE
    return _Fate.MAY_CHANGE if is_altered else _Fate.STAYS


def _may_enter(line: Mapping[str, Any], before: FilterConfig, after: FilterConfig) -> bool:
    status, width, height = line["status"], line["original_width"], line["original_height"]
    if status in ("too_small", "too_long") and reject_shape(width, height, before) is None:
        return False  # left out for its size by something that is no filter
    if status == "caption_length" and after.is_as_strict_on_captions(before):
        return False
    limits = [(each.min_caption_chars, each.max_caption_chars, each.max_captions) for each in (before, after)]
    is_caption_told = limits[0] == limits[1] and status != "caption_length"
    untold = _untold(line) | (set() if is_caption_told else CAPTION_COLUMNS)
    is_refused = (width and reject_shape(width, height, after)) or _is_refused(line, after.all_rules, untold)
    return not is_refused


def _untold(line: Mapping[str, Any]) -> set[str]:
    """Return the columns of every row whose value a ledger's line does not tell."""
    untold = set() if line["original_width"] else set(MEASURED_COLUMNS)
    untold |= set() if line["num_bytes"] else {"num_bytes"}
    return untold | ({"caption"} if line["caption_chars"] > MAX_CAPTION_CHARS else set())


def _is_refused(line: Mapping[str, Any], rules: Iterable[Rule], untold: Collection[str]) -> bool:
    """Return whether a rule on what a ledger's line tells leaves the row out."""
    told = [rule for rule in rules if rule.column not in untold]
    if not told:
        return False
    measured = measured_columns(line["original_width"], line["original_height"], line["num_bytes"])
    columns = measured | {name: line[name] for name in ("caption_chars", "num_captions")}
    value_of = partial(
        _listed_value, captions=(line["caption"],), url=line["url"], attributes=json.loads(line["attributes"])
    )
    return any(rule.judge(columns[rule.column] if rule.column in columns else value_of(rule.column)) for rule in told)


def _first_reject(rules: Iterable[Rule], value_of: Callable[[str], JSON]) -> Reject | None:
    return next((reject for rule in rules if (reject := rule.judge(value_of(rule.column)))), None)


def _listed_value(column: str, captions: Sequence[str], url: str | None, attributes: Mapping[str, JSON]) -> JSON:
    match column:
        case "caption":
            return captions[0] if captions else None
        case "caption_chars":
            return len(captions[0]) if captions else 0
        case "num_captions":
            return len(captions)
        case "language":
            return language_of(captions[0]) if captions else None
        case "url":
            return url
        case "host":
            return _host(url or "")
        case "licence":
            return next((attributes[name] for name in LICENCE_NAMES if attributes.get(name)), None)
        case _:
            return attributes.get(column.removeprefix(SOURCE_PREFIX))


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # half an IPv6 address in brackets
        return None


@lru_cache(maxsize=64)
def _parsed(lines: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(parse_rule(line) for line in lines)
