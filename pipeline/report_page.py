"""The data report as one HTML page (`report_document`).

Order: header with totals → funnel and reasons → what was kept, what was rejected → histograms → hosts → scrubbing →
duplicates → how the dataset was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pipeline.report_charts import Axis, axis_for, bar, histogram_figure
from pipeline.report_document import document, making, section, table
from pipeline.report_elements import Element, byte_size, count, cut, decimal, element, share, stranger
from pipeline.report_reasons import EXPLANATIONS, Stage, meaning_of
from pipeline.report_totals import NUM_PICTURES, Column, LedgerRow, Totals, num_rejected
from pipeline.store.ledger import OK
from pipeline.store.manifest import Manifest

NUM_HOSTS, NUM_CLUSTERS, MAX_CHARTS, MAX_REASON_LINES = 20, 12, 16, 100
MAX_KINDS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A row and its picture, as the page shows them.

    Attributes:
        row: the row's line of the ledger.
        image: the picture as a `data:` URI; empty where it can't be opened.
    """

    row: LedgerRow
    image: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A kept row and those that it stands for.

    Attributes:
        key: the kept row's key.
        copies: rows that it stands for, by reason.
        shown: the row itself with its picture; None where no shard holds it.
    """

    key: str
    copies: Counter[str]
    shown: Shown | None


def page_of(
    manifest: Manifest, totals: Totals, kept: Sequence[Shown], rejected: Sequence[Shown], clusters: Sequence[Cluster]
) -> Element:
    """Return the whole page."""
    sections = [
        _funnel(totals),
        _reasons(totals),
        _gallery(
            "kept", "Kept", f"{len(kept)} rows drawn at random from those kept.", [_kept(shown) for shown in kept]
        ),
        _gallery(
            "rejected",
            "Rejected",
            f"Up to {NUM_PICTURES} of the rejected pictures of which shards keep a thumbnail, reason by reason.",
            [_rejected(shown) for shown in rejected],
        ),
        _histograms(totals),
        _hosts(totals),
        _scrubs(totals),
        _duplicates(totals, clusters),
        making(manifest),
    ]
    present = [part for part in sections if part is not None]
    return document(f"Data report {manifest.digest[:12]}", _header(manifest, totals), present)


def _header(manifest: Manifest, totals: Totals) -> Element:
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    facts = [
        ("Rows in", count(totals.num_rows)),
        ("Rows kept", count(totals.num_kept)),
        ("Share kept", share(totals.num_kept, totals.num_rows)),
        ("Shards", count(len(manifest.shards))),
        ("On disk", byte_size(num_bytes)),
    ]
    cards = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    return element(
        "header",
        element("h1", "Data report"),
        element("p", "Dataset ", element("code", manifest.digest[:12]), ". ", *_sentence(totals), class_="lead"),
        element("dl", *cards, class_="cards"),
        _splits(manifest, totals),
    )


def _sentence(totals: Totals) -> list[str | Element]:
    lost = Counter({reason: rows for (stage, reason), rows in totals.reasons.items() if stage is not Stage.KEPT})
    if not totals.num_rows:
        return ["There are no input rows."]
    if not lost:
        return ["Every row was kept."]
    reason, num_rows = min(lost.items(), key=lambda pair: (-pair[1], pair[0]))
    part = f": {count(num_rows)}, or {share(num_rows, totals.num_rows)} of the input."
    return ["Most rows were lost to ", element("code", stranger(reason, 60)), part]


def _splits(manifest: Manifest, totals: Totals) -> Element:
    rows = [
        [split.value, count(len(manifest.shards_of(split))), count(counts.total()), count(counts[OK])]
        + [share(counts[OK], counts.total())]
        for split, counts in totals.by_split.items()
    ]
    return table(("Split", "Shards", "Rows in", "Kept", "Share"), rows)


def _funnel(totals: Totals) -> Element:
    left = totals.num_rows
    steps = [_step("Input", left, 0, left)]
    for stage, reasons in _lost(totals).items():
        num_lost = sum(reasons.values())
        left -= num_lost
        steps.append(_step(stage.value, left, num_lost, totals.num_rows))
    legend = element("p", _key("kept", "rows left"), _key("rejected", "rows lost at this step"), class_="legend")
    return section("funnel", "From input to kept rows", legend, *steps)


def _lost(totals: Totals) -> dict[Stage, dict[str, int]]:
    """Return lost rows by stage and reason; stages that few datasets have are left out where nothing was lost."""
    lost: dict[Stage, dict[str, int]] = {stage: {} for stage in EXPLANATIONS}
    for (stage, reason), num_rows in totals.reasons.items():
        if stage is not Stage.KEPT:
            lost[stage][reason] = num_rows
    return {stage: reasons for stage, reasons in lost.items() if reasons or stage not in (Stage.COLUMN, Stage.OTHER)}


def _step(name: str, num_left: int, num_lost: int, num_rows: int) -> Element:
    whole = max(num_rows, 1)
    lost = f"{count(num_lost)} lost ({share(num_lost, num_left + num_lost)})" if num_lost else ""
    return element(
        "div",
        element("h3", name),
        bar((num_left / whole, "kept"), (num_lost / whole, "rejected"), label=f"{name}: {count(num_left)} rows left"),
        element("p", element("strong", count(num_left)), " ", element("span", lost, class_="lost")),
        class_="funnel",
    )


def _reasons(totals: Totals) -> Element | None:
    groups = [_reason_group(stage, reasons, totals.num_rows) for stage, reasons in _lost(totals).items() if reasons]
    if not groups:
        return None
    heads = [element("th", name, scope="col") for name in ("Reason", "Rows", "Of the input")]
    table = element("table", element("thead", element("tr", *heads, element("td"))), *groups, class_="figures barred")
    return section("reasons", "Why rows were lost", table)


def _reason_group(stage: Stage, reasons: Mapping[str, int], num_rows: int) -> Element:
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    explanation = element("span", EXPLANATIONS[stage], class_="note")
    title = element("th", element("strong", stage.value), " ", explanation, scope="rowgroup", colspan="3")
    lines = [element("tr", title, element("td"), class_="group")]
    for reason, num_lost in ordered[:MAX_REASON_LINES]:
        meaning = element("div", cut(meaning_of(reason)), class_="note")
        lines.append(_reason_line(element("div", element("code", stranger(reason, 60)), meaning), num_lost, num_rows))
    if rest := ordered[MAX_REASON_LINES:]:
        name = element("div", f"{count(len(rest))} further reasons")
        lines.append(_reason_line(name, sum(num_lost for _, num_lost in rest), num_rows))
    return element("tbody", *lines)


def _reason_line(name: Element, num_lost: int, num_rows: int) -> Element:
    figures = [element("td", count(num_lost)), element("td", share(num_lost, num_rows))]
    return element("tr", element("th", name, scope="row"), *figures, element("td", _lost_bar(num_lost, num_rows)))


def _lost_bar(num_lost: int, num_rows: int) -> Element:
    return bar((num_lost / max(num_rows, 1), "rejected"), label=f"{share(num_lost, num_rows)} lost")


def _histograms(totals: Totals) -> Element | None:
    measured: list[tuple[str, Column, Axis, Callable[[float], str]]] = [
        ("Shorter side", totals.short_side, Axis.LOGARITHMIC, lambda value: f"{decimal(round(value))} px"),
        ("Aspect, width to height", totals.aspect, Axis.ASPECT, _aspect),
        ("Caption length", totals.caption_chars, Axis.LOGARITHMIC, decimal),
        ("Size of the payload", totals.num_bytes, Axis.LOGARITHMIC, byte_size),
    ]
    attributes = [(name, column) for name, column in totals.attributes.items() if column.is_measure]
    attributes.sort(key=lambda pair: (-pair[1].num_rows, pair[0]))
    known = [entry for entry in measured if entry[1].num_rows]
    known += [(name, column, axis_for(column), decimal) for name, column in sorted(attributes[: MAX_CHARTS - 4])]
    if not known:
        return None
    sampled = f" Attributes of the source: {totals.attribute_share:.2%} of the rows, drawn at random."
    sampled = sampled if attributes and totals.attribute_share < 1 else ""
    legend = element(
        "p",
        _key("kept", "kept, upwards"),
        _key("rejected", "rejected, downwards"),
        element(
            "span", f"Each as portions of its own total, on one scale; only rows where the value is known.{sampled}"
        ),
        class_="legend",
    )
    figures = [histogram_figure(*entry) for entry in known]
    return section("histograms", "What the rows are like", legend, element("div", *figures, class_="charts"))


def _hosts(totals: Totals) -> Element | None:
    worst = [(host, counts) for host, counts in totals.hosts.largest(NUM_HOSTS) if num_rejected(counts)]
    if not worst:
        return None
    rows: list[list[str | Element]] = []
    for host, counts in worst:
        num_failed, num_rows = num_rejected(counts), counts.total()
        reason, num_reason = min(((r, n) for r, n in counts.items() if r != OK), key=lambda pair: (-pair[1], pair[0]))
        main = element("div", "mostly ", element("code", stranger(reason, 60)), f" ({share(num_reason, num_failed)})")
        main.set("class", "note")
        failed = share(num_failed, num_rows)
        rows.append(
            [element("div", stranger(host, 80), main), count(num_rows), failed, _lost_bar(num_failed, num_rows)]
        )
    text = f"The {len(worst)} hosts with the most rows that could not be fetched or decoded."
    if not totals.hosts.is_complete:
        text += " There are more hosts than were remembered, so these are lower bounds."
    hosts = table(("Host", "Rows", "Failed", ""), rows, "figures barred")
    return section("hosts", "Hosts by failure", element("p", text, class_="note"), hosts)


def _scrubs(totals: Totals) -> Element | None:
    if not totals.scrubbed:
        return None
    ordered = sorted(totals.scrubbed.items(), key=lambda pair: (-pair[1], pair[0]))
    rows: list[list[str | Element]] = [
        [stranger(kind, 60), count(found), count(totals.scrubbed_rows[kind])] for kind, found in ordered
    ]
    note = element("p", "What was taken out of captions.", class_="note")
    return section("scrubbing", "Scrubbed captions", note, table(("Kind", "Found", "In rows"), rows))


def _duplicates(totals: Totals, clusters: Sequence[Cluster]) -> Element | None:
    if not clusters:
        return None
    num_copies = sum(rows for (stage, _), rows in totals.reasons.items() if stage is Stage.DUPLICATE)
    text = f"{count(num_copies)} rows are duplicates; the {len(clusters)} rows that stand for most of them:"
    if not totals.survivors.is_complete:
        text += " (There are more such rows than were remembered, so these are lower bounds.)"
    return _gallery("duplicates", "Duplicates", text, [_cluster(cluster) for cluster in clusters])


def _cluster(cluster: Cluster) -> Element:
    kinds = [
        element("span", f"{count(rows)} {cut(reason, 40)}", class_="line")
        for reason, rows in sorted(cluster.copies.items())[:MAX_KINDS]
    ]
    caption = cluster.shown.row.caption if cluster.shown else ""
    copies = cluster.copies.total()
    return _figure(
        cluster.shown.image if cluster.shown else "",
        caption or f"Row {cluster.key}",
        element("strong", f"{count(copies)} {'copy' if copies == 1 else 'copies'}"),
        element("p", *kinds, class_="note"),
        element("p", stranger(caption or cluster.key, 80), class_="words"),
    )


def _kept(shown: Shown) -> Element:
    row = shown.row
    return _figure(
        shown.image,
        row.caption,
        element("p", stranger(row.caption), class_="words"),
        element("p", _size(row), class_="note"),
    )


def _rejected(shown: Shown) -> Element:
    row = shown.row
    return _figure(
        shown.image,
        f"Rejected, {row.status}: {row.caption}",
        element("p", element("code", stranger(row.status, 60)), class_="lost"),
        element("p", stranger(row.detail, 80), class_="note"),
        element("p", stranger(row.caption, 80), class_="words"),
        element("p", _size(row), class_="note"),
    )


def _gallery(name: str, title: str, text: str, figures: Sequence[Element]) -> Element:
    if not figures:
        return section(name, title, element("p", "There are none to show.", class_="note"))
    return section(name, title, element("p", text, class_="note"), element("div", *figures, class_="gallery"))


def _figure(image: str, alternative: str, *words: Element) -> Element:
    picture = (
        element("img", src=image, alt=cut(alternative), loading="lazy") if image else element("div", class_="blank")
    )
    return element("figure", picture, element("figcaption", *words))


def _key(kind: str, text: str) -> Element:
    return element("span", element("i", class_=f"swatch {kind}"), text)


def _size(row: LedgerRow) -> str:
    return f"{count(row.width)} × {count(row.height)}" if row.width and row.height else ""


def _aspect(value: float) -> str:
    """Return a ratio of sides as a person says it: 3:2, 1:1, 1:1.41."""
    return f"{decimal(round(value, 2))}:1" if value >= 1 else f"1:{decimal(round(1 / value, 2))}"


def round_robin(groups: Sequence[Sequence[LedgerRow]], num_rows: int) -> list[LedgerRow]:
    """Return the first rows of all groups, then their second ones, and so on."""
    dealt = [row for rows in zip_longest(*groups) for row in rows if row is not None]
    return dealt[:num_rows]
