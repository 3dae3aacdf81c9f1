"""Who falls, and for whom: decided from pairs of copies in rounds, in groups that workers hold one at a time.

The law: a row falls if a row that stays, and stands before it in order (generation, key), has the same bytes, the same
pixels, or a hash within k bits; it falls for the first such row. Nearness is not handed on: a row that fell takes
nobody with it (of a ~ b ~ c with a far from c, a and c stay). Equality is: what equals a fallen row falls for the same
row.

    pairs → letters: the later row waits for the earlier one, which knows of it
      → round: a row that waits for nobody any more is judged and answers those who wait for it; again, until all are

All copies of one picture meet in one group, so the commonest picture must fit into a worker: 200 bytes a copy, about.
That is the greedy independent set in a given order, found in parallel: keys are digests, so the order is as good as
random and rounds grow with the logarithm of the rows (Blelloch et al. 2012, theorem 3.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.ingest.duplicates import DuplicateConfig, Likeness, first_of_run, gather, spread
from pipeline.ingest.exchange import Exchange, Files, Spread, group_name

FALLEN = pa.schema([(name, pa.string()) for name in ("key", "place", "survivor", "reason", "detail")])
"""Rows that are left out: key, shard, key of the row that stays in its place, status in the ledger, and a detail."""

LETTERS = pa.schema(
    [
        ("generation", pa.int32()),
        ("key", pa.string()),
        ("place", pa.string()),
        ("letter", pa.int8()),
        ("other_generation", pa.int32()),
        ("other", pa.string()),
        ("other_place", pa.string()),
        ("likeness", pa.int8()),
        ("distance", pa.int8()),
    ]
)
"""What goes between rounds: a letter to the row (generation, key), a `Letter`, about another row."""

_ENDS = ("earlier", "later")
_TO = ["generation", "key", "place"]
_ABOUT = ["other_generation", "other", "other_place"]
_HOW = ["likeness", "distance"]
_BANDS_AND_DIGESTS = 3
"""Spread rows of a fingerprint, beside one for each bit of distance: bytes, pixels, and the first band."""


class Letter(IntEnum):
    """What a letter says; a row's claims come first, the best of them at the top."""

    CLAIM = 0
    """An answer: fall for the other row."""
    ACQUITTAL = 1
    """An answer: the row that you waited for fell, and is no reason to fall."""
    WAITS = 2
    """You wait for the other row."""
    AWAITED = 3
    """The other row waits for you."""


def find_duplicates(tables: Sequence[pa.Table], num_rows: int, config: DuplicateConfig, exchange: Exchange) -> Files:
    """Return the rows that fall, `FALLEN`, in files of the exchange.

    Args:
        tables: fingerprints (`duplicates.FINGERPRINTS`), cut and ordered anyhow.
        num_rows: rows in all of them, about.
        config: what counts as a copy.
        exchange: carries the steps out.
    """
    if not config.is_on:
        return Files()
    num_spread = num_rows * (_BANDS_AND_DIGESTS + (config.near_distance or 0))
    dealt = partial(spread, config=config)
    pairs = exchange.run("pairs", tables, num_spread, dealt, partial(_pairs, config=config)).get("pairs", Files())
    fallen = Files()
    pending, number = pairs, 0
    deal: Spread = _letters_of_pairs
    while pending.num_rows:
        num_letters = pending.num_rows if number else 2 * pending.num_rows
        made = exchange.run(f"round-{number:03d}", pending, num_letters, deal, judge)
        fallen += made.get("fallen", Files())
        pending, deal, number = made.get("pending", Files()), _dealt, number + 1
    return fallen


def judge(group: pa.Table) -> Mapping[str, pa.Table]:
    """Return the rows of a group that fall, and the letters to be dealt next: answers, and those not yet decided on."""
    order = [(name, "ascending") for name in ("generation", "key", "letter", "other_generation", "other", *_HOW)]
    rows = group.sort_by(order)
    letter = rows["letter"].to_numpy()
    first = first_of_run(rows["generation"].to_numpy(), _numbers(rows["key"]))
    is_head = first == np.arange(len(first))
    num_open = _sums(is_head, letter == Letter.WAITS) - _sums(is_head, letter <= Letter.ACQUITTAL)
    run = np.cumsum(is_head) - 1
    is_decided = (num_open == 0)[run]
    falls = is_decided & (letter[first] == Letter.CLAIM)
    awaited = is_decided & (letter == Letter.AWAITED)
    asked = [rows.filter(pa.array(awaited & ~falls)), rows.filter(pa.array(awaited & falls))]
    judged = np.flatnonzero(awaited & falls)
    pending = [rows.filter(pa.array(~is_decided)).select(LETTERS.names), _claims(asked[0])]
    if len(judged):
        pending += _handed_on(asked[1], rows.take(pa.array(first[judged])))
    return {
        group_name("fallen", group): _fallen(rows.filter(pa.array(falls & is_head))),
        group_name("pending", group): pa.concat_tables(pending),
    }


def _claims(asked: pa.Table) -> pa.Table:
    """Return answers of rows that stay: each who waited falls for them."""
    return _letters(Letter.CLAIM, asked, _ABOUT, asked, _TO, asked["likeness"], asked["distance"])


def _handed_on(asked: pa.Table, fates: pa.Table) -> list[pa.Table]:
    """Return answers of rows that fall: their equals fall for the same row, what was only near them need not."""
    is_equal = pc.equal(asked["distance"], 0)
    equal, fates = asked.filter(is_equal), fates.filter(is_equal)
    near = asked.filter(pc.invert(is_equal))
    likeness = pc.max_element_wise(equal["likeness"], fates["likeness"])
    return [
        _letters(Letter.CLAIM, equal, _ABOUT, fates, _ABOUT, likeness, fates["distance"]),
        _letters(Letter.ACQUITTAL, near, _ABOUT, near, _TO, near["likeness"], near["distance"]),
    ]


def _letters(
    letter: Letter,
    receivers: pa.Table,
    receiver: Sequence[str],
    others: pa.Table,
    other: Sequence[str],
    likeness: pa.ChunkedArray,
    distance: pa.ChunkedArray,
) -> pa.Table:
    kind = pa.array(np.full(len(receivers), letter, np.int8))
    to, about = ([table[name] for name in names] for table, names in ((receivers, receiver), (others, other)))
    return pa.table([*to, kind, *about, likeness, distance], schema=LETTERS)


def _pairs(group: pa.Table, config: DuplicateConfig) -> Mapping[str, pa.Table]:
    return {group_name("pairs", group): gather(group, config)}


def _letters_of_pairs(pairs: pa.Table, num_groups: int) -> pa.Table:
    """Return two letters a pair, with the groups of those they go to."""
    earlier, later = (["_".join(filter(None, (end, part))) for part in ("generation", "", "place")] for end in _ENDS)
    how = [pairs[name] for name in _HOW]
    told = [
        _letters(Letter.WAITS, pairs, later, pairs, earlier, *how),
        _letters(Letter.AWAITED, pairs, earlier, pairs, later, *how),
    ]
    return _dealt(pa.concat_tables(told), num_groups)


def _dealt(letters: pa.Table, num_groups: int) -> pa.Table:
    """Return letters with the group of the row that they go to."""
    return letters.append_column("group", group_of_key(letters["key"], num_groups))


def group_of_key(keys: pa.ChunkedArray, num_groups: int) -> pa.Array:
    """Return a group for each key, the same for equal keys; a key starts with eight hex digits of a digest."""
    digits = pc.utf8_slice_codeunits(keys, 0, 8).to_pylist()
    return pa.array([int(digit, 16) % num_groups for digit in digits], pa.int32())


def _fallen(claims: pa.Table) -> pa.Table:
    reasons = pa.array([Likeness(alike).reason for alike in claims["likeness"].to_pylist()], pa.string())
    distances = claims["distance"].to_pylist()
    details = pa.array([f"{apart} bits apart" if apart else "" for apart in distances], pa.string())
    return pa.table([claims["key"], claims["place"], claims["other"], reasons, details], schema=FALLEN)


def _numbers(keys: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return a number for each key, the same for equal keys."""
    numbers: NDArray[np.int64] = keys.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return numbers


def _sums(is_head: NDArray[np.bool_], flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how many flags each run has; a run begins where `is_head`."""
    sums: NDArray[np.int64] = np.add.reduceat(flags.astype(np.int64), np.flatnonzero(is_head))
    return sums
