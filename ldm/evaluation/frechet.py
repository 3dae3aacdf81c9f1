"""Fréchet distance between two sets of features, each taken as a Gaussian.

    d = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})        (Heusel et al. 2017, eq. 6)

With S_i = A_i A_i^T the last trace is the sum of singular values of A_1^T A_2: no square root of a matrix that is not
symmetric, no imaginary parts to drop, and singular covariances (fewer images than features) do no harm.

Letters: n images, f features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStatistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: shape (f,), float64.
        covariance: shape (f, f), float64, unbiased.
        num_images: how many images they were taken of; a distance is biased upwards by few, so it is always reported.
    """

    mean: Float[Tensor, " f"]
    covariance: Float[Tensor, "f f"]
    num_images: int


def statistics_of(features: Float[Tensor, "n f"]) -> FeatureStatistics:
    """Return mean and unbiased covariance in float64.

    Raises:
        ValueError: for fewer than two images, or features that are not finite.
    """
    num_images = features.shape[0]
    if num_images < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {num_images}")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got infinities or NaN")
    precise = features.double()
    mean = precise.mean(dim=0)
    centred = precise - mean
    return FeatureStatistics(mean=mean, covariance=centred.T @ centred / (num_images - 1), num_images=num_images)


def frechet_distance(left: FeatureStatistics, right: FeatureStatistics) -> float:
    """Return the Fréchet distance (squared Wasserstein-2) of two Gaussians; never negative.

    Raises:
        ValueError: if they have different numbers of features.
    """
    if left.mean.shape != right.mean.shape:
        raise ValueError(f"both sets need the same features, got {left.mean.shape[0]} and {right.mean.shape[0]}")
    shift = (left.mean - right.mean).square().sum()
    overlap = torch.linalg.svdvals(_factor(left.covariance).T @ _factor(right.covariance)).sum()
    spread = left.covariance.trace() + right.covariance.trace() - 2 * overlap
    return max(float(shift + spread), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """Return A with A A^T = covariance, without the directions that only rounding holds."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = values[-1].clamp(min=0) * values.shape[0] * torch.finfo(values.dtype).eps
    kept = values > floor
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor
