"""Parquet files of image addresses and captions, as LAION publishes them; only needed row groups and columns are read.

Files are cut into slices of rows. A training shard is one slice without its held-out rows; a validation shard is the
held-out rows of several slices, so that it is about as long. Every row is in exactly one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from ldm.config import Config, digest_of
from ldm.storage import join, list_names
from pipeline.sources.source import check_positive, check_share, is_held_out, position_of, shard_name
from pipeline.store.schema import SourceRow, Split, key_of

NUM_READERS = 16
"""Parquet footers read at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlParquetConfig(Config):
    """Parquet files with a column of addresses and a column of captions."""

    folder: str
    """Where the .parquet files are: a folder or a URL such as s3://bucket/laion."""
    url_column: str = "URL"
    """Column of the images' addresses."""
    caption_column: str = "TEXT"
    """Column of the captions."""
    attribute_columns: tuple[str, ...] = ()
    """Further columns to keep in each row's JSON."""
    rows_per_shard: int = 10_000
    """Input rows in one shard; fewer come out, since some addresses are dead."""
    holdout_share: float = 0.001
    """Share of addresses kept for validation."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_positive("rows_per_shard", self.rows_per_shard)
        check_share(self.holdout_share)

    def build(self) -> UrlParquetSource:
        """Return the source."""
        return UrlParquetSource(self)

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([self.url_column, self.caption_column, *self.attribute_columns]))


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows [start, stop) of one file."""

    file: str
    start: int
    stop: int


class UrlParquetSource:
    """The rows of a `UrlParquetConfig`, in the files' own order."""

    def __init__(self, config: UrlParquetConfig) -> None:
        """Keep the configuration; files are listed at the first use."""
        self.config = config

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration without its path, and of every file's name, row count and column statistics."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "folder"}
        return digest_of({"config": config, "files": self._footers})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's shards, in order."""
        return [
            shard_name(split, position) for position in range(-(-len(self._slices) // self._slices_per_shard(split)))
        ]

    def open_shard_at_row(self, name: str, row: int) -> Iterator[SourceRow]:
        """Yield the rows of a shard from row number `row` on; the images' bytes are still to be fetched."""
        split, position = position_of(name)
        per_shard = self._slices_per_shard(split)
        slices = self._slices[position * per_shard : (position + 1) * per_shard]
        rows = (source_row for piece in slices for source_row in self._rows(piece, split))
        return islice(rows, row, None)

    def shard_num_rows(self, name: str) -> int | None:
        """Return None: how many rows of a slice are held out is known when they are read."""
        return None

    def num_rows(self, split: Split) -> int:
        """Return about how many rows a split holds: the share of all rows."""
        total = sum(num_rows for _, num_rows, _ in self._footers)
        held_out = round(total * self.config.holdout_share)
        return held_out if split is Split.VALIDATION else total - held_out

    def _slices_per_shard(self, split: Split) -> int:
        if split is Split.TRAIN:
            return 1
        return max(1, min(len(self._slices), round(1 / max(self.config.holdout_share, 1e-6))))

    @cached_property
    def _slices(self) -> list[_Slice]:
        step = self.config.rows_per_shard
        return [
            _Slice(file, start, min(start + step, num_rows))
            for file, num_rows, _ in self._footers
            for start in range(0, num_rows, step)
        ]

    @cached_property
    def _footers(self) -> list[tuple[str, int, str]]:
        """Name, rows and digest of the footer of each file."""
        files = [name for name in list_names(self.config.folder) if name.endswith(".parquet")]
        if not files:
            raise ValueError(f"{self.config.folder} holds no .parquet file")
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return list(readers.map(self._footer, files))

    def _footer(self, file: str) -> tuple[str, int, str]:
        with pq.ParquetFile(join(self.config.folder, file)) as parquet:
            missing = set(self.config.columns) - set(parquet.schema_arrow.names)
            if missing:
                raise ValueError(f"{file} lacks columns {sorted(missing)}; it has {parquet.schema_arrow.names}")
            facts = parquet.metadata.to_dict()
        return file, facts["num_rows"], digest_of(str(facts))

    def _rows(self, piece: _Slice, split: Split) -> Iterator[SourceRow]:
        share = self.config.holdout_share
        for raw in self._records(piece):
            url = raw[self.config.url_column] or ""
            if is_held_out(url, share) == (split is Split.VALIDATION):
                text = raw[self.config.caption_column]
                yield SourceRow(
                    key=key_of(f"url:{url}"),
                    captions=(str(text),) if text else (),
                    url=url,
                    attributes={name: raw[name] for name in self.config.attribute_columns},
                )

    def _records(self, piece: _Slice) -> Iterator[dict[str, Any]]:
        """Yield a slice's records, reading only the row groups that it touches."""
        with pq.ParquetFile(join(self.config.folder, piece.file)) as parquet:
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                num_rows = parquet.metadata.row_group(group).num_rows
                low, high = max(piece.start - first, 0), min(piece.stop - first, num_rows)
                if low < high:
                    table = parquet.read_row_group(group, columns=self.config.columns)
                    yield from table.slice(low, high - low).to_pylist()
                first += num_rows
