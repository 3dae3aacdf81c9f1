"""Encodes a dataset once into cached latents and text embeddings, each shard proven by decoding some rows again.

python -m jobs.precompute_latents [RECIPE] [--home DIR] [--dry-run] [--verify] [--any.field value ...]
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from jobs.command_line import from_command_line, report_errors
from jobs.recipes import PRECOMPUTE_LATENTS
from jobs.session import prepare, ray_session
from jobs.wiring.first_stage import settled
from jobs.wiring.precompute_latents import outlook, publish, show, verified
from pipeline.latent_plan import plan_latents
from pipeline.plan import missing
from pipeline.run import run


@report_errors()
def main() -> None:
    """Make the shards that are missing."""
    prepare()
    asked = from_command_line("precompute_latents", PRECOMPUTE_LATENTS)
    config = settled(asked.config)
    if config.verify:
        sys.exit(verified(config))
    plan = plan_latents(config)
    if asked.dry_run:
        print(outlook(config, plan))
        return
    with ray_session() if missing(plan) else nullcontext():
        report = run(plan)
    show(report)
    print(
        f"latents   {report.num_rows:,} rows in {report.num_shards} new shards, "
        f"{report.num_skipped} shards already there: {plan.root}"
    )
    print(f"report    {publish(config, report)}")


if __name__ == "__main__":
    main()
