"""Laws of duplicates: who falls is what comparing every row with every row says, however the rows are cut and dealt."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest.duplicates import FINGERPRINTS, DuplicateConfig, gather, spread
from pipeline.ingest.exchange import Exchange, Gather, Shuffle, Spread, shuffle_here
from pipeline.ingest.fates import find_duplicates
from pipeline.ingest.hash_pairs import Cut, band_masks, close_pairs

ALL_BITS = 2**64 - 1


@dataclass(frozen=True)
class Duplicate:
    """Why a row is left out: the key of the row that stays, the status, and the detail."""

    of: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Row:
    generation: int
    key: str
    payload: str
    pixels: str
    hash: int | None

    @property
    def place(self) -> str:
        return f"train/{int(self.key[:8], 16) % 7:06d}"

    @property
    def order(self) -> tuple[int, str]:
        return self.generation, self.key


def digest(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def picture(key: str, content: object, encoding: int = 0, hash: int | None = None, generation: int = 0) -> Row:
    return Row(generation, key, digest((content, encoding)), digest(content), hash)


def table(rows: Sequence[Row]) -> pa.Table:
    lines = [(row.generation, row.key, row.place, row.payload, row.pixels, row.hash) for row in rows]
    columns = zip(*lines, strict=True) if lines else ((),) * len(FINGERPRINTS)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, FINGERPRINTS, strict=True)], schema=FINGERPRINTS
    )


def found(
    rows: Sequence[Row], config: DuplicateConfig, shuffle: Shuffle = shuffle_here, cuts: int = 1, group: int = 9
) -> dict[str, Duplicate]:
    """Run the search on rows in so many tables, with so many rows in a group."""
    return found_in([table(rows[first::cuts]) for first in range(cuts)], config, shuffle, group)


def found_in(tables: Sequence[pa.Table], config: DuplicateConfig, shuffle: Shuffle, group: int) -> dict[str, Duplicate]:
    with tempfile.TemporaryDirectory() as folder:
        exchange = Exchange(folder, shuffle, rows_per_group=group)
        files = find_duplicates(tables, sum(map(len, tables)), config, exchange)
        lines = [line for part in files for line in part.to_pylist()]
    assert len(lines) == files.num_rows
    place_of = {row["key"]: row["place"] for part in tables for row in part.to_pylist()}
    assert {line["key"]: line["place"] for line in lines} == {line["key"]: place_of[line["key"]] for line in lines}
    assert len({line["key"] for line in lines}) == len(lines), "a row falls once"
    return {line["key"]: Duplicate(line["survivor"], line["reason"], line["detail"]) for line in lines}


def bits(apart: int) -> str:
    return f"{apart} bits apart" if apart else ""


def likeness(one: Row, other: Row, config: DuplicateConfig) -> tuple[str, int] | None:
    """How two rows are copies of each other, by the definition."""
    if config.exact and one.payload and one.payload == other.payload:
        return "duplicate_bytes", 0
    if config.exact and one.pixels and one.pixels == other.pixels:
        return "duplicate_pixels", 0
    if config.near_distance is not None and one.hash is not None and other.hash is not None:
        apart = bin(one.hash ^ other.hash).count("1")
        return ("near_duplicate", apart) if apart <= config.near_distance else None
    return None


def by_comparing_all(rows: Sequence[Row], config: DuplicateConfig) -> dict[str, Duplicate]:
    stays: list[Row] = []
    falls = {}
    for row in sorted(rows, key=lambda row: row.order):
        alike = next(((other, how) for other in stays if (how := likeness(row, other, config))), None)
        if alike is None:
            stays.append(row)
        else:
            other, (reason, apart) = alike
            falls[row.key] = Duplicate(of=other.key, reason=reason, detail=bits(apart))
    return falls


@st.composite
def datasets(draw: st.DrawFn) -> list[Row]:
    """Rows with many copies: a few hashes with few bits flipped, a few pictures for each, a few encodings of each."""
    centres = draw(st.lists(st.integers(0, ALL_BITS), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=5).map(lambda places: sum(1 << place for place in set(places)))
    hashes = draw(st.lists(st.tuples(st.sampled_from(centres), flips), min_size=1, max_size=12))
    pictures = [(i, centre ^ flipped) for i, (centre, flipped) in enumerate(hashes)] + [("flat", None), ("sky", None)]
    chosen = st.tuples(st.sampled_from(pictures), st.integers(0, 2), st.integers(0, 2))
    rows = draw(st.lists(chosen, max_size=40))
    order = draw(st.permutations(range(len(rows))))
    return [
        picture(digest(place)[:24], content, encoding, value, generation)
        for place, ((content, value), encoding, generation) in zip(order, rows, strict=True)
    ]


CONFIGS = st.builds(DuplicateConfig, exact=st.booleans(), near_distance=st.none() | st.integers(0, 8))


@settings(max_examples=150, deadline=None)
@given(datasets(), CONFIGS)
def test_duplicates_are_those_that_comparing_every_row_with_every_row_finds(rows, config):
    assert found(rows, config) == by_comparing_all(rows, config)


@settings(max_examples=60, deadline=None)
@given(datasets(), CONFIGS, st.randoms(use_true_random=False), st.integers(1, 6), st.integers(1, 200))
def test_duplicates_are_the_same_however_rows_are_ordered_cut_and_dealt(rows, config, chance, num_tables, group):
    expected = found(rows, config, group=10**6)
    mixed = chance.sample(rows, len(rows))

    def shuffle_backwards(
        tables: Sequence[pa.Table], spread: Spread, gather: Gather, num_groups: int
    ) -> Iterator[pa.Table]:
        rows = pa.concat_tables([spread(table, num_groups) for table in tables]).to_pylist()
        chance.shuffle(rows)
        schema = spread(tables[0], num_groups).schema
        for group in sorted({row["group"] for row in rows}, reverse=True):
            yield gather(pa.Table.from_pylist([row for row in rows if row["group"] == group], schema=schema))

    assert found(mixed, config, shuffle_here, num_tables, group) == expected
    assert found(mixed, config, shuffle_backwards, num_tables, group) == expected


def test_the_survivor_is_the_first_in_order_of_generation_then_key():
    rows = [picture("a", "dog", generation=1), picture("f", "dog", generation=0), picture("b", "dog", generation=1)]
    assert found(rows, DuplicateConfig()) == {
        "a": Duplicate("f", "duplicate_bytes", ""),
        "b": Duplicate("f", "duplicate_bytes", ""),
    }


def test_a_row_that_fell_takes_nobody_with_it():
    chain = [picture(key, key, hash=value) for key, value in [("a", 0b000000), ("b", 0b000111), ("c", 0b111111)]]
    assert found(chain, DuplicateConfig(near_distance=3)) == {"b": Duplicate("a", "near_duplicate", bits(3))}


def test_what_equals_a_fallen_row_falls_for_the_same_row():
    rows = [picture("a", "dog", hash=0), picture("b", "dog again", hash=1), picture("c", "dog again", hash=1)]
    assert found(rows, DuplicateConfig(near_distance=1)) == {
        "b": Duplicate("a", "near_duplicate", bits(1)),
        "c": Duplicate("a", "near_duplicate", bits(1)),
    }
    assert found(rows, DuplicateConfig()) == {"c": Duplicate("b", "duplicate_bytes", "")}


def test_equal_pixels_of_other_bytes_are_named_so():
    rows = [picture("a", "dog", encoding=1), picture("b", "dog", encoding=2), picture("c", "dog", encoding=2)]
    assert found(rows, DuplicateConfig()) == {
        "b": Duplicate("a", "duplicate_pixels", ""),
        "c": Duplicate("a", "duplicate_pixels", ""),
    }


def test_pictures_without_a_hash_or_a_digest_are_not_copies_of_each_other():
    rows = [picture("a", "white"), picture("b", "black"), Row(0, "c", "", "", None), Row(0, "d", "", "", None)]
    assert found(rows, DuplicateConfig(near_distance=8)) == {}


@pytest.mark.parametrize("config", [DuplicateConfig(), DuplicateConfig(near_distance=4)])
def test_no_rows_have_no_duplicates(config):
    assert found_in([], config, shuffle_here, 9) == {}
    assert found([], config) == {}


def test_duplicates_switched_off_finds_none():
    rows = [picture("a", "dog"), picture("b", "dog")]
    assert not DuplicateConfig(exact=False).is_on
    assert found(rows, DuplicateConfig(exact=False)) == {}


@pytest.mark.parametrize("distance", [-1, 9])
def test_a_distance_at_which_different_pictures_are_alike_is_refused(distance):
    with pytest.raises(ValueError, match=f"near_distance must be from 0 to 8, got {distance}"):
        DuplicateConfig(near_distance=distance)


# --- what it costs --------------------------------------------------------------------------------------------------


def test_a_picture_that_occurs_a_hundred_thousand_times_is_compared_as_one():
    """Each copy hangs on the first, once for its bytes, its pixels and its hash; no copy is compared with a copy."""
    num_copies = 100_000
    content, pixels = digest("bytes"), digest("pixels")
    copies = pa.table(
        [
            [0] * num_copies,
            [f"{i:024x}" for i in range(num_copies)],
            ["train/000000"] * num_copies,
            [content] * num_copies,
            [pixels] * num_copies,
            [12345] * num_copies,
        ],
        schema=FINGERPRINTS,
    )
    config = DuplicateConfig(near_distance=4)
    edges = pa.concat_tables(
        shuffle_here(
            [copies], lambda rows, num_groups: spread(rows, num_groups, config), lambda rows: gather(rows, config), 8
        )
    )
    assert len(edges) == 3 * (num_copies - 1)
    fallen = found_in([copies], config, shuffle_here, 100_000)
    assert len(fallen) == num_copies - 1
    assert set(fallen.values()) == {Duplicate("0" * 24, "duplicate_bytes", "")}


def test_pairs_of_a_crowded_bucket_are_those_of_comparing_each_with_each():
    """One bucket with more hashes than are compared at once, in clusters, so that it is cut into bands again, twice."""
    draw = np.random.default_rng(7)
    centres = draw.integers(0, 2**48, 40, np.uint64)
    flips = np.uint64(1) << draw.integers(0, 48, (6_000, 3), np.uint64)
    hashes = np.unique(centres[draw.integers(0, 40, 6_000)] ^ np.bitwise_xor.reduce(flips, axis=1))
    draw.shuffle(hashes)
    assert len(hashes) > 5_000
    cut = Cut(free=2**48 - 1, unlike=())
    earlier, later = close_pairs(hashes, np.arange(len(hashes)), np.zeros(len(hashes), np.int64), cut, 3)
    listed = list(zip(earlier.tolist(), later.tolist(), strict=True))
    assert len(set(listed)) == len(listed), "a pair is reported once"
    differing = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= 3
    assert sorted(listed) == sorted(zip(*map(np.ndarray.tolist, np.nonzero(np.triu(differing, 1))), strict=True))


@given(st.integers(1, 9), st.integers(1, ALL_BITS))
def test_bands_part_the_bits_evenly(num_bands, bits):
    masks = band_masks(bits, num_bands)
    assert len(masks) == num_bands
    assert sum(masks) == bits
    assert all(not one & other for one, other in combinations(masks, 2))
    sizes = [mask.bit_count() for mask in masks]
    assert max(sizes) - min(sizes) <= 1


def test_no_pair_at_the_full_distance_is_missed():
    """Bits flipped in all places that a band could have, 2,000 random pairs for each distance."""
    chance = random.Random(3)
    for distance in range(9):
        rows = []
        for number in range(500):
            value = chance.getrandbits(64)
            flipped = value ^ sum(1 << place for place in chance.sample(range(64), distance))
            rows += [
                picture(f"a{number:07}", ("a", number), hash=value),
                picture(f"b{number:07}", ("b", number), hash=flipped),
            ]
        fallen = found(rows, DuplicateConfig(near_distance=distance), group=4_000)
        assert fallen == {
            f"b{number:07}": Duplicate(f"a{number:07}", "near_duplicate", bits(distance)) for number in range(500)
        }
