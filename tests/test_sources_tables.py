"""Laws of listings of addresses: every format gives the same rows, read slice by slice, wherever the files lie."""

from __future__ import annotations

import csv
import gzip
import http.server
import io
import json
import threading
from contextlib import contextmanager
from itertools import pairwise

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources.image_parquet import ImageParquetConfig
from pipeline.sources.records import fields_of, read_records
from pipeline.sources.tables import UrlTableConfig, laion_columns
from pipeline.store.schema import Split, key_of

ROWS = [
    {
        "URL": f"http://images.example/{i}.jpg",
        "TEXT": f'a "quoted"\ttext, {i}\nof two lines; \u05e2\u05d1\u05e8\u05d9\u05ea',
        "punsafe": i / 200,
    }
    for i in range(200)
]


def as_csv(rows, delimiter=","):
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_parquet(rows):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, row_group_size=48)
    return stream.getvalue()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_zst(content):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(content)
    return stream.getvalue().to_pybytes()


FORMATS = {
    "a.parquet": as_parquet,
    "a.csv": as_csv,
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.jsonl": as_jsonl,
    "a.ndjson": as_jsonl,
    "a.csv.gz": lambda rows: gzip.compress(as_csv(rows)[:500]) + gzip.compress(as_csv(rows)[500:]),
    "a.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "a.jsonl.zst": lambda rows: as_zst(as_jsonl(rows)),
    "deep/er/A.CSV": as_csv,
}


def read(source, split=Split.TRAIN):
    return [row for name in source.shard_names(split) for row in source.open_shard_at_row(name, 0)]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [1, 37, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_table_of_any_format_gives_the_same_rows(name, size, tmp_path):
    write(tmp_path, name, FORMATS[name](ROWS))
    config = UrlTableConfig(
        folder=str(tmp_path), rows_per_shard=size, attribute_columns=("punsafe",), holdout_share=0.1
    )
    source = config.build()
    found = {row.url: row for split in Split for row in read(source, split)}
    assert [found[row["URL"]].captions for row in ROWS] == [(row["TEXT"],) for row in ROWS]
    assert [float(found[row["URL"]].attributes["punsafe"]) for row in ROWS] == [row["punsafe"] for row in ROWS]
    assert all(row.key == key_of(f"url:{url}") and row.payload is None for url, row in found.items())
    assert source.num_rows(Split.TRAIN) + source.num_rows(Split.VALIDATION) == len(ROWS)
    assert len(source.shard_names(Split.TRAIN)) == -(-len(ROWS) // size)


@pytest.mark.parametrize("name", FORMATS)
def test_table_without_a_required_column_names_those_it_has(name, tmp_path):
    write(tmp_path, name, FORMATS[name](ROWS))
    for field in ({"url_column": "link"}, {"caption_columns": ("TEXT", "link")}):
        config = UrlTableConfig(folder=str(tmp_path), **field)
        with pytest.raises(ValueError, match=rf"{name} lacks columns \['link'\]; it has \['URL', 'TEXT', 'punsafe'\]"):
            config.build().shard_names(Split.TRAIN)


def test_laion_columns_are_kept_where_a_file_has_them(tmp_path):
    plain = {"URL": "http://a.example/1", "TEXT": "one"}
    facts = {"WIDTH": 3, "similarity": 0.3, "hash": -5, "LICENSE": "?"}
    write(tmp_path, "0.parquet", as_parquet([plain | facts]))
    write(tmp_path, "1.parquet", as_parquet([{**plain, "URL": "http://a.example/2", "pwatermark": 0.1, "odd": 1}]))
    source = UrlTableConfig(folder=str(tmp_path), attribute_columns=laion_columns(), holdout_share=0.0).build()
    assert [row.attributes for row in read(source)] == [facts, {"pwatermark": 0.1}]


def test_table_captions_come_from_several_columns_and_from_lists(tmp_path):
    rows = [{"URL": "u", "alt": "b", "all": ["a", "", "b", None]}, {"URL": "v", "alt": None, "all": None}]
    write(tmp_path, "0.jsonl", as_jsonl(rows))
    source = UrlTableConfig(folder=str(tmp_path), caption_columns=("all", "alt"), holdout_share=0.0).build()
    assert [row.captions for row in read(source)] == [("a", "b"), ()]


def test_table_without_a_header_takes_the_names_given(tmp_path):
    write(tmp_path, "0.tsv", b"\xef\xbb\xbfone cat\thttp://a.example/1\ntwo cats\thttp://a.example/2\n")
    named = {"column_names": ("caption", "url"), "url_column": "url", "caption_columns": ("caption",)}
    source = UrlTableConfig(folder=str(tmp_path), holdout_share=0.0, rows_per_shard=1, **named).build()
    assert [(row.url, row.captions) for row in read(source)] == [
        ("http://a.example/1", ("one cat",)),
        ("http://a.example/2", ("two cats",)),
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl.gz"])
def test_changed_table_refuses_its_old_shards_and_keeps_its_keys(name, tmp_path):
    path = write(tmp_path, name, FORMATS[name](ROWS))
    config = UrlTableConfig(folder=str(tmp_path), rows_per_shard=50, holdout_share=0.0)
    before = config.build()
    old_names, old_keys = before.shard_names(Split.TRAIN), [row.key for row in read(before)]
    path.write_bytes(FORMATS[name]([{**row, "TEXT": "new"} for row in ROWS]))
    after = config.build()
    assert not set(after.shard_names(Split.TRAIN)) & set(old_names)
    assert [row.key for row in read(after)] == old_keys
    assert {after.previous_of(shard) for shard in (*old_names, *after.shard_names(Split.TRAIN))} == {name}
    with pytest.raises(ValueError, match=f"{name} is no longer the file that shard train/{name}@"):
        list(config.build().open_shard_at_row(old_names[1], 0))


def test_a_change_in_the_middle_of_a_text_file_changes_its_names(tmp_path):
    content = as_jsonl([{"URL": f"http://a.example/{i}", "TEXT": "x" * 100} for i in range(4000)])
    path = write(tmp_path, "a.jsonl", content)
    config = UrlTableConfig(folder=str(tmp_path), holdout_share=0.0)
    before = config.build().shard_names(Split.TRAIN)
    path.write_bytes(content.replace(b"example/2000", b"example/9999"))  # same size, same ends
    assert set(config.build().shard_names(Split.TRAIN)).isdisjoint(before)


def test_tables_named_in_another_order_have_the_same_shards(tmp_path):
    for name in ("a.csv", "b.csv"):
        write(tmp_path, name, as_csv(ROWS[:5]))
    there = [
        UrlTableConfig(folder=str(tmp_path), files=files).build() for files in (("a.csv", "b.csv"), ("b.csv", "a.csv"))
    ]
    assert there[0].shard_names(Split.TRAIN) == there[1].shard_names(Split.TRAIN)
    assert there[0].shard_names(Split.TRAIN) == UrlTableConfig(folder=str(tmp_path)).build().shard_names(Split.TRAIN)


class CountingFileSystem(LocalFileSystem):
    """The local disk under another name, that writes down every range read."""

    protocol = "counting"
    cachable = False
    reads: list[tuple[str, int, int]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("counting://"))

    def open(self, path, mode="rb", **_):
        return CountingFile(self._strip_protocol(path))


class CountingFile(io.FileIO):
    def readinto(self, buffer):
        start = self.tell()
        count = super().readinto(buffer)
        CountingFileSystem.reads.append((self.name, start, start + count))
        return count

    def read(self, size=-1):
        start = self.tell()
        content = super().read(size)
        CountingFileSystem.reads.append((self.name, start, start + len(content)))
        return content


@pytest.fixture
def reads():
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.reads.clear()
    return CountingFileSystem.reads


def num_bytes(reads):
    return sum(stop - start for _, start, stop in reads)


def incompressible(count, width):
    return [
        {"URL": f"http://a.example/{i}", "TEXT": key_of(str(i)) * width, "big": key_of(f"b{i}") * width}
        for i in range(count)
    ]


def test_parquet_listing_reads_footers_to_plan_and_only_its_row_group_and_columns_to_open(tmp_path, reads):
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(incompressible(20_000, 20))
    pq.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="none")
    size = path.stat().st_size
    config = UrlTableConfig(folder=f"counting://{tmp_path}", rows_per_shard=500, holdout_share=0.0)
    source = config.build()
    names = source.shard_names(Split.TRAIN)
    assert len(names) == 40
    assert num_bytes(reads) < 0.01 * size
    group = pq.ParquetFile(path).metadata.row_group(10)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(3)}
    wanted = sum(columns[name].total_compressed_size for name in ("URL", "TEXT"))
    spans = [(columns[name].data_page_offset, columns[name].total_compressed_size) for name in ("URL", "TEXT")]
    reads.clear()
    rows = list(config.build().open_shard_at_row(names[20], 0))
    assert [row.url for row in rows] == [f"http://a.example/{i}" for i in range(10_000, 10_500)]
    data_reads = [read for read in reads if read[2] < size - 100_000]
    assert data_reads
    assert all(any(start <= low and high <= start + length for start, length in spans) for _, low, high in data_reads)
    assert num_bytes(data_reads) <= wanted


def test_text_listing_is_passed_over_once_to_plan_and_a_shard_seeks_to_its_slice(tmp_path, reads):
    path = write(tmp_path, "a.csv", as_csv(incompressible(20_000, 10)))
    config = UrlTableConfig(folder=f"counting://{tmp_path}", rows_per_shard=500, holdout_share=0.0)
    source = config.build()
    names = source.shard_names(Split.TRAIN)
    assert path.stat().st_size <= num_bytes(reads) < 1.05 * path.stat().st_size
    reads.clear()
    rows = list(config.build().open_shard_at_row(names[20], 0))
    assert [row.url for row in rows] == [f"http://a.example/{i}" for i in range(10_000, 10_500)]
    assert num_bytes(reads) < 0.45 * path.stat().st_size  # header, slice, the digest's ends: a buffer of 1 MiB each


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without listings; `range` in the path turns on answers in parts."""

    def list_directory(self, path):
        self.send_error(403)

    def do_GET(self):
        asked = self.headers.get("Range")
        if "range" not in self.path or not asked:
            super().do_GET()
            return
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        start, stop = asked.removeprefix("bytes=").split("-")
        part = content[int(start) : int(stop or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self):
        if "range" in self.path:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def web_server(folder):
    def handler(*arguments):
        return Handler(*arguments, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("place", ["range", "whole"])
@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl.gz"])
def test_files_on_a_web_server_that_lists_nothing_are_read_by_name(name, place, tmp_path):
    write(tmp_path / place, name, FORMATS[name](ROWS))
    with web_server(tmp_path) as url:
        sources = [
            UrlTableConfig(folder=str(tmp_path / place), rows_per_shard=60, holdout_share=0.0).build(),
            UrlTableConfig(folder=f"{url}/{place}", files=(name,), rows_per_shard=60, holdout_share=0.0).build(),
        ]
        assert sources[0].shard_names(Split.TRAIN) == sources[1].shard_names(Split.TRAIN)
        assert read(sources[0]) == read(sources[1])
        alone = UrlTableConfig(files=(f"{url}/{place}/{name}",), rows_per_shard=60, holdout_share=0.0).build()
        assert read(alone) == read(sources[0])


@pytest.mark.parametrize("layout", ["struct", "plain"])
def test_image_parquet_gives_bytes_captions_and_keys_by_content(layout, tmp_path):
    images = [f"image {i // 2}".encode() for i in range(20)]
    column = images if layout == "plain" else [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    table = pa.table({"image": column, "text": [f"text {i}" for i in range(20)], "id": range(20)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=6)
    config = ImageParquetConfig(folder=str(tmp_path), rows_per_shard=7, attribute_columns=("id",), holdout_share=0.3)
    rows = {split: read(config.build(), split) for split in Split}
    by_id = {row.attributes["id"]: row for found in rows.values() for row in found}
    assert [by_id[i].payload for i in range(20)] == images
    assert [by_id[i].captions for i in range(20)] == [(f"text {i}",) for i in range(20)]
    assert len({row.key for row in by_id.values()}) == 20
    payloads = {split: {row.payload for row in found} for split, found in rows.items()}
    assert payloads[Split.TRAIN].isdisjoint(payloads[Split.VALIDATION])  # one image, however many captions
    named = ImageParquetConfig(folder=str(tmp_path), key_column="id", holdout_share=0.0)
    assert {row.key for row in read(named.build())} == {key_of(f"id:{i}") for i in range(20)}


LINES = st.lists(st.sampled_from([b"a", b'"', b'""', b",", b"\n", b"\r\n", b"x y", b"\0", b"\xff"]), max_size=60).map(
    b"".join
)


@settings(max_examples=300, deadline=None)
@given(LINES, st.sampled_from([b",", b"\t", b""]))
def test_records_of_any_bytes_cover_every_line_and_begin_anew_at_any_of_them(content, delimiter):
    records = list(read_records(io.BytesIO(content), 0, delimiter))
    ends = [record.offset + len(record.content) for record in records]
    starts = [record.offset for record in records]
    for stop, start in pairwise([0, *(x for pair in zip(starts, ends, strict=True) for x in pair), len(content)]):
        assert stop <= start
    gaps = [content[end:start] for end, start in zip([0, *ends], [*starts, len(content)], strict=True)]
    assert all(not gap.strip(b"\r\n" if delimiter else b"\r\n\t\v\f ") for gap in gaps)
    for number, start in enumerate(starts):
        file = io.BytesIO(content)
        file.seek(start)
        assert list(read_records(file, start, delimiter)) == records[number:]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0")), min_size=2, max_size=2), min_size=1
    )
)
def test_records_of_a_well_formed_csv_are_those_of_the_standard_library(rows):
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    records = read_records(io.BytesIO(stream.getvalue().encode()), 0, b",")
    assert [[field.decode() for field in fields_of(record, b",")] for record in records] == rows
