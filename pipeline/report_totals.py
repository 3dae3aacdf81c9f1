"""What the data report adds up while ledgers pass by, one at a time: bounded in memory however many rows there are.

Counts by reason are exact. A column's values are exact until there are MAX_VALUES different ones, then kept to fewer
bits each. Names without end (hosts, survivors of duplicates) forget those with the fewest marks. Samples are the rows
with the smallest digests. None of it depends on chance or on the clock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.report_reasons import Stage, stage_of
from pipeline.store.ledger import OK
from pipeline.store.schema import JSON, Split

COLUMNS = (
    *("key", "source_row", "status", "detail", "duplicate_of", "url", "caption", "caption_chars"),
    *("original_width", "original_height", "num_bytes", "attributes", "scrubbed", "thumbnail"),
)
"""What is read of a ledger."""

MAX_VALUES = 8192
"""Different values kept of a column; more than the 4,200 pairs of sign and exponent that are left at no bits at all."""
MAX_NAMES = 1 << 16
"""Hosts, and survivors of duplicates, that are remembered."""
MAX_ATTRIBUTES = 64
"""Attributes of the source that are looked at; a listing may name them as it likes."""
MAX_ATTRIBUTE_ROWS = 1_000_000
"""Rows whose attributes are read, drawn at random where there are more: JSON is nine tenths of the work."""
MAX_REASONS = 64
"""Reasons of which rejected pictures are kept."""
NUM_PICTURES = 48
"""Pictures of each kind that are shown."""

DIGEST_BITS = 64
LARGEST_MEASURE = 2**53
"""Beyond this a whole number is an identifier (a hash), nothing whose histogram says anything."""

LEAST_MEASURE = 1e-30
"""Below this a number is counted as nought."""

# RE2, which runs in linear time: scheme, any user name, then the host, in brackets where it is an IPv6 address.
_HOST = r"^[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^/?#:@\[\]]+)"
_NUMBER = re.compile(r"[-+]?(\d{1,15}\.?\d{0,20}|\.\d{1,20})([eE][-+]?\d{1,3})?")


Item = TypeVar("Item")


class Spread:
    """How often each value of a column occurs."""

    def __init__(self) -> None:
        """Begin with no values."""
        self.values: NDArray[np.float64] = np.empty(0)
        self.counts: NDArray[np.int64] = np.empty(0, np.int64)
        self.num_bits = np.finfo(np.float64).nmant + 1

    def add(self, values: NDArray[np.float64]) -> None:
        """Count values in; those that are not finite are none."""
        finite = values[np.isfinite(values)]
        together = np.concatenate([self.values, finite])
        counts = np.concatenate([self.counts, np.ones(len(finite), np.int64)])
        self.values, self.counts = _merged(together, counts, self.num_bits)
        while len(self.values) > MAX_VALUES:
            # Rounding down bit by bit ends at the same values whatever the order they came in.
            self.num_bits = min(self.num_bits - 1, 16)
            self.values, self.counts = _merged(self.values, self.counts, self.num_bits)

    @property
    def num_rows(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def quantile(self, portion: float) -> float:
        """Return the value that this portion of all values does not exceed; needs at least one."""
        place = np.searchsorted(np.cumsum(self.counts), portion * self.num_rows)
        return float(self.values[min(int(place), len(self.values) - 1)])


class Tally:
    """Counts by name and reason; of too many names, those with the fewest rejected rows are forgotten."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        """Begin with no names."""
        self.max_names = max_names
        self.counts: dict[str, Counter[str]] = {}
        self.is_complete = True

    def add(self, name: str, reason: str, num_rows: int) -> None:
        """Count rows in."""
        self.counts.setdefault(name, Counter())[reason] += num_rows
        if len(self.counts) > 2 * self.max_names:
            self.counts = dict(self.largest(self.max_names))
            self.is_complete = False

    def largest(self, num_names: int) -> list[tuple[str, Counter[str]]]:
        """Return the names with the most rejected rows; of equals those with more rows, then in order."""
        ordered = sorted(self.counts.items(), key=lambda pair: (-num_rejected(pair[1]), -pair[1].total(), pair[0]))
        return ordered[:num_names]


class Sample(Generic[Item]):
    """The rows whose digests are smallest: drawn at random, and yet the same ones wherever it is done."""

    def __init__(self, num_items: int) -> None:
        """Begin with none of `num_items`."""
        self.num_items = num_items
        self.found: dict[int, Item] = {}
        self.limit = 1 << DIGEST_BITS

    def wants(self, key: str) -> bool:
        """Say whether a row may still be among the chosen ones."""
        return _digest(key) < self.limit

    def add(self, key: str, item: Item) -> None:
        """Offer a row."""
        self.found[_digest(key)] = item
        if len(self.found) >= 4 * self.num_items:
            chosen = sorted(self.found)[: self.num_items]
            self.found = {digest: self.found[digest] for digest in chosen}
            self.limit = chosen[-1]

    def items(self) -> list[Item]:
        """Return the chosen rows, smallest digest first."""
        return [self.found[digest] for digest in sorted(self.found)[: self.num_items]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRow:
    """A row to be shown.

    Attributes:
        split: the part of the dataset that its shard belongs to.
        shard: its shard's name.
        key: the row's key.
        status: "ok" or the reason it was rejected for.
        detail: what the reason says more.
        caption: the beginning of its first caption.
        width: of the original in pixels, 0 where unknown.
        height: of the original in pixels, 0 where unknown.
        thumbnail: a small JPEG of a rejected picture, or nothing.
    """

    split: Split
    shard: str
    key: str
    status: str
    detail: str
    caption: str
    width: int
    height: int
    thumbnail: bytes


class Column:
    """A measured column's values, of kept and of rejected rows."""

    def __init__(self) -> None:
        """Begin with no values."""
        self.kept = Spread()
        self.rejected = Spread()

    def add(self, values: NDArray[np.float64], is_kept: NDArray[np.bool_]) -> None:
        """Count one value a row in; NaN stands for none."""
        self.kept.add(values[is_kept])
        self.rejected.add(values[~is_kept])

    @property
    def num_rows(self) -> int:
        """How many rows have a value."""
        return self.kept.num_rows + self.rejected.num_rows

    @property
    def num_values(self) -> int:
        """How many different values there are."""
        return len(np.union1d(self.kept.values, self.rejected.values))

    @property
    def is_measure(self) -> bool:
        """Whether its values differ and none is so large that it can only be an identifier."""
        spreads = (self.kept, self.rejected)
        return self.num_values > 1 and all((np.abs(spread.values) < LARGEST_MEASURE).all() for spread in spreads)


class Totals:
    """Everything the report says of rows, added up ledger by ledger."""

    def __init__(self, num_rows: int) -> None:
        """Begin with no rows, of about `num_rows` to come."""
        self.attribute_share = min(1.0, MAX_ATTRIBUTE_ROWS / max(num_rows, 1))
        self.reasons: Counter[tuple[Stage, str]] = Counter()
        self.by_split: dict[Split, Counter[str]] = {split: Counter() for split in Split}
        self.short_side, self.aspect, self.caption_chars, self.num_bytes = (Column() for _ in range(4))
        self.attributes: dict[str, Column] = {}
        self.scrubbed: Counter[str] = Counter()
        self.scrubbed_rows: Counter[str] = Counter()
        self.hosts = Tally()
        self.survivors = Tally()
        self.kept: Sample[LedgerRow] = Sample(NUM_PICTURES)
        self.rejected: dict[str, Sample[LedgerRow]] = {}

    @property
    def num_rows(self) -> int:
        """Input rows."""
        return sum(counts.total() for counts in self.by_split.values())

    @property
    def num_kept(self) -> int:
        """Rows that are in the tars."""
        return sum(counts[OK] for counts in self.by_split.values())

    def add(self, split: Split, shard: str, ledger: pa.Table) -> None:
        """Add the ledger of one shard, of which COLUMNS are read."""
        is_kept = np.asarray(pc.equal(ledger["status"], OK))
        self._count(split, ledger)
        self._measure(ledger, is_kept)
        self._read_attributes(ledger, is_kept)
        self._count_scrubs(ledger["scrubbed"])
        self._count_duplicates(ledger)
        self._choose(split, shard, ledger, is_kept)

    def _count(self, split: Split, ledger: pa.Table) -> None:
        hosts = pc.utf8_lower(pc.struct_field(pc.extract_regex(ledger["url"], pattern=_HOST), "host"))
        facts = pa.table({"host": hosts, "status": ledger["status"]})
        groups = facts.group_by(["host", "status"], use_threads=False).aggregate([([], "count_all")])
        for group in groups.to_pylist():
            status, num_rows = group["status"], group["count_all"]
            self.by_split[split][status] += num_rows
            stage = stage_of(status)
            self.reasons[stage, status] += num_rows
            if group["host"] and stage not in (Stage.CAPTION, Stage.COLUMN):
                is_failure = stage in (Stage.FETCH, Stage.DECODE)
                self.hosts.add(group["host"], status if is_failure else OK, num_rows)

    def _measure(self, ledger: pa.Table, is_kept: NDArray[np.bool_]) -> None:
        width, height, chars, num_bytes = (
            np.asarray(ledger[name]).astype(np.float64)
            for name in ("original_width", "original_height", "caption_chars", "num_bytes")
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            self.aspect.add(np.where((width > 0) & (height > 0), width / height, np.nan), is_kept)
        for column, values in (
            (self.short_side, np.minimum(width, height)),
            (self.caption_chars, chars),
            (self.num_bytes, num_bytes),
        ):
            column.add(np.where(values > 0, values, np.nan), is_kept)

    def _read_attributes(self, ledger: pa.Table, is_kept: NDArray[np.bool_]) -> None:
        limit = round(self.attribute_share * (1 << DIGEST_BITS))
        keys, texts = ledger["key"].to_pylist(), ledger["attributes"].to_pylist()
        values: dict[str, list[float]] = defaultdict(list)
        owners: dict[str, list[int]] = defaultdict(list)
        for row, text in enumerate(texts):
            if text and text != "{}" and (self.attribute_share == 1 or _digest(keys[row]) < limit):
                for name, value in _mapping(text).items():
                    if (number := _number(value)) is not None:
                        values[name].append(number)
                        owners[name].append(row)
        for name in values:
            if name in self.attributes or len(self.attributes) < MAX_ATTRIBUTES:
                column = self.attributes.setdefault(name, Column())
                column.add(_in_range(np.array(values[name])), is_kept[owners[name]])

    def _count_scrubs(self, texts: pa.ChunkedArray) -> None:
        for group in texts.value_counts().to_pylist():
            for kind, num_found in _mapping(group["values"]).items():
                if (
                    isinstance(num_found, int)
                    and num_found > 0
                    and (kind in self.scrubbed or len(self.scrubbed) < MAX_REASONS)
                ):
                    self.scrubbed[kind] += num_found * group["counts"]
                    self.scrubbed_rows[kind] += group["counts"]

    def _count_duplicates(self, ledger: pa.Table) -> None:
        duplicates = ledger.select(["duplicate_of", "status"]).filter(pc.not_equal(ledger["duplicate_of"], ""))
        groups = duplicates.group_by(["duplicate_of", "status"], use_threads=False).aggregate([([], "count_all")])
        for group in groups.to_pylist():
            self.survivors.add(group["duplicate_of"], group["status"], group["count_all"])

    def _choose(self, split: Split, shard: str, ledger: pa.Table, is_kept: NDArray[np.bool_]) -> None:
        keys = ledger["key"].to_pylist()
        has_thumbnail = np.asarray(pc.greater(pc.binary_length(ledger["thumbnail"]), 0))
        for row in np.flatnonzero(is_kept):
            if self.kept.wants(keys[row]):
                self.kept.add(keys[row], row_of(split, shard, ledger, int(row)))
        for row in np.flatnonzero(~is_kept & has_thumbnail):
            found = row_of(split, shard, ledger, int(row))
            if found.status in self.rejected or len(self.rejected) < MAX_REASONS:
                self.rejected.setdefault(found.status, Sample(NUM_PICTURES)).add(found.key, found)


def num_rejected(counts: Mapping[str, int]) -> int:
    """Return how many of these rows were not kept."""
    return sum(num_rows for reason, num_rows in counts.items() if reason != OK)


def row_of(split: Split, shard: str, ledger: pa.Table, row: int) -> LedgerRow:
    """Return one row of a shard's ledger."""
    facts = ledger.slice(row, 1).to_pylist()[0]
    return LedgerRow(
        split=split,
        shard=shard,
        key=facts["key"],
        status=facts["status"],
        detail=facts["detail"],
        caption=facts["caption"],
        width=facts["original_width"],
        height=facts["original_height"],
        thumbnail=facts["thumbnail"],
    )


def _merged(
    values: NDArray[np.float64], counts: NDArray[np.int64], num_bits: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    mantissas, exponents = np.frexp(values)
    rounded = np.ldexp(np.floor(np.ldexp(mantissas, num_bits)), exponents - num_bits)
    unique, places = np.unique(rounded, return_inverse=True)
    sums = np.zeros(len(unique), np.int64)
    np.add.at(sums, places, counts)
    return unique, sums


def _digest(key: str) -> int:
    # Keys are digests themselves, but by them rows are split and shared out: a sample has to draw anew.
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=DIGEST_BITS // 8, person=b"report").digest())


def _number(value: JSON) -> float | None:
    """Return an attribute as a number, be it one or the text of one; None for anything else, flags included."""
    kind = type(value)
    if kind is float:
        return float(value)
    if kind is int:
        return float(max(-LARGEST_MEASURE, min(LARGEST_MEASURE, value)))  # it may be too long for a float
    return float(value) if kind is str and _NUMBER.fullmatch(value) else None


def _in_range(values: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(np.where(np.isinf(values), np.nan, values), -LARGEST_MEASURE, LARGEST_MEASURE)
    return np.where(np.abs(clipped) < LEAST_MEASURE, 0.0, clipped)


def _mapping(text: str) -> Mapping[str, JSON]:
    """Return the mapping a ledger's JSON holds; what is none, or nested without end, holds nothing to count."""
    if text in ("", "{}"):
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
