"""Source rows → one shard of a dataset: tar, index, and a ledger with one line for every input row.

Order for each row: bytes (given or fetched) → decode → filters → encode → members `png|jpg|webp`, `txt`, `json`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ImageColor

from ldm.config import Config, digest_of
from ldm.storage import write_bytes
from pipeline.ingest.fetch import FetchConfig, Fetcher
from pipeline.ingest.filters import FilterConfig, kept_captions, reject_shape
from pipeline.ingest.transforms import ImageFormat, Picture, decode, encode
from pipeline.run import Plan, Resources, ShardTask
from pipeline.sources.emoji import EmojiConfig
from pipeline.sources.folder import FolderConfig
from pipeline.sources.parquet import UrlParquetConfig
from pipeline.sources.source import Source
from pipeline.sources.tars import TarsConfig
from pipeline.store.manifest import FileRecord, ShardRecord, count_by_split, shard_path
from pipeline.store.schema import JSON, Reject, Row, SourceRow, Split
from pipeline.store.shards import write_shard

OK = "ok"
"""Status of a row that is in the tar."""

_BYTES_PER_PIXEL = {ImageFormat.PNG: 1.5, ImageFormat.JPG: 0.6, ImageFormat.WEBP: 0.4}
_TAR_BYTES_PER_ROW = 4096
"""Three headers, a short JSON and a caption, each padded to blocks of 512."""
_PLACES = frozenset({"root", "num_cpus", "num_actors", "fetch"})
"""Fields that say where and how fast, not which rows come out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig(Config):
    """A sharded image-text dataset, made from a source."""

    root: str
    """Folder or URL that the dataset is written to."""
    source: EmojiConfig | FolderConfig | UrlParquetConfig | TarsConfig
    """Where images and captions come from."""
    image_size: int = 256
    """Side of the stored square pictures in pixels."""
    image_format: ImageFormat = ImageFormat.JPG
    """How pictures are stored; png loses nothing."""
    quality: int = 95
    """Quality of jpg and webp, 1 to 100."""
    background: str = "#ffffff"
    """Colour behind transparent images."""
    max_pixels: int = 64_000_000
    """Images with more pixels are refused before they are decoded."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which rows are left out."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How addresses are fetched."""
    num_cpus: float = 1.0
    """CPUs of one worker."""
    num_actors: int | None = None
    """Workers at once; none for as many as there are CPUs."""

    def __post_init__(self) -> None:
        """Refuse what no picture could be made with."""
        for name in ("image_size", "max_pixels", "num_cpus"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, got {self.quality}")
        if self.num_actors is not None and self.num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {self.num_actors}")
        if len(ImageColor.getrgb(self.background)) != len("rgb"):
            raise ValueError(f"background must be a colour without transparency, got {self.background}")

    def identity(self, source_digest: str) -> dict[str, JSON]:
        """Return what decides the dataset's rows: no path, no worker count."""
        facts = {name: value for name, value in self.to_dict().items() if name not in _PLACES}
        source = {name: value for name, value in facts["source"].items() if name != "folder"}
        return facts | {"source": source | {"digest": source_digest}}


class IngestStage:
    """Makes the shards of one dataset; built once in each worker."""

    def __init__(self, config: DatasetConfig) -> None:
        """Keep the configuration and open the source."""
        self.config = config
        self.source: Source = config.source.build()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tar, index and ledger and return their record."""
        ledger: list[tuple[str, str, str]] = []
        files = write_shard(self.config.root, task.split, task.name, self._rows(task, ledger))
        path = shard_path(self.config.root, task.split, task.name, "ledger.parquet")
        files["ledger.parquet"] = _write_ledger(path, ledger)
        counts = Counter(status for _, status, _ in ledger)
        return ShardRecord(
            name=task.name,
            split=task.split,
            num_rows=counts[OK],
            files=files,
            counts=dict(sorted(counts.items())),
            source=task.source_digest,
        )

    def _rows(self, task: ShardTask, ledger: list[tuple[str, str, str]]) -> Iterator[Row]:
        """Yield the rows that go into the tar, writing a line for every row into the ledger."""
        seen: set[str] = set()
        with Fetcher(self.config.fetch) as fetcher:
            for source_row, payload in fetcher.payloads(self.source.open_shard_at_row(task.source_name, 0)):
                is_repeated = source_row.key in seen
                row = Reject("duplicate_key") if is_repeated else self._row(source_row, payload)
                if isinstance(row, Reject):
                    ledger.append((source_row.key, row.reason, row.detail))
                    continue
                seen.add(source_row.key)
                ledger.append((source_row.key, OK, ""))
                yield row

    def _row(self, source_row: SourceRow, payload: bytes | Reject) -> Row | Reject:
        config = self.config
        captions = kept_captions(source_row.captions, config.filters)
        if isinstance(captions, Reject):
            return captions
        if isinstance(payload, Reject):
            return payload
        picture = decode(payload, config.image_size, config.background, config.max_pixels)
        if isinstance(picture, Reject):
            return picture
        if shape := reject_shape(picture.original_width, picture.original_height, config.filters):
            return shape
        return self._members(source_row, captions, picture)

    def _members(self, source_row: SourceRow, captions: tuple[str, ...], picture: Picture) -> Row:
        config = self.config
        content = encode(picture.image, config.image_format, config.quality)
        facts = {
            "captions": captions,
            "width": picture.image.width,
            "height": picture.image.height,
            "original_width": picture.original_width,
            "original_height": picture.original_height,
            "sha256": hashlib.sha256(content).hexdigest(),
            "url": source_row.url,
            "attributes": source_row.attributes,
        }
        return {
            "__key__": source_row.key,
            config.image_format.value: content,
            "txt": captions[0].encode(),
            "json": json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str).encode(),
        }


def plan_dataset(config: DatasetConfig) -> Plan:
    """Return the plan of a dataset; `pipeline.run.run` carries it out.

    Raises:
        ValueError: if the source is not there or has no rows.
    """
    source: Source = config.source.build()
    tasks = tuple(_task(source, split, *place) for split in Split for place in enumerate(source.shard_names(split)))
    if not tasks:
        raise ValueError(f"{type(config.source).__name__} has no rows")
    num_rows = sum(source.num_rows(split) or 0 for split in Split)
    bytes_per_row = config.image_size**2 * _BYTES_PER_PIXEL[config.image_format] + _TAR_BYTES_PER_ROW
    return Plan(
        root=config.root,
        kind="dataset",
        identity=config.identity(source.digest),
        tasks=tasks,
        make_stage=partial(IngestStage, config),
        resources=Resources(num_cpus=config.num_cpus, num_actors=config.num_actors),
        num_rows=num_rows,
        num_bytes_estimate=round(num_rows * bytes_per_row),
        summarize=summarize,
    )


def summarize(records: Sequence[ShardRecord]) -> dict[str, JSON]:
    """Return the manifest's summary of a dataset: input rows by status for each split."""
    return {"counts": count_by_split(records)}


def _task(source: Source, split: Split, position: int, source_name: str) -> ShardTask:
    return ShardTask(
        split=split,
        name=f"{position:06d}",
        source_name=source_name,
        source_digest=digest_of([source.digest, source_name]),
        num_rows=source.shard_num_rows(source_name) or 0,
    )


def _write_ledger(path: str, ledger: Sequence[tuple[str, str, str]]) -> FileRecord:
    columns = list(zip(*ledger, strict=True)) if ledger else [(), (), ()]
    arrays = [pa.array(column, pa.string()) for column in columns]
    stream = io.BytesIO()
    pq.write_table(pa.table(arrays, names=["key", "status", "detail"]), stream, compression="zstd")
    content = stream.getvalue()
    write_bytes(path, content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
