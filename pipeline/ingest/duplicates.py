"""Which rows are copies of each other, over all shards and earlier runs: equal bytes, pixels, or nearly equal hashes.

    fingerprints (generation, key, place, payload_sha256, pixel_sha256, perceptual_hash)
      → spread: each row to the groups of its bytes, of its pixels, and of each of the k + 1 bands of its hash
      → gather: within a group, pairs of copies, the earlier row first                     (the only step that compares)

Who falls follows from the pairs (`fates`). A picture that stands there 100,000 times is compared as one, and a crowded
band is cut again (`hash_pairs`). Pictures without a hash (`fingerprints.LOW_INFORMATION`) are compared by bytes and by
pixels alone.

Equal bytes must come with equal pixels, and equal pixels with an equal hash: each is a function of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ldm.config import Config
from pipeline.ingest.fingerprints import HASH_BITS
from pipeline.ingest.hash_pairs import Cut, close_pairs

MAX_NEAR_DISTANCE = 8
"""Beyond this many bits different pictures are called alike, and bands are too narrow to spare any comparing."""

FINGERPRINTS = pa.schema(
    [
        ("generation", pa.int32()),
        ("key", pa.string()),
        ("place", pa.string()),
        ("payload_sha256", pa.string()),
        ("pixel_sha256", pa.string()),
        ("perceptual_hash", pa.uint64()),
    ]
)
"""What `spread` reads, one row of a dataset each: digests in hex, "" where there is none; no key comes twice."""
SPREAD = pa.schema(
    [
        ("group", pa.int32()),
        ("kind", pa.int8()),
        ("high", pa.uint64()),
        ("low", pa.uint64()),
        ("generation", pa.int32()),
        ("key", pa.string()),
        ("place", pa.string()),
        ("perceptual_hash", pa.uint64()),
    ]
)
"""What `spread` writes: rows of equal (kind, high, low) may be copies of each other, and share their group."""
EDGES = pa.schema(
    [
        ("earlier_generation", pa.int32()),
        ("earlier", pa.string()),
        ("earlier_place", pa.string()),
        ("later_generation", pa.int32()),
        ("later", pa.string()),
        ("later_place", pa.string()),
        ("likeness", pa.int8()),
        ("distance", pa.int8()),
    ]
)
"""What `gather` writes: two rows that are copies of each other, a `Likeness`, and the bits that their hashes differ in;
distance 0 says that they are equal in what was compared."""

_NAMING = ("generation", "key", "place")
_ALL_BITS = 2**HASH_BITS - 1
_DIGEST_DIGITS = 32
"""Hex digits of a digest that are compared: 128 bits, so that no two of 10^12 pictures meet."""


class Likeness(IntEnum):
    """How two rows are copies of each other, the strongest first."""

    BYTES = 0
    PIXELS = 1
    NEAR = 2

    @property
    def reason(self) -> str:
        """The status of the later row in the ledger."""
        return ("duplicate_bytes", "duplicate_pixels", "near_duplicate")[self]


_FIRST_BAND = 2
"""Kinds of spread rows: BYTES, PIXELS, and from this on the bands of the hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateConfig(Config):
    """Which rows count as copies of each other; of copies the first in order (generation, key) stays."""

    exact: bool = True
    """Leave out rows whose bytes or whose stored pixels are equal to another's."""
    near_distance: int | None = None
    """Leave out rows whose 64-bit perceptual hash differs from another's in at most this many bits; none compares no
    hashes. 4 finds what was re-encoded or resized."""

    def __post_init__(self) -> None:
        """Refuse distances at which different pictures are alike."""
        if self.near_distance is not None and not 0 <= self.near_distance <= MAX_NEAR_DISTANCE:
            raise ValueError(f"near_distance must be from 0 to {MAX_NEAR_DISTANCE}, got {self.near_distance}")

    @property
    def is_on(self) -> bool:
        """Whether any row can be left out."""
        return self.exact or self.near_distance is not None


def spread(table: pa.Table, num_groups: int, config: DuplicateConfig) -> pa.Table:
    """Return each fingerprint once for each thing that it may share with a copy, with the group that decides it."""
    parts = [SPREAD.empty_table()]
    if config.exact:
        parts.append(_by_digest(table, "payload_sha256", Likeness.BYTES, num_groups))
        parts.append(_by_digest(table, "pixel_sha256", Likeness.PIXELS, num_groups))
    if config.near_distance is not None:
        hashed = table.filter(pc.is_valid(table["perceptual_hash"]))
        for band, (mask, _) in enumerate(_whole().bands(config.near_distance)):
            shared = hashed["perceptual_hash"].to_numpy() & np.uint64(mask)
            parts.append(_spread_rows(hashed, _FIRST_BAND + band, shared, np.zeros_like(shared), num_groups))
    return pa.concat_tables(parts)


def gather(group: pa.Table, config: DuplicateConfig) -> pa.Table:
    """Return the pairs of copies in one group, `EDGES`; the order of its rows is of no matter.

    Copies that are equal in something all hang on the first of them, so there are fewer such pairs than rows; hashes
    that differ are compared once for all rows that share them.
    """
    rows = group.sort_by([(name, "ascending") for name in ("kind", "high", "low", "generation", "key")])
    kind, high, low = (rows[name].to_numpy() for name in ("kind", "high", "low"))
    bucket = first_of_run(kind, high, low)
    is_exact = kind < _FIRST_BAND
    parts = [_hang_on_the_first(rows, np.flatnonzero(is_exact), bucket[is_exact], kind[is_exact])]
    if config.near_distance is not None:
        for band, (_, cut) in enumerate(_whole().bands(config.near_distance)):
            members = np.flatnonzero(kind == _FIRST_BAND + band)
            parts += _near(rows, members, bucket[members], cut, config.near_distance)
    return pa.concat_tables(parts)


def _whole() -> Cut:
    return Cut(free=_ALL_BITS, unlike=())


def _by_digest(table: pa.Table, column: str, kind: Likeness, num_groups: int) -> pa.Table:
    present = table.filter(pc.not_equal(table[column], ""))
    digits = "".join(pc.utf8_slice_codeunits(present[column], 0, _DIGEST_DIGITS).to_pylist())
    assert len(digits) == _DIGEST_DIGITS * len(present), f"{column} holds no hex digest"
    words = np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64).reshape(-1, 2)
    nameless = present.set_column(
        present.schema.get_field_index("perceptual_hash"),
        "perceptual_hash",
        pa.nulls(len(present), pa.uint64()),
    )
    return _spread_rows(nameless, kind, words[:, 0], words[:, 1], num_groups)


def _spread_rows(
    table: pa.Table, kind: int, high: NDArray[np.uint64], low: NDArray[np.uint64], num_groups: int
) -> pa.Table:
    columns = {
        "group": (_mixed(high ^ low ^ np.uint64(kind)) % np.uint64(num_groups)).astype(np.int32),
        "kind": np.full(len(table), kind, np.int8),
        "high": high,
        "low": low,
        **{name: table[name] for name in (*_NAMING, "perceptual_hash")},
    }
    return pa.table(columns, schema=SPREAD)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers spread evenly whatever the words are: the finalizer of splitmix64 (Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def first_of_run(*columns: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return for each row of sorted columns the first row that equals it in all of them."""
    num_rows = len(columns[0])
    is_first = np.zeros(num_rows, bool)
    is_first[:1] = True
    for column in columns:
        is_first[1:] |= column[1:] != column[:-1]
    first: NDArray[np.int64] = np.maximum.accumulate(np.where(is_first, np.arange(num_rows), 0))
    return first


def _hang_on_the_first(
    rows: pa.Table, members: NDArray[np.int64], first: NDArray[np.int64], likeness: NDArray[np.int8]
) -> pa.Table:
    is_later = first != members
    return _edges(rows, first[is_later], members[is_later], likeness[is_later], np.zeros(is_later.sum(), np.int8))


def _near(
    rows: pa.Table, members: NDArray[np.int64], bucket: NDArray[np.int64], cut: Cut, distance: int
) -> Iterator[pa.Table]:
    """Yield the pairs of one band: equal hashes hang on the first (from the first band only), then those apart."""
    if not len(members):
        return
    hashes = rows["perceptual_hash"].take(pa.array(members)).to_numpy()
    order = np.lexsort((members, hashes, bucket))
    members, hashes, bucket = members[order], hashes[order], bucket[order]
    first = first_of_run(bucket, hashes)
    if not cut.unlike:
        yield _hang_on_the_first(rows, members, members[first], np.full(len(members), Likeness.NEAR, np.int8))
    distinct = np.flatnonzero(first == np.arange(len(first)))
    distinct = distinct[np.lexsort((members[distinct], bucket[distinct]))]
    earlier, later = close_pairs(hashes[distinct], distinct, bucket[distinct], cut, distance)
    apart = np.bitwise_count(hashes[earlier] ^ hashes[later]).astype(np.int8)
    yield _edges(rows, members[earlier], members[later], np.full(len(apart), Likeness.NEAR, np.int8), apart)


def _edges(
    rows: pa.Table,
    earlier: NDArray[np.int64],
    later: NDArray[np.int64],
    likeness: NDArray[np.int8],
    distance: NDArray[np.int8],
) -> pa.Table:
    ends = rows.select(list(_NAMING))
    columns = [*ends.take(pa.array(earlier)).columns, *ends.take(pa.array(later)).columns]
    return pa.table([*columns, pa.array(likeness), pa.array(distance)], schema=EDGES)
