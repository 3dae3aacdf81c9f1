"""The two spaces a latent lives in: raw, as an autoencoder gives it, and scaled, as a diffusion network sees it.

    scaled = (raw - mean) / std        for each latent channel, with statistics of the whole latent cache

Caches hold raw moments, so the statistics may change without encoding again (Rombach et al. 2022, appendix G, divide by
one standard deviation; a mean and a deviation for each channel is the same idea with fewer assumptions).

Letters: b batch, c latent channel, m moment channel (2c for KL, c for VQ), h latent row, w latent column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ldm.autoencoder import regularizer
from ldm.autoencoder.regularizer import LatentKind
from ldm.types import Latent, Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpace:
    """An affine map for each channel between raw and scaled latents.

    Attributes:
        mean: mean of the raw latents, a number for each channel.
        std: standard deviation of the raw latents, a positive number for each channel.
        kind: what a cache's moments are: a posterior's, or for VQ the raw latents themselves.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: LatentKind = LatentKind.KL_MOMENTS

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"a latent space needs one mean and one std a channel, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"latent means must be finite, got {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"latent standard deviations must be finite and positive, got {self.std}")

    @property
    def num_channels(self) -> int:
        """The number of latent channels."""
        return len(self.mean)

    def scaled(self, moments: Moments, noise: Latent | None) -> Latent:
        """Return a sample of the posterior, scaled; `noise` is standard normal, shape (b, c, h, w), and None for VQ."""
        return self._scale(regularizer.sample(moments, noise, self.kind))

    def scaled_mode(self, moments: Moments) -> Latent:
        """Return the posterior's mode, scaled; for VQ the latent."""
        return self._scale(regularizer.mode(moments, self.kind))

    def unscaled(self, latent: Latent) -> Latent:
        """Return the raw latent that an autoencoder decodes."""
        mean, std = self._statistics(latent)
        return latent * std + mean

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a manifest; the kind is said only where it is not KL's."""
        kind = {} if self.kind is LatentKind.KL_MOMENTS else {"kind": self.kind.value}
        return {"mean": list(self.mean), "std": list(self.std), **kind}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Return the space that `to_dict` wrote.

        Raises:
            ValueError: if `mean` or `std` is missing or is not a list of numbers, the kind is unknown, or another
                entry is there.
        """
        if set(plain) - {"kind"} != {"mean", "std"}:
            raise ValueError(f"a latent space holds exactly 'mean' and 'std', and its kind, got {sorted(plain)}")
        kind = LatentKind(plain.get("kind", LatentKind.KL_MOMENTS))
        return cls(mean=_numbers("mean", plain["mean"]), std=_numbers("std", plain["std"]), kind=kind)

    def _scale(self, raw: Latent) -> Latent:
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def _statistics(self, like: Latent) -> tuple[Tensor, Tensor]:
        if like.shape[1] != self.num_channels:
            raise ValueError(f"this latent space has {self.num_channels} channels, the latent has {like.shape[1]}")
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device)
        std = torch.tensor(self.std, dtype=like.dtype, device=like.device)
        return mean[:, None, None], std[:, None, None]


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    is_list = isinstance(values, list | tuple)
    if not is_list or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ValueError(f"a latent space's {name!r} is a list of numbers, got {values!r}")
    return tuple(float(value) for value in values)
