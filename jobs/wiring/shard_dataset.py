"""What surrounds the making of a dataset: flags that are no part of it, its report, and its run in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console

from jobs.wiring.data_runs import is_published, publish_report
from ldm import storage
from ldm.training.tracking_config import TrackingConfig
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import Request
from pipeline.ingest.retrying import Retry
from pipeline.progress import counts_table
from pipeline.report import REPORT_NAME, shows, write_report
from pipeline.run import RunReport
from pipeline.store.manifest import Manifest
from pipeline.store.verification import verify_dataset

EXIT_DAMAGED = 1
"""Exit code of a `--verify` that found something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardDatasetConfig(DatasetConfig):
    """A sharded image-text dataset, made from a source."""

    record: str = ""
    """Local folder that remembers the MLflow run; needed where tracking.uri is given."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(uri=""))
    """MLflow, which gets counts and the report."""
    verify: bool = False
    """Read everything back and compare it with the manifest; makes nothing."""
    retry: Retry = Retry.NONE
    """Try rows again that failed: transient for causes that may pass, all for every failed download or picture."""
    refilter: bool = False
    """Remake the shards that other filters change; without it such a change is only shown."""

    @property
    def request(self) -> Request:
        """What is asked for besides the dataset itself."""
        return Request(retry=self.retry, refilter=self.refilter)


def verified(root: str) -> int:
    """Read a dataset back, print what is wrong with it, and return the exit code."""
    found = verify_dataset(root)
    for problem in found.problems:
        print(problem)
    verdict = f"{len(found.problems)} problems" if found.problems else "all as the manifest says"
    print(f"verified  {found.num_rows:,} rows in {found.num_shards} shards, {found.num_bytes:,} bytes: {verdict}")
    return EXIT_DAMAGED if found.problems else 0


def report_page(config: ShardDatasetConfig, report: RunReport) -> str:
    """Return the path of the dataset's page, written anew where something was made."""
    page = storage.join(config.root, REPORT_NAME)
    return page if not report.num_shards and shows(page, report.manifest) else write_report(config.root)


def show(config: ShardDatasetConfig, report: RunReport, page: str) -> None:
    """Print what was done and what became of the input rows."""
    if config.retry is not Retry.NONE and not report.num_shards:
        print(f"retry     nothing to try again ({config.retry.value})")
    if report.num_shards:
        Console().print(counts_table(report.counts))
    print(
        f"dataset   {report.num_rows:,} rows in {report.num_shards} new shards, "
        f"{report.num_skipped} shards already there: {config.root}"
    )
    print(f"report    {page}")


def publish(config: ShardDatasetConfig, report: RunReport, page: str) -> None:
    """Bring counts, the manifest's digest and the report into MLflow unless it has them; no data depend on it."""
    digest = {"dataset_digest": report.manifest.digest}
    if not is_published(config.tracking, config.record, digest):
        publish_report(config, config.tracking, config.record, "dataset", metrics_of(report.manifest), digest, page)


def metrics_of(manifest: Manifest) -> dict[str, float]:
    """Return the manifest's totals as metrics: shards, bytes, and input rows by status."""
    counts: Mapping[str, Mapping[str, int]] = manifest.summary["counts"]
    rows: dict[str, float] = {}
    for of_split in counts.values():
        for status, count in of_split.items():
            rows[f"rows_{status}"] = rows.get(f"rows_{status}", 0.0) + count
    sizes = {"shards": float(len(manifest.shards)), "bytes": float(sum(shard.num_bytes for shard in manifest.shards))}
    return rows | sizes
