"""Bad listings: the rows around what is broken still come, and it shows for itself.

Each case is a file, the number of sound rows that come out of it, and words of what its broken rows say.
"""

from __future__ import annotations

import gzip
import io
import json
from datetime import datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.image_parquet import ImageParquetConfig
from pipeline.sources.tables import UrlTableConfig
from pipeline.store.schema import Split

GOOD = b"GOOD"


def read(source):
    """All rows, which must also be what ingest can write down: unique keys apart, JSON and UTF-8."""
    rows = [row for split in Split for name in source.shard_names(split) for row in source.open_shard_at_row(name, 0)]
    for row in rows:
        json.dumps([row.captions, row.attributes, row.url], ensure_ascii=False, allow_nan=False).encode()
        assert "\0" not in "".join(row.captions)
    return rows


def parquet_of(column, values):
    """A listing of five rows whose middle one is odd in one column."""
    good = {"URL": pa.array([f"http://a.example/{i}" for i in range(5)]), "TEXT": pa.array([f"t{i}" for i in range(5)])}
    table = pa.table({**good, column: values})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def odd(values, kind=None):
    return pa.array(values, kind)


BROKEN_UTF8 = pa.array([b"a", b"b", b"\xff\xfe c", b"d", b"e"], pa.binary()).view(pa.binary())


def broken_strings():
    """A string column with bytes that are no UTF-8, as careless writers leave them."""
    return pa.Array.from_buffers(pa.string(), 5, BROKEN_UTF8.buffers())


LISTED = {
    "url null": (parquet_of("URL", odd(["http://a", "http://b", None, "http://d", "http://e"])), "", ("t2",)),
    "url number": (parquet_of("URL", odd([1, 2, 3, 4, 5])), "", ("t2",)),
    "url list": (parquet_of("URL", odd([["x"]] * 5)), "", ("t2",)),
    "url bytes": (parquet_of("URL", odd([b"http://a"] * 2 + [b"http://c"] + [b"http://d"] * 2)), "http://c", ("t2",)),
    "url broken utf-8": (parquet_of("URL", broken_strings()), "\ufffd\ufffd c", ("t2",)),
    "caption null": (parquet_of("TEXT", odd(["a", "b", None, "d", "e"])), "http://a.example/2", ()),
    "caption number": (parquet_of("TEXT", odd([1, 2, 3, 4, 5])), "http://a.example/2", ("3",)),
    "caption NaN": (parquet_of("TEXT", odd([1.0, 2.0, float("nan"), 4.0, 5.0])), "http://a.example/2", ()),
    "caption infinite": (parquet_of("TEXT", odd([1.0, 2.0, float("inf"), 4.0, 5.0])), "http://a.example/2", ()),
    "caption nested": (parquet_of("TEXT", odd([{"a": {"b": 1}}] * 5)), "http://a.example/2", ()),
    "caption list": (parquet_of("TEXT", odd([["a", None, "b"]] * 5)), "http://a.example/2", ("a", "b")),
    "caption bytes": (parquet_of("TEXT", odd([b"\xc3\xa9"] * 5)), "http://a.example/2", ("\u00e9",)),
    "caption broken utf-8": (parquet_of("TEXT", broken_strings()), "http://a.example/2", ("\ufffd\ufffd c",)),
    "caption date": (parquet_of("TEXT", odd([datetime(2020, 1, 1)] * 5)), "http://a.example/2", ()),
    "caption decimal": (parquet_of("TEXT", odd([Decimal("1.5")] * 5)), "http://a.example/2", ()),
    "caption date beyond Python's": (
        parquet_of("TEXT", odd([2**62] * 5, pa.int64()).cast(pa.timestamp("us"))),
        "http://a.example/2",
        (),
    ),
    "caption of nulls only": (parquet_of("TEXT", pa.nulls(5)), "http://a.example/2", ()),
    "caption blank": (parquet_of("TEXT", odd(["a", "b", " \n ", "d", "e"])), "http://a.example/2", ()),
    "caption 1 MB": (parquet_of("TEXT", odd(["x" * 2**20] * 5)), "http://a.example/2", ("x" * 2**20,)),
    "caption with NUL": (parquet_of("TEXT", odd(["a\0b"] * 5)), "http://a.example/2", ("ab",)),
    "caption control characters": (
        parquet_of("TEXT", odd(["a\x07\x1b[1m"] * 5)),
        "http://a.example/2",
        ("a\x07\x1b[1m",),
    ),
    "caption RTL": (parquet_of("TEXT", odd(["\u202e\u05d0\u05d1"] * 5)), "http://a.example/2", ("\u202e\u05d0\u05d1",)),
    "caption dictionary": (
        parquet_of("TEXT", odd(["a", "b", "c", "d", "e"]).dictionary_encode()),
        "http://a.example/2",
        ("c",),
    ),
}


@pytest.mark.parametrize("kind", LISTED)
def test_odd_value_in_a_parquet_listing_leaves_every_row(kind, tmp_path):
    content, url, captions = LISTED[kind]
    (tmp_path / "a.parquet").write_bytes(content)
    rows = read(UrlTableConfig(folder=str(tmp_path), holdout_share=0.0, attribute_columns=("TEXT",)).build())
    assert len(rows) == 5
    assert (rows[2].url, rows[2].captions) == (url, captions)


def test_rows_without_an_address_are_told_apart(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_of("URL", pa.nulls(5, pa.string())))
    assert len({row.key for row in read(UrlTableConfig(folder=str(tmp_path), holdout_share=0.0).build())}) == 5


def lines(*middle):
    """A JSONL file with odd lines among sound ones."""
    sound = [json.dumps({"URL": f"http://a.example/{i}", "TEXT": f"t{i}"}).encode() for i in range(4)]
    return b"\n".join([*sound[:2], *middle, *sound[2:]]) + b"\n"


def table(*middle, delimiter=b","):
    sound = [delimiter.join((f"http://a.example/{i}".encode(), f"t{i}".encode())) for i in range(4)]
    return b"\n".join([delimiter.join((b"URL", b"TEXT")), *sound[:2], *middle, *sound[2:]]) + b"\n"


PARQUET = parquet_of("TEXT", odd(["a", "b", "c", "d", "e"]))
BROKEN_LISTINGS = {
    "no JSON": ("a.jsonl", lines(b'{"URL": "http://x", '), 4, ["no JSON"]),
    "JSON of a list": ("a.jsonl", lines(b'["http://x"]', b"3", b"null"), 4, ["a list", "a int", "a NoneType"]),
    "JSON nested 100,000 deep": ("a.jsonl", lines(b"[" * 100_000), 4, ["no JSON"]),
    "JSON number of 5,000 digits": ("a.jsonl", lines(b'{"URL": ' + b"1" * 5000 + b"}"), 4, ["no JSON"]),
    "JSON cut off at the end": ("a.jsonl", lines()[:-20], 3, ["no JSON"]),
    "binary line": ("a.jsonl", lines(bytes(range(128, 256)) + b"\0\1"), 4, ["no JSON"]),
    "too few fields": ("a.csv", table(b"http://x"), 4, ["1 fields where 2 are named"]),
    "too many fields": ("a.csv", table(b"http://x,a,b"), 4, ["3 fields where 2 are named"]),
    "unclosed quote swallows nothing": ("a.csv", table(b'http://x,"a,b'), 4, ["3 fields where 2 are named"]),
    "text after a closing quote": ("a.csv", table(b'http://x,"a" b,c'), 4, ["3 fields where 2 are named"]),
    "unclosed quote of the last line": ("a.csv", table() + b'"http://x,t', 4, []),
    "quotes as letters in a TSV": ("a.tsv", table(b'http://x\t"so" he said', delimiter=b"\t"), 5, []),
    "carriage returns and blank lines": ("a.csv", table(b"", b"").replace(b"\n", b"\r\n"), 4, []),
    "line of 20 MB": ("a.jsonl", lines(b"x" * (20 << 20)), 4, ["a line of 20971521 bytes"]),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(lines())[:-9], 4, ["can't be unpacked any further"]),
    "gzip that is none": ("a.jsonl.gz", lines(), 0, ["can't be unpacked any further"]),
    "zst that is none": ("a.jsonl.zst", lines(), 0, ["can't be unpacked any further"]),
    "parquet that is HTML": ("a.parquet", b"<html>" * 100, 0, ["no readable parquet file"]),
    "parquet of no bytes": ("a.parquet", b"", 0, ["no readable parquet file"]),
    "parquet cut off": ("a.parquet", PARQUET[:-50], 0, ["no readable parquet file"]),
    "parquet with a broken footer": (
        "a.parquet",
        PARQUET[:-60] + b"\xff" * 40 + PARQUET[-20:],
        0,
        ["no readable parquet"],
    ),
    "parquet whose footer is longer than it": ("a.parquet", PARQUET[:-8] + b"\xff\xff\xff\x7fPAR1", 0, ["no readable"]),
    "text of no bytes": ("a.csv", b"", 0, []),
}


@pytest.mark.parametrize("kind", BROKEN_LISTINGS)
def test_broken_listing_gives_its_sound_rows_and_a_row_for_what_is_broken(kind, tmp_path):
    name, content, num_sound, problems = BROKEN_LISTINGS[kind]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.jsonl").write_bytes(b'{"URL": "http://z.example", "TEXT": "z"}\n')
    for size in (1, 3, 100):
        rows = read(UrlTableConfig(folder=str(tmp_path), rows_per_shard=size, holdout_share=0.0).build())
        broken = [row for row in rows if "broken_line" in row.attributes]
        sound = [row for row in rows if row.url and "broken_line" not in row.attributes]
        assert rows[-1].url == "http://z.example"
        assert len(sound) - 1 == num_sound + (kind == "unclosed quote of the last line")
        assert len(broken) == len(problems)
        assert all(word in row.attributes["broken"] for word, row in zip(problems, broken, strict=True))
        assert all((row.url, row.payload, row.attributes["file"]) == ("", None, name) for row in broken)
        assert len({row.key for row in rows}) == len(rows)


def test_lone_surrogates_of_a_listing_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"URL": "http://a", "TEXT": "a\\ud800b \\ud83d\\ude00 \\udfff", "x\\udc00": 1}\n'
    )
    assert read(UrlTableConfig(folder=str(tmp_path)).build())[0].captions == ("a\ufffdb \U0001f600 \ufffd",)


def test_row_group_that_can_not_be_decoded_costs_its_rows_only(tmp_path):
    texts = [f"text {i} " * 20 for i in range(60)]
    table = pa.table({"URL": [f"http://a.example/{i}" for i in range(60)], "TEXT": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20, use_dictionary=False, write_page_checksum=True)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1)
    end = column.data_page_offset + column.total_compressed_size
    content[end - 40 : end - 10] = b"\xee" * 30
    (tmp_path / "a.parquet").write_bytes(content)
    rows = read(UrlTableConfig(folder=str(tmp_path), rows_per_shard=7, holdout_share=0.0).build())
    assert [row.url for row in rows if row.url] == [f"http://a.example/{i}" for i in (*range(20), *range(40, 60))]
    broken = [row for row in rows if not row.url]
    assert len({row.key for row in broken}) == len(broken) == 20
    assert all("row group 1 can't be decoded" in row.attributes["broken"] for row in broken)


IMAGES = {
    "null": (None, "the image has no bytes"),
    "empty": ({"bytes": b"", "path": None}, "the image has no bytes"),
    "path only": ({"bytes": None, "path": "../../etc/passwd"}, "its path is not followed"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image_parquet_row_without_bytes_says_so(kind, tmp_path):
    value, problem = IMAGES[kind]
    good = {"bytes": GOOD, "path": "x"}
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([good, value, good], kinds), "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(ImageParquetConfig(folder=str(tmp_path), holdout_share=0.0).build())
    assert [row.payload for row in rows] == [GOOD, None, GOOD]
    assert problem in rows[1].attributes["broken"]
    assert rows[1].captions == ("b",)


def test_image_parquet_column_of_another_type_says_so(tmp_path):
    pq.write_table(pa.table({"image": [[1, 2], [3]], "text": ["a", "b"]}), tmp_path / "a.parquet")
    rows = read(ImageParquetConfig(folder=str(tmp_path), holdout_share=0.0).build())
    assert [row.attributes["broken"] for row in rows] == ["the image is a list, not bytes"] * 2
