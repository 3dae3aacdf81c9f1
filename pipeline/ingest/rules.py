r"""One condition on one column of a row: bounds, a list of values, or a pattern, as a config or as a line of text.

    punsafe <= 0.5        width >= 512        licence in CC-BY, CC0        host not in example.com
    url matches \.jpe?g$  caption not matches (?i)stock photo              pwatermark <= 0.8 or missing

Numbers may come as text. None, NaN, infinities, empty text and a column that is not there are missing; so is, under a
bound, what is no number. A row whose value is missing falls unless the rule says otherwise.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from ldm.config import Config
from pipeline.store.schema import JSON, Reject, json_text

REASON_PREFIX = "filter_"
"""A row that a rule leaves out is counted under this and the rule's column."""
MAX_MATCHED_CHARS = 4096
"""Letters of a value in which a pattern is looked for: a hostile row must not take minutes."""
MAX_DETAIL_CHARS = 80
MAX_LABELS = 127

_LINE = re.compile(
    r"\s*(?P<column>\S+)\s+(?P<how><=|>=|in|not in|matches|not matches)\s+(?P<value>.*?)(?P<missing>\s+or missing)?\s*",
    re.DOTALL,
)


class Missing(StrEnum):
    """What becomes of a row that has no value in a rule's column."""

    REJECT = "reject"
    KEEP = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule(Config):
    """Conditions on one column, all of which must hold."""

    column: str
    """Name of the column: one that the source gives, or one of ours such as width or caption_chars."""
    at_least: float | None = None
    """Least number that passes."""
    at_most: float | None = None
    """Greatest number that passes."""
    one_of: tuple[str, ...] = ()
    """The only values that pass; of `host`, a domain stands for its subdomains too."""
    none_of: tuple[str, ...] = ()
    """Values that do not pass."""
    matches: str = ""
    """Regular expression that must be found in the value."""
    matches_not: str = ""
    """Regular expression that must not be found in the value."""
    missing: Missing = Missing.REJECT
    """What becomes of rows without a value."""

    def __post_init__(self) -> None:
        """Refuse rules that say nothing, that nothing passes, or that can't be read."""
        if not self.column:
            raise ValueError("a rule needs the name of a column")
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if not (bounds or self.one_of or self.none_of or self.matches or self.matches_not):
            raise ValueError(
                f"the rule on {self.column} has no condition: give at_least, at_most, one_of, none_of, ..."
            )
        if any(math.isnan(bound) for bound in bounds) or bounds != sorted(bounds):
            raise ValueError(
                f"the rule on {self.column} lets nothing pass: at least {self.at_least}, at most {self.at_most}"
            )
        for pattern in (self.matches, self.matches_not):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the rule on {self.column} has a broken pattern {pattern!r}: {error}") from error

    def judge(self, value: JSON) -> Reject | None:
        """Return why a row with this value is left out, or None."""
        fault = self._fault(value)
        return None if fault is None else Reject(f"{REASON_PREFIX}{self.column}", fault)

    def _fault(self, value: JSON) -> str | None:
        text = text_of(value)
        number = number_of(value)
        has_bound = self.at_least is not None or self.at_most is not None
        if text is None or (has_bound and number is None):
            return (
                None if self.missing is Missing.KEEP else "missing" if text is None else f"{_short(text)} is no number"
            )
        if number is not None and self.at_least is not None and number < self.at_least:
            return f"{number:g} is below {self.at_least:g}"
        if number is not None and self.at_most is not None and number > self.at_most:
            return f"{number:g} is above {self.at_most:g}"
        return self._text_fault(text)

    def _text_fault(self, text: str) -> str | None:
        names = _domains(text) if self.column == "host" else (text,)
        if self.one_of and not any(name in self.one_of for name in names):
            return f"{_short(text)} is none of {', '.join(self.one_of)}"[: 2 * MAX_DETAIL_CHARS]
        if any(name in self.none_of for name in names):
            return f"{_short(text)} is refused"
        head = text[:MAX_MATCHED_CHARS]
        if self.matches and not _compiled(self.matches).search(head):
            return f"{_short(text)} does not match {_short(self.matches)}"
        if self.matches_not and (hit := _compiled(self.matches_not).search(head)):
            return f"{_short(hit.group())} matches {_short(self.matches_not)}"
        return None


def parse_rule(line: str) -> Rule:
    """Return the rule that a line such as `punsafe <= 0.5` says.

    Raises:
        ValueError: if it says none; names the forms there are.
    """
    said = _LINE.fullmatch(line)
    if said is None or not said["value"]:
        raise ValueError(
            "a rule is COLUMN, then <=, >=, in, not in, matches or not matches, then a value, and 'or missing' where "
            f"missing values pass; got {line!r}"
        )
    missing = Missing.KEEP if said["missing"] else Missing.REJECT
    column, value = said["column"], said["value"]
    match said["how"]:
        case "<=":
            return Rule(column=column, at_most=_bound(value, line), missing=missing)
        case ">=":
            return Rule(column=column, at_least=_bound(value, line), missing=missing)
        case "in":
            return Rule(column=column, one_of=_listed(value), missing=missing)
        case "not in":
            return Rule(column=column, none_of=_listed(value), missing=missing)
        case "matches":
            return Rule(column=column, matches=value, missing=missing)
        case _:
            return Rule(column=column, matches_not=value, missing=missing)


def number_of(value: JSON) -> float | None:
    """Return a value as a number, or None where it is none: text that says no number, NaN, infinities, lists."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def text_of(value: JSON) -> str | None:
    """Return a value as text, the same before and after it stood in a ledger; None where it is missing."""
    match value:
        case None | "":
            return None
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return None
        case dict() | list() | tuple():
            return json_text(value)
        case _:
            return str(value)


def _bound(value: str, line: str) -> float:
    number = number_of(value)
    if number is None:
        raise ValueError(f"{value!r} is no number to compare with, in the rule {line!r}")
    return number


def _listed(value: str) -> tuple[str, ...]:
    return tuple(name for part in value.split(",") if (name := part.strip()))


def _domains(host: str) -> tuple[str, ...]:
    """Return a host and all domains that it is in; a name of more than so many labels is no name of the net's."""
    labels = host.split(".", MAX_LABELS)
    return tuple(".".join(labels[start:]) for start in range(len(labels)))


def _short(text: str) -> str:
    return repr(text if len(text) <= MAX_DETAIL_CHARS else f"{text[:MAX_DETAIL_CHARS]}…")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
