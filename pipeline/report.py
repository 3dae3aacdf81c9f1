"""The data report: what a person looks at to trust a dataset; made from manifest, ledgers and a few rows of the tars.

Order: manifest → ledgers, one at a time, each row by its latest line → totals and samples → pictures of the samples,
read by index and encoded anew → `report.html`, published whole. The page holds no time, no host and no path: equal
datasets give equal bytes.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ldm.storage import exists, join, read_text, write_bytes
from pipeline.report_elements import render
from pipeline.report_page import NUM_CLUSTERS, Cluster, Shown, page_of, round_robin
from pipeline.report_totals import COLUMNS, NUM_PICTURES, LedgerRow, Totals, row_of
from pipeline.store.journal import chains, place, read_journal
from pipeline.store.ledger import LEDGER_SUFFIX, OK, read_ledger
from pipeline.store.manifest import Manifest, ShardRecord, load_manifest, shard_path
from pipeline.store.schema import Row, Split
from pipeline.store.shards import read_index, read_row

REPORT_NAME = "report.html"

IMAGE_SUFFIXES = ("jpg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
"""What our own tars and thumbnails hold; nothing else is opened."""
KEPT_SIDE, REJECTED_SIDE = 160, 96
"""Longest side of a shown picture in pixels: twice the page's, for sharp screens; ledgers hold no more than 96."""
QUALITIES = (80, 60, 40, 20)
MAX_PICTURE_BYTES = 8000
"""A picture that is larger is encoded with less quality, so that 108 of them leave the page below 2 MB."""
MAX_PIXELS = 64_000_000


def write_report(root: str) -> str:
    """Write the data report of a finished dataset into its folder and return the report's path.

    Raises:
        ValueError: if the dataset was never finished.
    """
    manifest = load_manifest(root)
    totals = Totals(sum(sum(shard.counts.values()) for shard in manifest.shards))
    for shard, ledger in _ledgers(root, manifest):
        totals.add(shard.split, shard.name, ledger)
    kept = _shown(root, totals.kept.items())
    by_reason = [sample.items() for _, sample in sorted(totals.rejected.items())]
    chosen = round_robin(by_reason, NUM_PICTURES)
    rejected = [Shown(row=row, image=data_uri(row.thumbnail, REJECTED_SIDE)) for row in chosen]
    page = page_of(manifest, totals, kept, rejected, _clusters(root, manifest, totals))
    path = join(root, REPORT_NAME)
    write_bytes(path, render(page))
    return path


def shows(page: str, manifest: Manifest) -> bool:
    """Say whether a page is there and is that of this manifest: a run may have been killed before it was written."""
    return exists(page) and manifest.digest[:12] in read_text(page)


def _ledgers(root: str, manifest: Manifest) -> Iterator[tuple[ShardRecord, pa.Table]]:
    """Yield each shard's ledger without the lines of source rows that a later shard tried again."""
    retried = _retried(root)
    for shard in manifest.shards:
        ledger = read_ledger(shard_path(root, shard.split, shard.name, LEDGER_SUFFIX), COLUMNS)
        for later in retried.get(place(shard.split, shard.name), ()):
            again = read_ledger(shard_path(root, *later, LEDGER_SUFFIX), ("source_row",))["source_row"]
            ledger = ledger.filter(pc.invert(pc.is_in(ledger["source_row"], again.combine_chunks())))
        yield shard, ledger


def _retried(root: str) -> dict[str, list[tuple[Split, str]]]:
    """Return, for each shard some of whose rows were tried again, the later shards that hold their latest lines."""
    journal = read_journal(root)
    found: dict[str, list[tuple[Split, str]]] = {}
    for chain in chains(journal.shards()).values():
        for i, shard in enumerate(chain[:-1]):
            found[place(shard.split, shard.name)] = [(later.split, later.name) for later in chain[i + 1 :]]
    return found


def _clusters(root: str, manifest: Manifest, totals: Totals) -> list[Cluster]:
    """Return the rows that stand for the most duplicates; a second look at the ledgers' keys finds their shards."""
    copies = dict(totals.survivors.largest(NUM_CLUSTERS))
    rows: dict[str, LedgerRow] = {}
    for shard in manifest.shards:
        if len(rows) == len(copies):
            break
        path = shard_path(root, shard.split, shard.name, LEDGER_SUFFIX)
        table = read_ledger(path, ("key", "status"))
        is_sought = pc.and_(pc.is_in(table["key"], pa.array(copies, pa.string())), pc.equal(table["status"], OK))
        if places := np.flatnonzero(np.asarray(is_sought)).tolist():
            ledger = read_ledger(path, COLUMNS)
            found = [row_of(shard.split, shard.name, ledger, row) for row in places]
            rows |= {row.key: row for row in found}
    shown = {shown.row.key: shown for shown in _shown(root, list(rows.values()))}
    return [Cluster(key=key, copies=counts, shown=shown.get(key)) for key, counts in copies.items()]


def _shown(root: str, rows: Sequence[LedgerRow]) -> list[Shown]:
    """Return kept rows with their pictures, in the order given."""
    images: dict[str, str] = {}
    by_shard: dict[tuple[Split, str], list[str]] = {}
    for row in rows:
        by_shard.setdefault((row.split, row.shard), []).append(row.key)
    for (split, name), keys in sorted(by_shard.items()):
        images |= {key: data_uri(_picture_of(members), KEPT_SIDE) for key, members in _members(root, split, name, keys)}
    return [Shown(row=row, image=images.get(row.key, "")) for row in rows]


def _members(root: str, split: Split, name: str, keys: Iterable[str]) -> Iterator[tuple[str, Row]]:
    index = read_index(shard_path(root, split, name, "index"))
    rows = {key: row for row, key in enumerate(index.keys)}
    for key in keys:
        if key in rows:
            yield key, read_row(shard_path(root, split, name, "tar"), index, rows[key])


def _picture_of(members: Row) -> bytes:
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), b"")


def data_uri(content: bytes, longest_side: int) -> str:
    """Return a small JPEG of a picture as a `data:` URI; nothing where it can't be opened.

    Even what our own tars hold is decoded and encoded anew: a page never carries bytes that a stranger wrote.
    """
    if not content:
        return ""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            warnings.simplefilter("ignore")
            if opened.width * opened.height > MAX_PIXELS:
                return ""
            opened.draft("RGB", (2 * longest_side, 2 * longest_side))
            picture = opened.convert("RGB")
    except Exception:  # noqa: BLE001 - on a damaged file Pillow's decoders raise nearly any class there is
        return ""
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return f"data:image/jpeg;base64,{base64.b64encode(_jpeg(picture)).decode()}"


def _jpeg(picture: Image.Image) -> bytes:
    content = b""
    for quality in QUALITIES:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        content = stream.getvalue()
        if len(content) <= MAX_PICTURE_BYTES:
            break
    return content
