"""Laws of the data report: its numbers are the ledgers', its bytes the dataset's alone, strangers' text stays text."""

from __future__ import annotations

import base64
import io
import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.storage import read_bytes
from pipeline.report import write_report
from pipeline.report_reasons import meaning_of
from pipeline.store.journal import Cause, Generation, PlannedShard, append_generation
from pipeline.store.ledger import OK, LedgerLine, write_ledger
from pipeline.store.manifest import (
    ShardRecord,
    claim_root,
    commit_shard,
    count_by_split,
    publish_manifest,
    read_records,
    shard_path,
)
from pipeline.store.schema import Split, key_of
from pipeline.store.shards import write_shard
from tests.browser import CHROMIUM, browser, view
from tests.html_page import Node, parse

IDENTITY = {"source": {"digest": "ab" * 32}, "picture": {"image_size": 64}}
MAX_PAGE_BYTES = 2_000_000

Shards = Mapping[tuple[Split, str], Sequence[LedgerLine]]


def jpeg(colour: tuple[int, int, int] | None = None, side: int = 64, seed: int = 0) -> bytes:
    """A picture of one colour, or of noise, which no encoder makes small."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    (Image.new("RGB", (side, side), colour) if colour else Image.fromarray(noise)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


PLAIN = jpeg((10, 120, 200))


def make_dataset(root: str, shards: Shards, pictures: Mapping[str, bytes] | None = None) -> None:
    """A finished dataset with these ledgers; kept rows have a picture each."""
    claim_root(root, "dataset", IDENTITY)
    for (split, name), lines in shards.items():
        kept = [line for line in lines if line.status == OK]
        rows = [{"__key__": line.key, "jpg": (pictures or {}).get(line.key, PLAIN), "json": b"{}"} for line in kept]
        files = write_shard(root, split, name, rows)
        files["ledger.parquet"] = write_ledger(shard_path(root, split, name, "ledger.parquet"), lines)
        counts = dict(Counter(line.status for line in lines))
        commit_shard(root, ShardRecord(name=name, split=split, num_rows=len(kept), files=files, counts=counts))
    publish_manifest(root, IDENTITY, "dataset", {"counts": count_by_split(read_records(root))})


def line(name: str, status: str = OK, **facts: object) -> LedgerLine:
    return LedgerLine(**{"key": key_of(name), "source_row": 0, "status": status, "caption": f"about {name}"} | facts)


def page_of(root: str) -> Node:
    return parse(read_bytes(write_report(root)))


def mixed_lines(num_rows: int, seed: int) -> list[LedgerLine]:
    """Rows of every fate, with measures drawn at random."""
    generator = np.random.default_rng(seed)
    fates = [OK, OK, OK, OK, "timeout", "http_404", "no_caption", "truncated", "filter_score", "filter_aspect", "odd"]
    lines = []
    for row in range(num_rows):
        status = fates[generator.integers(len(fates))]
        is_fetched = status in (OK, "truncated", "filter_aspect", "odd")
        width, height = generator.integers(1, 3000, 2).tolist() if is_fetched else (0, 0)
        facts = {
            "score": round(float(generator.normal(5, 1)), 3),
            "flag": bool(row % 2),
            "text": "0.5" if row % 3 else "x",
        }
        lines.append(
            line(
                f"{seed}/{row}",
                status,
                source_row=row,
                url=f"https://host{generator.integers(4)}.example/{row}.jpg" if row % 5 else "",
                caption_chars=int(generator.integers(0, 200)),
                original_width=width,
                original_height=height,
                num_bytes=width * height,
                attributes=json.dumps(facts),
                scrubbed=json.dumps({"url": 2} if row % 7 == 0 else {}),
            )
        )
    return lines


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[LedgerLine], Node]:
    """A dataset of 900 mixed rows in three shards, its lines, and its page."""
    root = str(tmp_path_factory.mktemp("mixed"))
    places = [(Split.TRAIN, "000000"), (Split.TRAIN, "000001"), (Split.VALIDATION, "000000")]
    shards = {place: mixed_lines(300, seed) for seed, place in enumerate(places)}
    make_dataset(root, shards)
    return root, [entry for lines in shards.values() for entry in lines], page_of(root)


def test_report_header_and_funnel_count_the_ledgers_rows(mixed):
    _, lines, page = mixed
    kept = sum(entry.status == OK for entry in lines)
    cards = {card.all("dt")[0].text: card.all("dd")[0].text for card in page.all("dl")[0].all("div")}
    assert (cards["Rows in"], cards["Rows kept"], cards["Shards"]) == ("900", f"{kept:,}", "3")
    assert cards["Share kept"] == f"{kept / 900:.1%}"
    steps = [step.all("strong")[0].text for step in page.all("div", "funnel")]
    assert (steps[0], steps[-1]) == ("900", f"{kept}")
    assert [int(step) for step in steps] == sorted(map(int, steps), reverse=True)
    splits = page.all("header")[0].rows()[1:]
    in_train = sum(entry.status == OK for entry in lines[:600])
    assert splits[0][:4] == ["train", "2", "600", str(in_train)]
    assert splits[1][:4] == ["validation", "1", "300", str(kept - in_train)]


def test_report_names_every_reason_with_its_count_and_meaning(mixed):
    _, lines, page = mixed
    counts = Counter(entry.status for entry in lines if entry.status != OK)
    table = page.by_id("reasons")
    names = [row.all("code")[0].text for row in table.all("tr") if row.all("code")]
    figures = {cells[0]: cells[1:3] for cells in table.rows() if len(cells) == 4 and cells[1].isdigit()}
    assert Counter(names) == Counter(dict.fromkeys(counts, 1))
    for reason, num_rows in counts.items():
        assert figures[reason + meaning_of(reason)] == [str(num_rows), f"{num_rows / 900:.1%}"]


def test_report_ranks_hosts_by_rows_that_failed(mixed):
    _, lines, page = mixed
    failed, tried = Counter(), Counter()
    for entry in lines:
        if entry.url and entry.status not in ("no_caption", "filter_score"):
            host = entry.url.split("/")[2]
            tried[host] += 1
            failed[host] += entry.status in ("timeout", "http_404", "truncated")
    found = [[cells[0].split("mostly")[0], *cells[1:3]] for cells in page.by_id("hosts").rows()[1:]]
    ordered = sorted(failed, key=lambda host: (-failed[host], -tried[host], host))
    assert found == [[host, str(tried[host]), f"{failed[host] / tried[host]:.1%}"] for host in ordered]


def test_report_adds_up_what_was_scrubbed(mixed):
    _, lines, page = mixed
    num_rows = sum(entry.scrubbed != "{}" for entry in lines)
    assert page.by_id("scrubbing").rows()[1:] == [["url", str(2 * num_rows), str(num_rows)]]


def test_report_histograms_hold_every_known_value_once(mixed):
    _, lines, page = mixed
    charts = {chart.all("h3")[0].text: chart.rows()[1:] for chart in page.all("figure", "chart")}
    sized = [entry for entry in lines if entry.original_width]
    expected = {
        "Shorter side": sized,
        "Aspect, width to height": sized,
        "Size of the payload": sized,
        "Caption length": [entry for entry in lines if entry.caption_chars],
        "score": lines,
    }
    assert set(charts) == set(expected)  # a flag is no number, and a text that is always the same one shows nothing
    for title, those in expected.items():
        sums = [sum(int(row[column].replace(",", "")) for row in charts[title]) for column in (1, 2)]
        assert sums == [sum(entry.status == OK for entry in those), sum(entry.status != OK for entry in those)], title


def test_report_counts_a_row_that_was_tried_again_by_its_latest_line(tmp_path):
    root = str(tmp_path)
    first = [line("a", source_row=0), line("b", "timeout", source_row=1), line("c", "timeout", source_row=2)]
    second = [line("b", source_row=1), line("c", "http_404", source_row=2)]
    make_dataset(root, {(Split.TRAIN, "000000"): first, (Split.TRAIN, "000001"): second})
    plans = [PlannedShard(split=Split.TRAIN, name="000000", source_name="s")]
    plans.append(replace(plans[0], name="000001", retries=("000000",), retry="all"))
    for number, (cause, plan) in enumerate(zip((Cause.SOURCE, Cause.RETRY), plans, strict=True)):
        filters = {"number": number}
        append_generation(
            root, Generation(number=number, cause=cause, source_digest="", filters=filters, shards=(plan,))
        )
    page = page_of(root)
    assert [card.text for card in page.all("dd")][:2] == ["3", "2"]
    assert [code.text for code in page.by_id("reasons").all("code")] == ["http_404"]


def test_report_of_the_same_dataset_elsewhere_has_the_same_bytes(mixed, tmp_path, s3_root):
    root, lines, _ = mixed
    shards = {(Split.VALIDATION, "000000"): lines[600:], (Split.TRAIN, "000001"): lines[300:600]}
    shards[Split.TRAIN, "000000"] = lines[:300]
    for other in (str(tmp_path), s3_root):
        make_dataset(other, shards)
        assert read_bytes(write_report(other)) == read_bytes(write_report(root))


HOSTILE = (
    "<script>alert(1)</script>",
    "</figure></main><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" \'',
    "&lt;b&gt; &amp; &#60;script&#62;",
    "]]><!-- <style> --> </style></title>",
    "nul \x00 bell \x07 escape \x1b[31m",
    "turned \u202egnp.exe\u202c and \u2066isolated",
    "مرحبا بالعالم",
    "x" * 1_000_000,
    "\ufffe\uffff\U0010ffff",
)


def hostile_shards() -> Shards:
    lines = []
    for i, text in enumerate(HOSTILE):
        named = json.dumps({text: i, "\ud800": i, f"number {text[:50]}": text, "deep": [[[]]]})
        facts = {"caption": text, "url": f"https://{text[:2000]}/", "detail": text, "caption_chars": len(text)}
        facts |= {"attributes": named, "scrubbed": json.dumps({text[:100]: 3}), "source_row": i}
        facts |= {"original_width": 2**31 - 1, "original_height": 1, "num_bytes": 2**62}
        lines.append(line(f"kept {i}", **facts))
        lines.append(line(f"lost {i}", text[:5000].replace("\x00", "") or "x", thumbnail=PLAIN, **facts))
        lines.append(
            line(f"copy {i}", "duplicate_bytes", duplicate_of=key_of(f"kept {i}"), thumbnail=b"no jpeg", **facts)
        )
    lines.append(line("broken", attributes="[" * 100_000, scrubbed="no json", url="http://[::1", source_row=99))
    return {(Split.TRAIN, "000000"): lines}


def test_report_keeps_hostile_text_as_text(tmp_path):
    make_dataset(str(tmp_path), hostile_shards(), {key_of("kept 0"): b"no picture"})
    content = read_bytes(write_report(str(tmp_path)))
    page = parse(content)  # balanced, and UTF-8
    assert len(content) < MAX_PAGE_BYTES
    tags = {node.tag for node in page.walk()}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"}
    assert len(page.all("style")) == len(page.all("title")[:1]) == 1
    for node in page.walk():
        assert not [name for name in node.attributes if name.startswith("on") or name in ("style", "srcset")]
        assert node.attributes.get("src", "data:image/jpeg;").startswith("data:image/jpeg;")
        assert node.attributes.get("href", "#").startswith("#")
    words = [node.text for node in page.all("bdi")]
    assert HOSTILE[0] in words
    assert HOSTILE[3] in words  # references are shown as they were written
    assert "مرحبا بالعالم" in words
    assert "nul � bell � escape �[31m" in words
    assert max(map(len, words)) < 30_000
    assert any(word.endswith("x…") for word in words)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", content.decode())


def test_report_of_many_rows_and_loud_pictures_stays_small(tmp_path):
    reasons = [OK, *("timeout", "undecodable", "too_small"), *(f"filter_{letter}" for letter in string.ascii_letters)]
    generator = np.random.default_rng(0)
    lines = []
    for row in range(100_000):
        status = reasons[0] if row % 1000 == 0 else reasons[1 + row % (len(reasons) - 1)]
        noise = jpeg(seed=row, side=96) if status != OK and row % 700 == 1 else b""
        sizes = generator.integers(1, 10**4, 2).tolist()
        facts = {f"column {number}": float(value) for number, value in enumerate(generator.normal(size=3))}
        lines.append(
            line(
                str(row),
                status,
                source_row=row,
                url=f"http://h{row % 5000}.example/",
                caption="many words " * 18,
                caption_chars=198,
                original_width=sizes[0],
                original_height=sizes[1],
                num_bytes=int(generator.integers(1, 10**8)),
                duplicate_of=key_of("0") if row % 997 == 1 else "",
                attributes=json.dumps(facts),
                thumbnail=noise,
            )
        )
    pictures = {entry.key: jpeg(side=512, seed=row) for row, entry in enumerate(lines) if entry.status == OK}
    make_dataset(str(tmp_path), {(Split.TRAIN, "000000"): lines}, pictures)
    content = read_bytes(write_report(str(tmp_path)))
    page = parse(content)
    assert len(content) < MAX_PAGE_BYTES
    assert [card.text for card in page.all("dd")][:2] == ["100,000", "100"]
    assert len(page.by_id("kept").all("img")) == len(page.by_id("rejected").all("img")) == 48


def image_of(node: Node) -> np.ndarray:
    content = base64.b64decode(node.attributes["src"].removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def test_report_shows_the_pictures_of_the_tar_beside_their_captions(tmp_path):
    colours = {f"row {i}": (25 * i, 255 - 25 * i, 40) for i in range(10)}
    lines = [line(name, source_row=i) for i, name in enumerate(colours)]
    thumbnail = jpeg((250, 0, 250), 96)
    lines.append(line("bad", "too_small", detail="3x4", source_row=10, thumbnail=thumbnail))
    pictures = {key_of(name): jpeg(colour, 300) for name, colour in colours.items()}
    make_dataset(str(tmp_path), {(Split.TRAIN, "000000"): lines}, pictures)
    page = page_of(str(tmp_path))
    figures = page.by_id("kept").all("figure")
    found = {figure.all("bdi")[0].text.removeprefix("about "): image_of(figure.all("img")[0]) for figure in figures}
    assert set(found) == set(colours)
    for name, colour in colours.items():
        assert found[name].shape == (160, 160, 3)
        assert np.abs(found[name].astype(int) - colour).max() <= 4
    (rejected,) = page.by_id("rejected").all("figure")
    assert rejected.all("code")[0].text == "too_small"
    assert {"3x4", "about bad"} <= {node.text for node in rejected.all("bdi")}
    assert np.abs(image_of(rejected.all("img")[0]).astype(int) - (250, 0, 250)).max() <= 4


def test_report_shows_the_rows_that_stand_for_most_duplicates(tmp_path):
    num_copies = {f"original {i}": i for i in range(1, 16)}
    originals = [line(name, source_row=i) for i, name in enumerate(num_copies)]
    copies = [
        line(f"{name} {i}", "near_duplicate" if i % 2 else "duplicate_bytes", duplicate_of=key_of(name), source_row=i)
        for name, number in num_copies.items()
        for i in range(number)
    ]
    make_dataset(str(tmp_path), {(Split.TRAIN, "000000"): copies, (Split.VALIDATION, "000003"): originals})
    figures = page_of(str(tmp_path)).by_id("duplicates").all("figure")
    found = [(figure.all("bdi")[0].text, figure.all("strong")[0].text) for figure in figures]
    assert found == [(f"about original {i}", f"{i} copies") for i in range(15, 3, -1)]
    assert "7 near_duplicate" in figures[0].text
    assert "8 duplicate_bytes" in figures[0].text
    assert all(len(figure.all("img")) == 1 for figure in figures)


def test_report_of_nothing_says_so(tmp_path):
    make_dataset(str(tmp_path), {(Split.TRAIN, "000000"): []})
    page = page_of(str(tmp_path))
    assert "There are no input rows." in page.all("header")[0].text
    assert page.all("img") == []


def test_report_of_an_unfinished_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        write_report(str(tmp_path))


WIDEST = """[...document.querySelectorAll('main *, header *, nav *')].filter(node =>
  node.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !node.closest('pre, bdi')).length"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_report_in_a_real_browser_fits_any_width_without_complaint(mixed, tmp_path):
    make_dataset(str(tmp_path), hostile_shards())
    pages = [str(Path(root, "report.html")) for root in (mixed[0], str(tmp_path))]
    for page in pages:
        write_report(str(Path(page).parent))
    with browser() as address:
        for page in pages:
            for width in (360, 390, 1280, 1600):
                seen = view(address, page, width, "document.documentElement.scrollWidth", WIDEST, "document.dir")
                assert seen.complaints == []
                assert seen.results == [width, 0, ""]
                assert Image.open(io.BytesIO(seen.screenshot)).width == width
