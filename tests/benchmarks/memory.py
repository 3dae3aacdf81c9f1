"""Peak memory of the one worker that makes one shard of many rows, fetched from a local nginx.

python -m tests.benchmarks.memory [--rows 10000] [--megapixels 2] [--save]
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tyro

from ldm.config import Config
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import plan_dataset
from pipeline.ingest.fetch import FetchConfig
from pipeline.ingest.stage import IngestStage
from pipeline.ingest.transforms import PictureConfig
from pipeline.plan import ShardTask
from pipeline.run import run
from pipeline.sources.tables import UrlTableConfig
from pipeline.store.manifest import ShardRecord
from tests.benchmarks.photos import make_photos
from tests.benchmarks.web_server import web_server

RESULT = Path(__file__).parent / "results" / "memory.json"
GOAL_GIB = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBenchmark(Config):
    """Peak memory of a worker."""

    rows: int = 10_000
    """Rows of the shard."""
    megapixels: float = 2.0
    """Size of every picture."""
    image_size: int = 256
    """Side of the crops that are kept, pixels."""
    save: bool = False
    """Write the result beside the other results."""


class MeasuredStage:
    """An ingest stage that writes down its process's peak memory after every shard."""

    def __init__(self, config: DatasetConfig, note: str) -> None:
        self.ingest = IngestStage(config, config.root)
        self.note = Path(note)

    def __call__(self, task: ShardTask) -> ShardRecord:
        record = self.ingest(task)
        self.note.write_text(str(_peak_kib()))
        return record


def measured(settings: MemoryBenchmark, home: Path) -> dict[str, Any]:
    """Make the shard by Ray and return the worker's peak memory, the shard's size and the rate."""
    photos = make_photos(home / "photos", [settings.megapixels], 16)
    with web_server(home / "photos", home / "nginx") as server:
        urls = [server.url(photos[row % len(photos)].path.stem, row) for row in range(settings.rows)]
        (home / "listing").mkdir()
        pq.write_table(
            pa.table({"URL": urls, "TEXT": [f"photograph number {row}" for row in range(settings.rows)]}),
            home / "listing" / "urls.parquet",
        )
        config = DatasetConfig(
            root=str(home / "dataset"),
            source=UrlTableConfig(folder=str(home / "listing"), rows_per_shard=settings.rows, holdout_share=0.0),
            picture=PictureConfig(image_size=settings.image_size),
            fetch=FetchConfig(allowed_networks=("127.0.0.0/8",), allowed_ports=(server.port,)),
        )
        plan = replace(plan_dataset(config), make_stage=partial(MeasuredStage, config, str(home / "peak")))
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:
            started = time.monotonic()
            report = run(plan)
            seconds = time.monotonic() - started
        finally:
            ray.shutdown()
    assert report.num_rows == settings.rows, report.counts
    return {
        "rows": report.num_rows,
        "peak_gib": int((home / "peak").read_text()) / 2**20,
        "shard_gib": sum(path.stat().st_size for path in (home / "dataset" / "train").glob("*.tar")) / 2**30,
        "fetched_gib": sum(photos[row % len(photos)].path.stat().st_size for row in range(settings.rows)) / 2**30,
        "images_a_second": report.num_rows / seconds,
    }


def _peak_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("this system does not say how much memory a process held at most")


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(MemoryBenchmark, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="memory-benchmark-") as folder:
        record = measured(settings, Path(folder)) | {"settings": settings.to_dict()}
    print(
        f"{record['rows']:,} rows of {settings.megapixels:g} MP, {record['fetched_gib']:.1f} GiB fetched into one shard"
    )
    print(f"of {record['shard_gib']:.2f} GiB at {record['images_a_second']:.1f} images/s by one worker")
    print(f"peak memory of the worker {record['peak_gib']:.2f} GiB, goal {GOAL_GIB} GiB at most")
    if settings.save:
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
