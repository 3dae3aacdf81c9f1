"""Turns image-text data into a sharded, filtered, traceable dataset of WebDataset tars.

python -m jobs.shard_dataset [RECIPE] [--home DIR] [--dry-run] [--any.field value ...]
"""

from __future__ import annotations

from contextlib import nullcontext

from jobs.command_line import from_command_line, report_errors
from jobs.recipes import SHARD_DATASET
from jobs.session import prepare, ray_session
from pipeline.ingest.stage import plan_dataset
from pipeline.run import describe, missing, run


@report_errors()
def main() -> None:
    """Make the shards that are missing."""
    prepare()
    asked = from_command_line("shard_dataset", SHARD_DATASET)
    plan = plan_dataset(asked.config)
    if asked.dry_run:
        print(describe(plan))
        return
    with ray_session() if missing(plan) else nullcontext():
        report = run(plan)
    print(
        f"dataset   {report.num_rows:,} rows in {report.num_shards} new shards, "
        f"{report.num_skipped} shards already there: {plan.root}"
    )


if __name__ == "__main__":
    main()
