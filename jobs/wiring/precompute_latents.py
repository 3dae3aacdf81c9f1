"""What surrounds the making of a latent cache: flags that are no part of it, and its verification."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from rich.console import Console

from jobs.session import without_warnings
from jobs.wiring.data_runs import is_published, publish_report
from ldm.storage import join
from ldm.training.tracking_config import TrackingConfig
from pipeline.effort import work_table
from pipeline.encoder import has_gpu
from pipeline.forecast import ForecastConfig, forecast
from pipeline.latent_config import Device, LatentsConfig
from pipeline.latent_report import write_latent_report
from pipeline.latent_verification import verify_latents
from pipeline.plan import Plan, describe, missing
from pipeline.report import REPORT_NAME, shows
from pipeline.run import RunReport
from pipeline.store.manifest import Manifest

EXIT_DAMAGED = 1
"""Exit code of a `--verify` that found something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecomputeLatentsConfig(LatentsConfig):
    """A cache of latents, made from a dataset by a frozen autoencoder and a frozen text encoder."""

    record: str = ""
    """Local folder that remembers the MLflow run; needed where tracking.uri is given."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(uri=""))
    """MLflow, which gets the channels' statistics and the report."""
    verify: bool = False
    """Read the cache back, compare it with its manifest, and encode a sample of rows again; makes nothing."""
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    """What --dry-run measures, and at which prices it reckons."""
    sample: float = 0.01
    """Share of the rows that --verify encodes again, at least one a shard; 0 compares digests only."""

    def __post_init__(self) -> None:
        LatentsConfig.__post_init__(self)  # `super()` does not know a class with slots
        if self.tracking.uri and not self.record:
            raise ValueError("tracking.uri needs a folder under --record, where the MLflow run is remembered")


def outlook(config: PrecomputeLatentsConfig, plan: Plan) -> str:
    """Return what the job would do, and what a short measurement says that it will take."""
    todo = missing(plan)
    if not (todo and config.forecast.seconds):
        return describe(plan)
    if config.device is Device.CUDA and not has_gpu():
        return f"{describe(plan)}\n  measured nothing: this machine has no GPU, the workers' have"
    print(f"measuring for about {config.forecast.seconds:.0f} s (--forecast.seconds 0 skips it)", file=sys.stderr)
    with without_warnings():
        return f"{describe(plan)}\n{forecast(config, plan, todo, config.forecast).describe()}"


def show(report: RunReport) -> None:
    """Print what the workers did, where they did anything."""
    if report.work.by_name():
        Console().print(work_table(report.work, report.seconds))


def publish(config: PrecomputeLatentsConfig, report: RunReport) -> str:
    """Return the path of the cache's report, written anew where shards were made, and see to it that MLflow has it."""
    page = join(config.root, REPORT_NAME)
    if report.num_shards or not shows(page, report.manifest):
        page = write_latent_report(config)
    digest = {"latents_digest": report.manifest.digest}
    if not is_published(config.tracking, config.record, digest):
        publish_report(config, config.tracking, config.record, "latents", metrics_of(report.manifest), digest, page)
    return page


def metrics_of(manifest: Manifest) -> dict[str, float]:
    """Return the manifest's totals as metrics: rows, shards, bytes, PSNR of the round trips, statistics by channel."""
    summary = manifest.summary
    shards = manifest.shards
    channels = {
        f"channel_{channel}_{name}": float(value)
        for name in ("mean", "std", "min", "max")
        for channel, value in enumerate(summary[name])
    }
    return {
        "rows": float(sum(shard.num_rows for shard in shards)),
        "shards": float(len(shards)),
        "bytes": float(sum(shard.num_bytes for shard in shards)),
        "gate_psnr_db": float(summary["gate_psnr_mean"]),
        **channels,
    }


def verified(config: PrecomputeLatentsConfig) -> int:
    """Verify a cache, print what is wrong with it, and return the exit code."""
    found = verify_latents(config, config.sample)
    for problem in found.problems:
        print(problem)
    verdict = f"{len(found.problems)} problems" if found.problems else "all as it should be"
    print(
        f"verified  {found.num_rows:,} rows by digest, {found.num_encoded:,} encoded again and at most "
        f"{found.furthest:.2g} standard deviations apart: {verdict}"
    )
    return EXIT_DAMAGED if found.problems else 0
