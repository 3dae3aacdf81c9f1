"""Laws of what the data report adds up: every value once, in bounded memory, whatever the order of rows."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.ingest.duplicates import Likeness
from pipeline.ingest.fetch import FETCH_REASONS
from pipeline.ingest.filters import FILTER_REASONS
from pipeline.ingest.picture import PICTURE_REASONS
from pipeline.report_charts import Axis, histogram_figure, histogram_of
from pipeline.report_elements import decimal, render
from pipeline.report_reasons import Stage, meaning_of, stage_of
from pipeline.report_totals import MAX_ATTRIBUTE_ROWS, MAX_VALUES, Column, Sample, Spread, Tally, Totals
from pipeline.store.ledger import OK, SCHEMA, LedgerLine
from pipeline.store.schema import Split, key_of
from tests.html_page import parse


@pytest.mark.parametrize(
    "reason",
    [
        *FETCH_REASONS,
        *PICTURE_REASONS,
        *FILTER_REASONS,
        *(likeness.reason for likeness in Likeness),
        "filter_any",
        "duplicate_key",
    ],
)
def test_reason_has_a_stage_and_a_meaning(reason):
    assert stage_of(reason) not in (Stage.OTHER, Stage.KEPT)
    assert meaning_of(reason).endswith(".")


def test_reason_of_a_rule_belongs_to_the_step_at_which_its_column_is_known():
    columns = {"punsafe": Stage.COLUMN, "host": Stage.COLUMN, "language": Stage.CAPTION, "aspect": Stage.FILTER}
    assert {column: stage_of(f"filter_{column}") for column in columns} == columns
    assert (stage_of("never heard of"), meaning_of("never heard of")) == (Stage.OTHER, "")


NUMBERS = st.floats(-1e15, 1e15).filter(lambda value: value == 0 or abs(value) > 1e-30)


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.lists(NUMBERS, max_size=20), st.sampled_from(Axis))
@example([999_999_999_999_998.0], [], Axis.LOGARITHMIC)
def test_histogram_counts_every_value_once(kept, rejected, axis):
    column = Column()
    values = np.array([*kept, *rejected])
    if axis is not Axis.LINEAR:
        values = np.abs(values) + 1e-3
    column.add(values, np.arange(len(values)) < len(kept))
    found = histogram_of(column, axis)
    assert (int(found.kept.sum()), int(found.rejected.sum())) == (len(kept), len(rejected))
    assert (np.diff(found.edges) > 0).all()
    inside = values[(values >= found.edges[0]) & (values < found.edges[-1])]
    assert found.is_cut_low == (values < found.edges[0]).any()
    assert found.is_cut_high == (values >= found.edges[-1]).any()
    assert len(inside) >= 1 or axis is Axis.ASPECT
    assert parse(render(histogram_figure("any", column, axis, decimal))).all("rect")


def test_spread_is_exact_and_whatever_the_order_the_same():
    values = np.random.default_rng(0).integers(0, 5000, 20_000).astype(np.float64)
    spread = Spread()
    for part in np.array_split(values, 7):
        spread.add(part)
    unique, counts = np.unique(values, return_counts=True)
    assert (spread.values == unique).all()
    assert (spread.counts == counts).all()
    assert spread.quantile(0.5) == np.sort(values)[9_999]


def test_spread_of_too_many_values_is_bounded_near_and_whatever_the_order_the_same():
    values = np.random.default_rng(0).lognormal(0, 3, 100_000)
    spreads = [Spread(), Spread()]
    for spread, order in zip(spreads, (values, values[::-1]), strict=True):
        for part in np.array_split(order, 9):
            spread.add(part)
    assert (spreads[0].values == spreads[1].values).all()
    assert (spreads[0].counts == spreads[1].counts).all()
    assert len(spreads[0].values) <= MAX_VALUES
    assert spreads[0].num_rows == 100_000
    assert spreads[0].quantile(0.9) == pytest.approx(np.quantile(values, 0.9), rel=0.01)


@given(st.permutations([f"key {i}" for i in range(30)]))
def test_sample_is_the_same_whatever_the_order(keys):
    sample, everything = Sample[str](5), Sample[str](30)
    for key in keys:
        everything.add(key, key)
        if sample.wants(key):
            sample.add(key, key)
    assert sample.items() == everything.items()[:5]


def test_tally_of_too_many_names_keeps_the_worst():
    tally = Tally(max_names=10)
    for i in range(1000):
        tally.add(f"rare {i}", "dns", 1)
        tally.add(f"common {i % 3}", "dns", 5)
        tally.add(f"fine {i}", OK, 1000)
    assert len(tally.counts) <= 20
    assert not tally.is_complete
    assert {name for name, _ in tally.largest(3)} == {"common 0", "common 1", "common 2"}


def test_totals_of_very_many_rows_read_the_attributes_of_a_random_part():
    lines = [LedgerLine(key=key_of(str(i)), source_row=i, attributes=json.dumps({"score": i})) for i in range(4000)]
    table = pa.Table.from_pylist([asdict(entry) for entry in lines], schema=SCHEMA)
    totals = Totals(num_rows=4 * MAX_ATTRIBUTE_ROWS)
    totals.add(Split.TRAIN, "000000", table)
    score = totals.attributes["score"].kept
    assert score.num_rows == pytest.approx(1000, abs=4 * np.sqrt(4000 * 0.25 * 0.75))
    assert score.quantile(0.5) == pytest.approx(2000, abs=250)
    assert totals.num_rows == 4000
