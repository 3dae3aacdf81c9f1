"""Data for which everything is known exactly: independent Gaussian latents  z_0 ~ N(mean, std^2).

    z_t ~ N(alpha_t mean, v_t)        v_t = alpha_t^2 std^2 + sigma_t^2
    E[z_0 | z_t] = mean + alpha_t std^2 / v_t (z_t - alpha_t mean)
    probability flow from t to s:  z_s = alpha_s mean + sqrt(v_s / v_t) (z_t - alpha_t mean)

The posterior mean is Gaussian conditioning; the flow keeps each quantile (it solves eq. 13 of Song et al. 2021,
"Score-based generative modeling").
Samplers are tested against it, and a job can be rehearsed on it without a network.

Letters: b batch, c latent channel, h row, w column.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.schedule import Scales, Schedule
from ldm.samplers.sample import Denoiser
from ldm.types import Latent


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianData:
    """The distribution of clean latents.

    Attributes:
        mean: mean of every element.
        std: standard deviation of every element, positive.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def variance(self, at: Scales) -> Float[Tensor, "..."]:
        """Return the variance of a noisy latent."""
        return at.alpha.square() * self.std**2 + at.sigma.square()

    def clean_given(self, noisy: Latent, at: Scales) -> Latent:
        """Return the exact posterior mean of the clean latent."""
        return self.mean + at.alpha * self.std**2 / self.variance(at) * (noisy - at.alpha * self.mean)

    def flow(self, noisy: Latent, now: Scales, then: Scales) -> Latent:
        """Return where the probability flow carries a noisy latent."""
        stretch = (self.variance(then) / self.variance(now)).sqrt()
        return then.alpha * self.mean + stretch * (noisy - now.alpha * self.mean)

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """Return the exact denoiser under a schedule."""

        def denoise(noisy: Latent, timestep: Float[Tensor, " b"]) -> Latent:
            return self.clean_given(noisy, schedule.scales(timestep))

        return denoise
