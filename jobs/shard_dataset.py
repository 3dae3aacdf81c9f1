"""Turns image-text data into a sharded, filtered, traceable dataset of WebDataset tars.

python -m jobs.shard_dataset [RECIPE] [--home DIR] [--dry-run] [--verify] [--retry transient] [--any.field value ...]
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from jobs.command_line import from_command_line, report_errors
from jobs.recipes import SHARD_DATASET
from jobs.session import prepare, ray_session
from jobs.wiring.shard_dataset import publish, report_page, show, verified
from pipeline.ingest.dataset import make_dataset, plan_dataset
from pipeline.plan import describe, missing


@report_errors()
def main() -> None:
    """Make the shards that are missing."""
    prepare()
    asked = from_command_line("shard_dataset", SHARD_DATASET)
    config = asked.config
    if config.verify:
        sys.exit(verified(config.root))
    plan = plan_dataset(config, config.request)
    if asked.dry_run:
        print(describe(plan))
        return
    with ray_session() if missing(plan) else nullcontext():
        report = make_dataset(config, config.request)
    page = report_page(config, report)
    show(config, report, page)
    publish(config, report, page)


if __name__ == "__main__":
    main()
