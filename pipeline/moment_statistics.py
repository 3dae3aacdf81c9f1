"""Mean and deviation of raw latents over a whole cache, merged from shards whichever worker made them.

A raw latent is  z = mean + exp(logvar / 2) noise,  so over all positions
    E[z] = E[mean]        Var(z) = Var(mean) + E[exp(logvar)]
kept as (count, mean, sum of squared deviations, sum of posterior variances) and merged pairwise (Chan et al. 1979,
eq. 2.1), always in the same order: floating-point sums depend on it.

Letters: b batch, c latent channel, m moment channel (2c), h latent row, w latent column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float16, Float64

from ldm.autoencoder.regularizer import LOG_VARIANCE_RANGE

CHUNK_ROWS = 256
"""Rows summed at once; fixed, so that the sums do not depend on the encoder's batch size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MomentStatistics:
    """Sums over all rows and positions, one number for each latent channel, in float64.

    Attributes:
        count: values of a channel.
        mean: mean of the posterior's mean.
        squares: sum of squared deviations of the posterior's mean from `mean`.
        variances: sum of the posterior's variances.
    """

    count: int
    mean: Float64[np.ndarray, " c"]
    squares: Float64[np.ndarray, " c"]
    variances: Float64[np.ndarray, " c"]

    @property
    def std(self) -> Float64[np.ndarray, " c"]:
        """Standard deviation of a raw latent drawn from its posterior."""
        deviation: Float64[np.ndarray, " c"] = np.sqrt((self.squares + self.variances) / self.count)
        return deviation

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back exactly."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "squares": self.squares.tolist(),
            "variances": self.variances.tolist(),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MomentStatistics:
        """Return the statistics that `to_dict` described."""
        arrays = {name: np.array(raw[name], np.float64) for name in ("mean", "squares", "variances")}
        return cls(count=int(raw["count"]), **arrays)


def statistics_of(moments: Float16[np.ndarray, "b m h w"]) -> MomentStatistics:
    """Return the statistics of KL moments as they are stored."""
    return merged([_chunk(moments[start : start + CHUNK_ROWS]) for start in range(0, len(moments), CHUNK_ROWS)])


def merged(parts: Sequence[MomentStatistics]) -> MomentStatistics:
    """Return the statistics of all parts together, merged from first to last."""
    return reduce(_merge, parts)


def _chunk(moments: Float16[np.ndarray, "b m h w"]) -> MomentStatistics:
    means, log_variances = np.split(moments.astype(np.float64), 2, axis=1)
    mean = means.mean(axis=(0, 2, 3))
    return MomentStatistics(
        count=means.size // means.shape[1],
        mean=mean,
        squares=np.square(means - mean[:, None, None]).sum(axis=(0, 2, 3)),
        variances=np.exp(np.clip(log_variances, *LOG_VARIANCE_RANGE)).sum(axis=(0, 2, 3)),
    )


def _merge(left: MomentStatistics, right: MomentStatistics) -> MomentStatistics:
    count = left.count + right.count
    delta = right.mean - left.mean
    return MomentStatistics(
        count=count,
        mean=left.mean + delta * (right.count / count),
        squares=left.squares + right.squares + np.square(delta) * (left.count * right.count / count),
        variances=left.variances + right.variances,
    )
