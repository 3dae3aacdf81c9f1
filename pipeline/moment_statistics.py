"""Mean, deviation and range of raw latents over a whole cache, merged from shards whichever worker made them.

A raw latent is  z = mean + exp(logvar / 2) noise,  so over all positions
    E[z] = E[mean]        Var(z) = Var(mean) + E[exp(logvar)]        (VQ: mean is the latent, the last term is 0)
kept as (count, mean, sum of squared deviations, sum of posterior variances) and merged pairwise (Chan et al. 1979,
eq. 2.1), always in the same order: floating-point sums depend on it.

Letters: b batch, c latent channel, m moment channel (2c for KL, c for VQ), h latent row, w latent column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float16, Float64

from ldm.autoencoder.regularizer import LOG_VARIANCE_RANGE, LatentKind

CHUNK_ROWS = 256
"""Rows summed at once; fixed, so that the sums do not depend on the encoder's batch size."""

_ARRAYS = ("mean", "squares", "variances", "lowest", "highest")


@dataclass(frozen=True, kw_only=True, slots=True)
class MomentStatistics:
    """Sums over all rows and positions, one number for each latent channel, in float64.

    Attributes:
        count: values of a channel.
        mean: mean of the posterior's mean.
        squares: sum of squared deviations of the posterior's mean from `mean`.
        variances: sum of the posterior's variances; zeros for VQ, which has no posterior.
        lowest: least value of the posterior's mean.
        highest: greatest value of the posterior's mean.
    """

    count: int
    mean: Float64[np.ndarray, " c"]
    squares: Float64[np.ndarray, " c"]
    variances: Float64[np.ndarray, " c"]
    lowest: Float64[np.ndarray, " c"]
    highest: Float64[np.ndarray, " c"]

    @property
    def std(self) -> Float64[np.ndarray, " c"]:
        """Standard deviation of a raw latent drawn from its posterior."""
        deviation: Float64[np.ndarray, " c"] = np.sqrt((self.squares + self.variances) / self.count)
        return deviation

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back exactly."""
        return {"count": self.count, **{name: getattr(self, name).tolist() for name in _ARRAYS}}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MomentStatistics:
        """Return the statistics that `to_dict` described."""
        arrays = {name: np.array(raw[name], np.float64) for name in _ARRAYS}
        return cls(count=int(raw["count"]), **arrays)


class StatisticsBuilder:
    """Sums up moments as they come, the same whatever the batches: always chunks of `CHUNK_ROWS` rows."""

    def __init__(self, kind: LatentKind = LatentKind.KL_MOMENTS) -> None:
        """Begin with no row."""
        self._kind = kind
        self._waiting: list[Float16[np.ndarray, "b m h w"]] = []
        self._num_waiting = 0
        self._chunks: list[MomentStatistics] = []

    def add(self, moments: Float16[np.ndarray, "b m h w"]) -> None:
        """Take moments as they are stored."""
        while len(moments):
            space = CHUNK_ROWS - self._num_waiting
            self._waiting.append(moments[:space])
            self._num_waiting += len(moments[:space])
            moments = moments[space:]
            if self._num_waiting == CHUNK_ROWS:
                self._sum_up()

    def total(self) -> MomentStatistics:
        """Return the statistics of all rows, of which there must be some."""
        if self._num_waiting:
            self._sum_up()
        return merged(self._chunks)

    def _sum_up(self) -> None:
        self._chunks.append(_chunk(np.concatenate(self._waiting), self._kind))
        self._waiting, self._num_waiting = [], 0


def statistics_of(
    moments: Float16[np.ndarray, "b m h w"], kind: LatentKind = LatentKind.KL_MOMENTS
) -> MomentStatistics:
    """Return the statistics of moments as they are stored."""
    builder = StatisticsBuilder(kind)
    builder.add(moments)
    return builder.total()


def merged(parts: Sequence[MomentStatistics]) -> MomentStatistics:
    """Return the statistics of all parts together, merged from first to last."""
    return reduce(_merge, parts)


def _chunk(moments: Float16[np.ndarray, "b m h w"], kind: LatentKind) -> MomentStatistics:
    means, variances = _means_and_variances(moments.astype(np.float64), kind)
    mean = means.mean(axis=(0, 2, 3))
    return MomentStatistics(
        count=means.size // means.shape[1],
        mean=mean,
        squares=np.square(means - mean[:, None, None]).sum(axis=(0, 2, 3)),
        variances=variances.sum(axis=(0, 2, 3)),
        lowest=means.min(axis=(0, 2, 3)),
        highest=means.max(axis=(0, 2, 3)),
    )


def _means_and_variances(
    moments: Float64[np.ndarray, "b m h w"], kind: LatentKind
) -> tuple[Float64[np.ndarray, "b c h w"], Float64[np.ndarray, "b c h w"]]:
    match kind:
        case LatentKind.KL_MOMENTS:
            means, log_variances = np.split(moments, 2, axis=1)
            return means, np.exp(np.clip(log_variances, *LOG_VARIANCE_RANGE))
        case LatentKind.VQ_LATENTS:
            return moments, np.zeros_like(moments)


def _merge(left: MomentStatistics, right: MomentStatistics) -> MomentStatistics:
    count = left.count + right.count
    delta = right.mean - left.mean
    return MomentStatistics(
        count=count,
        mean=left.mean + delta * (right.count / count),
        squares=left.squares + right.squares + np.square(delta) * (left.count * right.count / count),
        variances=left.variances + right.variances,
        lowest=np.minimum(left.lowest, right.lowest),
        highest=np.maximum(left.highest, right.highest),
    )
