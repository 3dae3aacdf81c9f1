"""A file of prompts drawn into tars: the Ray session around it, what a person sees, and its page in MLflow."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console

from jobs.session import ray_session
from jobs.wiring.data_runs import is_published, publish_report
from jobs.wiring.sample import SampleConfig
from ldm.storage import exists, join
from pipeline.contact_sheet import SHEET_NAME, write_contact_sheet
from pipeline.generate import NUM_CUT
from pipeline.generate_config import GenerateConfig
from pipeline.generate_plan import SPLIT, plan_generate, verify_generated
from pipeline.plan import describe, missing
from pipeline.progress import KEPT, counts_table
from pipeline.store.manifest import Manifest

EXIT_DAMAGED = 1
"""Exit code of a `--bulk.verify` that found something."""


def draw_file(config: SampleConfig, *, dry_run: bool) -> int:
    """Draw the rows of a file that are missing, say what came of it, and return the exit code.

    Raises:
        ValueError: for what a person can fix, before any work.
    """
    # Optional: a machine without Ray draws grids.
    from pipeline.run import run

    asked = config.generate_config()
    if asked.bulk.verify:
        return _verified(asked)
    plan = plan_generate(asked)
    if dry_run:
        print(describe(plan))
        return 0
    with ray_session() if missing(plan) else nullcontext():
        report = run(plan)
    if report.counts.get(KEPT, 0) < sum(report.counts.values()):
        Console().print(counts_table(report.counts))
        print(f"left out  row by row with its reason: {join(plan.root, SPLIT.value)}/*.ledger.parquet")
    if num_cut := report.manifest.summary.get(NUM_CUT):
        print(f"cut       {num_cut:,} rows have more words than the model reads: what is beyond was not looked at")
    print(
        f"pictures  {report.num_rows:,} in {report.num_shards} new shards, {report.num_skipped} shards already there: "
        f"{plan.root}"
    )
    if report.num_rows:
        print(f"speed     {report.num_rows / report.seconds:.3g} pictures a second, with all that starting took")
    print(f"sheet     {_published(config, asked, report.manifest, is_new=report.num_shards > 0)}")
    return 0


def _published(config: SampleConfig, asked: GenerateConfig, manifest: Manifest, *, is_new: bool) -> str:
    """Return the path of the first pictures' sheet, and see to it that MLflow has it and the totals."""
    page = join(asked.bulk.root, SHEET_NAME)
    if is_new or not exists(page):
        page = write_contact_sheet(asked.bulk.root, manifest)
    digest = {"generated_digest": manifest.digest}
    record = asked.bulk.record
    if record and not is_published(config.tracking, record, digest):
        said = replace(config, safety=config.safety.without_key())
        publish_report(said, config.tracking, record, "generated", metrics_of(manifest), digest, page)
    return page


def metrics_of(manifest: Manifest) -> dict[str, float]:
    """Return the manifest's totals as metrics: prompts, pictures, shards, bytes, refused pictures by reason."""
    counts = manifest.summary["counts"][SPLIT.value]
    refused = {f"refused_{reason}": float(count) for reason, count in counts.items() if reason != KEPT}
    return {
        "prompts": float(manifest.summary["num_prompts"]),
        "pictures": float(counts.get(KEPT, 0)),
        "shards": float(len(manifest.shards)),
        "bytes": float(sum(shard.num_bytes for shard in manifest.shards)),
        **refused,
    }


def _verified(config: GenerateConfig) -> int:
    found = verify_generated(config)
    for problem in found.problems:
        print(problem)
    verdict = f"{len(found.problems)} problems" if found.problems else "all as it should be"
    print(f"verified  {found.num_rows:,} pictures in {found.num_shards} shards, {found.num_bytes:,} bytes: {verdict}")
    return EXIT_DAMAGED if found.problems else 0
