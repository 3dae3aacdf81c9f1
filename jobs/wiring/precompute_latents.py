"""What surrounds the making of a latent cache: flags that are no part of it, and its verification."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from jobs.session import without_warnings
from pipeline.encode import LatentsConfig
from pipeline.forecast import ForecastConfig, forecast
from pipeline.latent_verification import verify_latents
from pipeline.plan import Plan, describe, missing

EXIT_DAMAGED = 1
"""Exit code of a `--verify` that found something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecomputeLatentsConfig(LatentsConfig):
    """A cache of latents, made from a dataset by a frozen autoencoder and a frozen text encoder."""

    verify: bool = False
    """Read the cache back, compare it with its manifest, and encode a sample of rows again; makes nothing."""
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    """What --dry-run measures, and at which prices it reckons."""
    sample: float = 0.01
    """Share of the rows that --verify encodes again, at least one a shard; 0 compares digests only."""


def outlook(config: PrecomputeLatentsConfig, plan: Plan) -> str:
    """Return what the job would do, and what a short measurement says that it will take."""
    todo = missing(plan)
    if not (todo and config.forecast.seconds):
        return describe(plan)
    print(f"measuring for about {config.forecast.seconds:.0f} s (--forecast.seconds 0 skips it)", file=sys.stderr)
    with without_warnings():
        return f"{describe(plan)}\n{forecast(config, plan, todo, config.forecast).describe()}"


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
