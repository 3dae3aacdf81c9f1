"""What is taken out of captions before anything reads them: addresses, numbers to call, markup, characters not seen.

Order of one round: characters that nobody sees → markup (HTML entities and tags, BBCode) → URLs → e-mail addresses →
bare hosts → phone numbers → Unicode NFC, single spaces. Taking one thing out may bring another together
(`ht<b></b>tp://`), so rounds follow until one changes nothing; a text that is not at rest after MAX_ROUNDS was made to
escape and is dropped. So to scrub what was scrubbed changes nothing, and the time is linear in the text, whatever it
holds.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ldm.config import Config
from pipeline.ingest import caption_patterns as patterns

MAX_ROUNDS = 6
"""Most captions take one round, or two where something was found; an honest one was never seen to need four."""


class Kind(StrEnum):
    """What is looked for; the counts go by these names."""

    EMAIL = "email"
    URL = "url"
    PHONE = "phone"
    MARKUP = "markup"
    UNSEEN = "unseen"
    UNSETTLED = "unsettled"


class Treatment(StrEnum):
    """What becomes of something found."""

    KEEP = "keep"
    REMOVE = "remove"
    REPLACE = "replace"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScrubConfig(Config):
    """What is taken out of captions; spaces are made single and Unicode NFC in any case."""

    emails: Treatment = Treatment.REMOVE
    """E-mail addresses, also as `name (at) host (dot) org`; replace leaves "(email)"."""
    urls: Treatment = Treatment.REMOVE
    """URLs and bare host names such as `www.example.com/x`; replace leaves "(url)"."""
    phones: Treatment = Treatment.REMOVE
    """Phone numbers, international and in common national forms; replace leaves "(phone)"."""
    has_markup: bool = False
    """Leave HTML tags and entities and BBCode as they are."""
    has_unseen: bool = False
    """Leave control characters, zero-width characters and bidi overrides as they are."""


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """A caption after scrubbing.

    Attributes:
        text: what is left; empty where nothing but punctuation is left of what was scrubbed.
        counts: how many of each kind were found; a `Kind` to a number above 0.
    """

    text: str
    counts: Mapping[str, int]


def scrub(text: str, config: ScrubConfig) -> Scrubbed:
    """Return a caption without what `config` takes out, and how much of each kind that was."""
    counts: Counter[Kind] = Counter()
    for _ in range(MAX_ROUNDS):
        before = text
        text = _round(text, config, counts)
        if text == before:
            is_left = not counts or _says_something(text)
            return Scrubbed(text if is_left else "", _by_name(counts))
    counts[Kind.UNSETTLED] += 1
    return Scrubbed("", _by_name(counts))


def _round(text: str, config: ScrubConfig, counts: Counter[Kind]) -> str:
    num_found = counts.total()
    if not config.has_unseen and not text.isprintable():
        text = _without_unseen(text, counts)
    if not config.has_markup:
        text = _without_markup(text, counts)
    has_host = "." in text or ":" in text
    if config.urls is not Treatment.KEEP and has_host:
        text = _without(patterns.URL, text, Kind.URL, config.urls, counts)
    if config.emails is not Treatment.KEEP and patterns.EMAIL_HINT.search(text):
        text = _without(patterns.EMAIL, text, Kind.EMAIL, config.emails, counts)
    if config.urls is not Treatment.KEEP and has_host:
        text = _without(patterns.HOST, text, Kind.URL, config.urls, counts)
    if config.phones is not Treatment.KEEP and patterns.PHONE_HINT.search(text):
        text = _without_phones(text, config.phones, counts)
    text = " ".join(text.split())
    if counts.total() > num_found:
        text = " ".join(patterns.EMPTY_BRACKETS.sub(" ", text).split())
    return text if text.isascii() else unicodedata.normalize("NFC", patterns.MARK_RUN.sub(r"\1", text))


def _without(pattern: re.Pattern[str], text: str, kind: Kind, treatment: Treatment, counts: Counter[Kind]) -> str:
    text, num_found = pattern.subn(_left(kind, treatment), text)
    _count(counts, kind, num_found)
    return text


def _without_phones(text: str, treatment: Treatment, counts: Counter[Kind]) -> str:
    def left(found: re.Match[str]) -> str:
        if not patterns.is_phone(found):
            return found[0]
        counts[Kind.PHONE] += 1
        return (found["label"] or "") + _left(Kind.PHONE, treatment)

    return patterns.PHONE.sub(left, text)


def _left(kind: Kind, treatment: Treatment) -> str:
    return f" ({kind.value}) " if treatment is Treatment.REPLACE else " "


def _without_unseen(text: str, counts: Counter[Kind]) -> str:
    kept = patterns.UNSEEN.sub(lambda found: found[1] or "", text)
    _count(counts, Kind.UNSEEN, len(text) - len(kept))
    return kept


def _without_markup(text: str, counts: Counter[Kind]) -> str:
    if "&" in text:
        text = _counted(patterns.ENTITY, _decoded, text, counts)
    if "<" in text:
        text = _counted(patterns.TAG, _without_tag, text, counts)
    if "[" in text:
        ended = {name.lower() for name in patterns.BBCODE_END.findall(text)}
        text = _counted(patterns.BBCODE, lambda found: _without_bbcode(found, ended), text, counts)
    return text


def _counted(
    pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str, counts: Counter[Kind]
) -> str:
    def replaced(found: re.Match[str]) -> str:
        left = replace(found)
        _count(counts, Kind.MARKUP, int(left != found[0]))
        return left

    return pattern.sub(replaced, text)


def _decoded(entity: re.Match[str]) -> str:
    """Return the character of an entity; an unknown name stays as it is."""
    written = f"&{entity[1]}"
    decoded = html.unescape(written)
    return entity[0] if decoded == written else decoded


def _without_tag(tag: re.Match[str]) -> str:
    name = (tag["name"] or tag["cut"] or "br").lower()
    if name not in patterns.TAGS:
        return tag[0]
    return "" if name in patterns.INLINE_TAGS else " "


def _without_bbcode(tag: re.Match[str], ended: set[str]) -> str:
    is_markup = tag[2] is not None or tag[1].lower() in ended
    return "" if is_markup else tag[0]


def _count(counts: Counter[Kind], kind: Kind, num_found: int) -> None:
    if num_found:
        counts[kind] += num_found


def _by_name(counts: Counter[Kind]) -> dict[str, int]:
    return {kind.value: counts[kind] for kind in Kind if counts[kind]}


def _says_something(text: str) -> bool:
    """Return whether a letter, a digit or a sign such as an emoji is left, placeholders aside."""
    for kind in (Kind.EMAIL, Kind.URL, Kind.PHONE):
        text = text.replace(_left(kind, Treatment.REPLACE).strip(), "")
    return any(unicodedata.category(letter)[0] in "LN" or unicodedata.category(letter) == "So" for letter in text)
