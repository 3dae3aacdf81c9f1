"""Charts as inline SVG: bars for the funnel and for shares, and histograms of kept above rejected rows.

A histogram's bars show portions of all kept, or of all rejected, rows, on one scale, so that both shapes can be
compared however few were rejected. Each has its numbers in a table beside it, for those who cannot see or want them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.report_elements import Element, count, cut, element, stranger, svg
from pipeline.report_totals import LEAST_MEASURE, Column, Spread

WIDTH, HEIGHT = 320, 150
"""Units of a histogram's drawing; about as many pixels, so that its letters keep their size."""
MARGIN, AXIS_HEIGHT = 12, 18
MAX_BINS = 36
MAX_TICKS = 6
MAX_ASPECT_OCTAVES = 3
"""Aspects beyond 1:8 and 8:1 are counted into the last bars."""
OUTSIDE = 0.002
"""Portion of the values at either end that may be counted into the last bars, lest a few far ones squeeze the rest."""


class Axis(StrEnum):
    """How values are laid out from left to right."""

    LINEAR = "linear"
    LOGARITHMIC = "logarithmic"
    ASPECT = "aspect"


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Counts of a column's values.

    Attributes:
        edges: borders of the bins, one more than bins.
        kept: kept rows of each bin.
        rejected: rejected rows of each bin.
        has_fractions: whether values lie between whole numbers.
        is_cut_low: whether the first bin also counts what lies below it.
        is_cut_high: whether the last bin also counts what lies above it.
    """

    edges: NDArray[np.float64]
    kept: NDArray[np.int64]
    rejected: NDArray[np.int64]
    has_fractions: bool
    is_cut_low: bool
    is_cut_high: bool


def histogram_of(column: Column, axis: Axis) -> Histogram:
    """Return a column's histogram; the column has at least one value."""
    spreads = [spread for spread in (column.kept, column.rejected) if spread.num_rows]
    low = min(spread.quantile(OUTSIDE) for spread in spreads)
    high = max(spread.quantile(1 - OUTSIDE) for spread in spreads)
    lowest, highest = min(spread.values[0] for spread in spreads), max(spread.values[-1] for spread in spreads)
    has_fractions = any((spread.values != np.round(spread.values)).any() for spread in spreads)
    match axis:
        case Axis.LINEAR:
            edges = _linear_edges(low, high)
        case Axis.LOGARITHMIC:
            edges = _logarithmic_edges(low, high)
        case Axis.ASPECT:
            edges = _aspect_edges()
    if not has_fractions and axis is not Axis.ASPECT:
        edges = np.unique(np.ceil(edges))
    return Histogram(
        edges=edges,
        kept=_counts(column.kept, edges),
        rejected=_counts(column.rejected, edges),
        has_fractions=has_fractions or axis is Axis.ASPECT,
        is_cut_low=bool(lowest < edges[0]),
        is_cut_high=bool(highest >= edges[-1]),
    )


def axis_for(column: Column) -> Axis:
    """Return how an unknown column is laid out: logarithmically where it spans three decades above 1."""
    spreads = [spread for spread in (column.kept, column.rejected) if spread.num_rows]
    low = min(spread.values[0] for spread in spreads)
    high = max(spread.quantile(1 - OUTSIDE) for spread in spreads)
    return Axis.LOGARITHMIC if low >= 1 and high / low >= 1000 else Axis.LINEAR


def histogram_figure(title: str, column: Column, axis: Axis, written: Callable[[float], str]) -> Element:
    """Return a column's histogram with its title, its medians and, folded, its numbers.

    Args:
        title: what the column is called; a stranger's word is fine.
        column: its values, at least one.
        axis: how they are laid out.
        written: how a value is written, with its unit.
    """
    histogram = histogram_of(column, axis)
    summaries = [_summary("Kept", column.kept, written), _summary("Rejected", column.rejected, written)]
    return element(
        "figure",
        element("figcaption", element("h3", stranger(title, 40))),
        _drawing(title, " ".join(summaries), histogram, axis, written),
        element("p", *[element("span", summary, class_="line") for summary in summaries if summary], class_="note"),
        _numbers(histogram, written),
        class_="chart",
    )


def bar(*parts: tuple[float, str], label: str) -> Element:
    """Return a horizontal bar as wide as its place, of parts (portion of the width, class), from left to right."""
    rectangles, left = [], 0.0
    for portion, kind in parts:
        if portion > 0:
            rectangles.append(_rectangle(left, 0, max(1000 * portion, 1), 10, kind))
        left += 1000 * portion
    return svg(1000, 10, *rectangles, class_="bar", preserveAspectRatio="none", role="img", aria_label=label)


def _drawing(title: str, summary: str, histogram: Histogram, axis: Axis, written: Callable[[float], str]) -> Element:
    kept = histogram.kept / max(histogram.kept.sum(), 1)
    rejected = histogram.rejected / max(histogram.rejected.sum(), 1)
    room = HEIGHT - AXIS_HEIGHT - 4
    scale = room / max(kept.max() + rejected.max(), 1e-12)
    base = 4 + kept.max() * scale
    step = (WIDTH - 2 * MARGIN) / len(kept)
    bars: list[Element] = []
    for i, label in enumerate(_bin_labels(histogram, written)):
        left, width = MARGIN + i * step, max(step - 1, 0.5)
        hint = f"{label}: {count(histogram.kept[i])} kept, {count(histogram.rejected[i])} rejected"
        shapes = [
            _rectangle(left, base - kept[i] * scale, width, kept[i] * scale, "kept"),
            _rectangle(left, base, width, rejected[i] * scale, "rejected"),
        ]
        visible = [shape for shape, portion in zip(shapes, (kept[i], rejected[i]), strict=True) if portion]
        if visible:
            bars.append(element("g", element("title", hint), *visible))
    line = element("line", x1=f"{MARGIN}", x2=f"{WIDTH - MARGIN}", y1=f"{base:.1f}", y2=f"{base:.1f}", class_="base")
    name = f"Histogram of {cut(title, 40)}. {summary}"
    return svg(WIDTH, HEIGHT, *bars, line, *_ticks(histogram, axis, written), role="img", aria_label=name)


def _ticks(histogram: Histogram, axis: Axis, written: Callable[[float], str]) -> list[Element]:
    edges, marks = histogram.edges, []
    for value in _tick_values(edges, axis):
        portion = float(np.interp(value, edges, np.linspace(0, 1, len(edges))))  # bins are equally wide on paper
        x = MARGIN + portion * (WIDTH - 2 * MARGIN)
        anchor = "start" if portion < 0.06 else "end" if portion > 0.94 else "middle"
        top = HEIGHT - AXIS_HEIGHT
        marks.append(element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{top}", y2=f"{top + 4}", class_="tick"))
        marks.append(element("text", written(value), x=f"{x:.1f}", y=f"{HEIGHT - 3}", text_anchor=anchor))
    return marks


def _tick_values(edges: NDArray[np.float64], axis: Axis) -> list[float]:
    low, high = float(edges[0]), float(edges[-1])
    match axis:
        case Axis.LINEAR:
            step = _nice_step((high - low) / (MAX_TICKS - 1))
            return [float(k * step) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        case Axis.LOGARITHMIC:
            for factors in ((1, 2, 5), (1, 3), (1,)):
                decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
                found = [float(f * 10**k) if k >= 0 else f / 10**-k for k in decades for f in factors]
                fitting = [value for value in found if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
                if len(fitting) <= MAX_TICKS:
                    break
            return fitting[:: math.ceil(len(fitting) / MAX_TICKS)] if fitting else [low]
        case Axis.ASPECT:
            return [2.0**k for k in range(-MAX_ASPECT_OCTAVES, MAX_ASPECT_OCTAVES + 1)]


def _numbers(histogram: Histogram, written: Callable[[float], str]) -> Element:
    rows = [
        element("tr", element("th", label, scope="row"), *[element("td", count(number)) for number in numbers])
        for label, *numbers in zip(
            _bin_labels(histogram, written), histogram.kept.tolist(), histogram.rejected.tolist(), strict=True
        )
        if any(numbers)
    ]
    names = [element("th", name, scope="col") for name in ("Range", "Kept", "Rejected")]
    table = element("table", element("thead", element("tr", *names)), element("tbody", *rows), class_="numbers")
    return element("details", element("summary", "Numbers"), table)


def _bin_labels(histogram: Histogram, written: Callable[[float], str]) -> list[str]:
    step = 0 if histogram.has_fractions else 1
    spans = [(written(low), written(high - step)) for low, high in pairwise(histogram.edges.tolist())]
    labels = [low if low == high else f"{low} – {high}" for low, high in spans]
    if histogram.is_cut_high:
        labels[-1] = f"{written(float(histogram.edges[-2]))} and above"
    if histogram.is_cut_low:
        labels[0] = f"below {written(float(histogram.edges[1]))}"
    return labels


def _summary(name: str, spread: Spread, written: Callable[[float], str]) -> str:
    if not spread.num_rows:
        return ""
    low, middle, high = (written(spread.quantile(portion)) for portion in (0.05, 0.5, 0.95))
    return f"{name}: median {middle}, nine in ten from {low} to {high} ({count(spread.num_rows)} rows)."


def _linear_edges(low: float, high: float) -> NDArray[np.float64]:
    largest = max(abs(low), abs(high), LEAST_MEASURE)
    step = _nice_step(max((high - low) / MAX_BINS, 4 * float(np.spacing(largest))) if high > low else largest)
    return _edges_around(low, high, low / step, high / step, lambda place: place * step)


def _logarithmic_edges(low: float, high: float) -> NDArray[np.float64]:
    decades = max(math.log10(high) - math.log10(low), 1e-9)
    fineness = next((number for number in (16, 8, 4, 2) if number * decades <= MAX_BINS - 2), 1)
    return _edges_around(
        low, high, fineness * math.log10(low), fineness * math.log10(high), lambda place: 10.0 ** (place / fineness)
    )


def _edges_around(
    low: float, high: float, low_place: float, high_place: float, edge_at: Callable[[int], float]
) -> NDArray[np.float64]:
    """Return the edges at all whole places, from the last one not above `low` to the first one above `high`.

    Places are rounded, and so may lie a bin too far in: 999,999,999,999,998 has the logarithm 15.
    """
    first, last = math.floor(low_place), math.floor(high_place) + 1
    while edge_at(first) > low:
        first -= 1
    while edge_at(last) <= high:
        last += 1
    return np.array([edge_at(place) for place in range(first, last + 1)], np.float64)


def _aspect_edges() -> NDArray[np.float64]:
    """Return edges a sixth of an octave apart, with the square in the middle of a bin."""
    edges: NDArray[np.float64] = 2.0 ** ((np.arange(-6 * MAX_ASPECT_OCTAVES, 6 * MAX_ASPECT_OCTAVES + 2) - 0.5) / 6)
    return edges


def _counts(spread: Spread, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    places = np.clip(np.searchsorted(edges, spread.values, side="right") - 1, 0, len(edges) - 2)
    counts: NDArray[np.int64] = np.zeros(len(edges) - 1, np.int64)
    np.add.at(counts, places, spread.counts)
    return counts


def _nice_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = math.floor(math.log10(least))
    candidates = [factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5)]
    return next(step for step in candidates if step >= least * (1 - 1e-9))


def _rectangle(x: float, y: float, width: float, height: float, kind: str) -> Element:
    return element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", class_=kind)
