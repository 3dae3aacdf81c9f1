"""Laws of a changed filter: what it would do to finished shards is told from their ledgers alone."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest.filters import (
    LEDGER_COLUMNS,
    FilterChange,
    FilterConfig,
    changes,
    kept_captions,
    reject_before_fetch,
    reject_measured,
)
from pipeline.store.ledger import LedgerLine, read_ledger, write_ledger
from pipeline.store.schema import Reject, SourceRow, json_text


def line(place: int, status="ok", captions=("a red dog",), size=(400, 300), num_bytes=1000, **attributes) -> LedgerLine:
    return LedgerLine(
        key=f"{place:024x}",
        source_row=place,
        status=status,
        url=f"https://host{place % 3}.example.com/{place}.jpg",
        caption=captions[0][:200] if captions else "",
        caption_chars=len(captions[0]) if captions else 0,
        num_captions=len(captions),
        original_width=size[0],
        original_height=size[1],
        num_bytes=num_bytes,
        attributes=json_text(attributes),
    )


def ledger(*lines: LedgerLine) -> pa.Table:
    return pa.Table.from_pylist([{name: getattr(each, name) for name in LEDGER_COLUMNS} for each in lines])


def where(*lines: str, **limits) -> FilterConfig:
    return FilterConfig(where=lines, **limits)


@st.composite
def attributes_of_rows(draw: st.DrawFn) -> dict:
    score = st.floats(0, 1).map(lambda value: round(value, 2)) | st.sampled_from([None, "0.4", "x", math.nan])
    found = {"punsafe": draw(score), "LICENSE": draw(st.sampled_from(["CC0", "CC-BY", "", None]))}
    return {name: value for name, value in found.items() if draw(st.booleans())}


FILTERS = st.builds(
    FilterConfig,
    where=st.lists(
        st.sampled_from(
            ["punsafe <= 0.5", "punsafe >= 0.2 or missing", "licence in CC0", "width >= 300", "aspect <= 2"]
            + ["num_bytes <= 500", "host not in host1.example.com", "caption matches d", "caption_chars <= 5"]
        ),
        max_size=3,
    ).map(tuple),
    min_side=st.sampled_from([1, 200]),
    max_aspect=st.sampled_from([100.0, 1.5]),
    min_caption_chars=st.sampled_from([1, 4]),
    max_caption_chars=st.sampled_from([8, 1000]),
)
OFFERED = st.tuples(
    st.sampled_from([("a",), ("a red dog",), ("a red dog", "dogs"), ("dogs", "a red dog", "b"), ("x" * 300,)]),
    st.sampled_from([(400, 300), (100, 300), (600, 200)]),
    st.integers(1, 1000),
    attributes_of_rows(),
)


def made(place: int, offered: tuple, config: FilterConfig) -> tuple[LedgerLine, tuple[str, ...]]:
    """The ledger's line of a row, and its captions, as ingest makes them."""
    captions, size, num_bytes, attributes = offered
    kept = kept_captions(captions, config)
    if isinstance(kept, Reject):
        return line(place, kept.reason, captions, (0, 0), 0, **attributes), ()
    url = line(place).url
    row = SourceRow(key="k", captions=captions, url=url, attributes=attributes)
    early = reject_before_fetch(row, kept, config)
    if early is not None:
        return line(place, early.reason, kept, (0, 0), 0, **attributes), ()
    late = reject_measured(*size, num_bytes, config)
    status = "ok" if late is None else late.reason
    return line(place, status, kept, size, num_bytes, **attributes), () if late else kept


@settings(max_examples=100, deadline=None)
@given(st.lists(OFFERED, max_size=12), FILTERS, FILTERS)
def test_a_change_of_filters_is_told_from_the_ledger_alone(offered, before, after):
    """Against filtering anew what is there and making anew what is not: nothing else leaves, comes in, is altered."""
    old = [made(place, each, before) for place, each in enumerate(offered)]
    there = [(kept or each[0], *each[1:]) for each, (_, kept) in zip(offered, old, strict=True)]
    new = [made(place, each, after) for place, each in enumerate(there)]
    told = changes(before, after, ledger(*(each for each, _ in old)) if old else EMPTY)
    both = list(zip(old, new, strict=True))
    leaving = sum(bool(was) and not now for (_, was), (_, now) in both)
    entering = sum(not was and bool(now) for (_, was), (_, now) in both)
    shrinking = sum(bool(was and now) and not set(was) <= set(now) for (_, was), (_, now) in both)
    assert told.leaving <= leaving <= told.leaving + told.maybe_leaving
    assert entering <= told.maybe_entering
    assert shrinking <= told.maybe_altered + told.maybe_leaving
    if all(len(captions) == 1 and len(captions[0]) <= 200 for captions, *_ in offered):
        assert (told.leaving, told.maybe_leaving, told.maybe_altered) == (leaving, 0, 0)


EMPTY = pa.table({name: [] for name in LEDGER_COLUMNS})


def test_equal_filters_change_nothing():
    assert changes(where("width >= 5"), where("width >= 5"), ledger(line(0))) == FilterChange()
    assert not FilterChange().is_any


def test_a_tightened_filter_says_how_many_rows_leave_a_ledger_on_disk(tmp_path: Path):
    lines = [line(place, punsafe=place / 10) for place in range(10)]
    lines += [line(10, "http_404", size=(0, 0), punsafe=0.9), line(11, "duplicate_bytes", punsafe=0.9)]
    write_ledger(str(tmp_path / "ledger.parquet"), lines)
    table = read_ledger(str(tmp_path / "ledger.parquet"))
    assert changes(FilterConfig(), where("punsafe <= 0.5"), table) == FilterChange(leaving=4)
    assert changes(FilterConfig(), where("width >= 401"), table) == FilterChange(leaving=10)


def test_a_loosened_filter_says_how_many_rows_may_come_in():
    table = ledger(
        line(0, "filter_punsafe", size=(0, 0), num_bytes=0, punsafe=0.6),
        line(1, "filter_punsafe", size=(0, 0), num_bytes=0, punsafe=0.9),
        line(2, "too_small", size=(10, 20), punsafe=0.1),
        line(3, "caption_length", captions=("ab",), size=(0, 0), num_bytes=0, punsafe=0.1),
        line(4, "http_404", size=(0, 0)),
        line(5, punsafe=0.1),
    )
    before = where("punsafe <= 0.5", min_side=64, min_caption_chars=5)
    assert changes(before, where("punsafe <= 0.7", min_side=64, min_caption_chars=5), table) == FilterChange(
        maybe_entering=1
    )
    assert changes(before, where("punsafe <= 0.5", min_side=11, min_caption_chars=5), table) == FilterChange()
    assert changes(before, where("punsafe <= 0.5", min_side=10, min_caption_chars=5), table).maybe_entering == 1
    assert changes(before, where("punsafe <= 0.5", min_side=64), table).maybe_entering == 1
    assert changes(before, FilterConfig(), table).maybe_entering == 4


def test_a_picture_too_small_for_another_reason_does_not_come_in():
    table = ledger(line(0, "too_small", size=(300, 300)))
    assert changes(where(min_side=200), FilterConfig(), table) == FilterChange()


def test_what_a_ledger_holds_in_part_is_told_as_unsure():
    long = line(0, captions=("dog " * 100,))
    several = line(1, captions=("a red dog", "dog"))
    assert changes(FilterConfig(), where("caption matches cat"), ledger(long)) == FilterChange(maybe_leaving=1)
    assert changes(FilterConfig(), where("caption_chars <= 9"), ledger(long)) == FilterChange(leaving=1)
    assert changes(FilterConfig(), where(min_caption_chars=5), ledger(several)) == FilterChange(maybe_altered=1)
    assert changes(FilterConfig(), where(max_caption_chars=5), ledger(several)) == FilterChange(maybe_leaving=1)
    assert changes(FilterConfig(), where(max_captions=1), ledger(several)) == FilterChange(maybe_altered=1)
    assert changes(FilterConfig(), where("width >= 5"), ledger(line(2, size=(0, 0)))) == FilterChange(maybe_leaving=1)
