"""What sampling can begin with and must keep: image-to-image, inpainting with any model, blends of two noises.

    image-to-image   z_t = alpha_t z_0 + sigma_t eps at a time amid the grid, and on from there (Meng et al. 2022)
    inpainting       D'(z, t) = mask D(z, t) + (1 - mask) z_0: what is known is known at every step

Letters: b batch, c latent channel, h row, w column, k number of steps + 1, j number of those that are made + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ldm.diffusion.process import corrupt
from ldm.diffusion.schedule import Schedule
from ldm.samplers.grids import time_grid
from ldm.samplers.sample import Denoiser, DrawNoise, OnStep, SamplerConfig, follow, initial_noise, step_noise
from ldm.types import Latent

End = TypeVar("End")
LatentMask = Bool[Tensor, "b 1 h w"]
"""True where a latent is drawn anew."""


@dataclass(frozen=True, slots=True)
class Start:
    """What sampling begins with.

    Attributes:
        clean: scaled latents of the pictures, shape (b, c, h, w).
        mask: where they are drawn anew; None for everywhere.
    """

    clean: Latent
    mask: LatentMask | None = None


def sample_from(
    denoise: Denoiser,
    start: Start,
    noise: Latent,
    schedule: Schedule,
    config: SamplerConfig,
    strength: float,
    draw_noise: DrawNoise,
    on_step: OnStep | None = None,
) -> Latent:
    """Return clean latents that go on from given ones.

    Args:
        denoise: the denoiser, guidance included.
        start: what is given.
        noise: standard normal, shape (b, c, h, w).
        schedule: the schedule the network was trained with.
        config: stepper, number of steps and grid of a whole path.
        strength: share of the path's steps that are made, the last ones, in (0, 1]; all of them begin with noise alone.
        draw_noise: noise of each step.
        on_step: called after each step.
    """
    times = last_part(time_grid(config.grid, schedule, config.num_steps), strength)
    if strength < 1:
        noise = corrupt(start.clean, noise, schedule.scales_at(float(times[0])))
    if start.mask is not None:
        denoise = keeping_denoiser(denoise, start.clean, start.mask)
    return follow(denoise, noise, schedule, times, config, draw_noise, on_step)


def last_part(times: Float[Tensor, " k"], strength: float) -> Float[Tensor, " j"]:
    """Return the end of a time grid that makes this share of its steps, and one at least.

    Raises:
        ValueError: if the share is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    whole = len(times) - 1
    return times[whole - num_steps_of(whole, strength) :]


def num_steps_of(whole: int, strength: float) -> int:
    """Return how many of a path's steps are made."""
    return max(1, round(strength * whole))


def keeping_denoiser(denoise: Denoiser, known: Latent, mask: LatentMask) -> Denoiser:
    """Return the denoiser that knows the clean latent where the mask is False, and asks the other where it is True."""

    def keep(noisy: Latent, timestep: Float[Tensor, " b"]) -> Latent:
        return torch.where(mask, denoise(noisy, timestep), known)

    return keep


def latent_mask(pixels: Bool[Tensor, "b y x"], factor: int) -> LatentMask:
    """Return the mask of the latents of which at least one pixel is drawn anew."""
    return torch.nn.functional.max_pool2d(pixels[:, None].float(), factor) > 0


@dataclass(frozen=True, slots=True)
class Between(Generic[End]):
    """What lies between two of anything: prompts, or seeds.

    Attributes:
        one: where the way begins.
        other: where it ends.
        share: how far along it is, from 0 to 1.
    """

    one: End
    other: End
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share of the way lies in [0, 1], got {self.share}")


Seed: TypeAlias = int | Between[int]
Prompt: TypeAlias = str | Between[str]


def ends(rows: Sequence[End | Between[End]]) -> tuple[list[End], list[End], Float[Tensor, " b"]]:
    """Return where each row begins, where it ends, and its share; what lies between nothing ends where it begins."""
    ways = [row if isinstance(row, Between) else Between(row, row, 0.0) for row in rows]
    shares = torch.tensor([way.share for way in ways], dtype=torch.float64)
    return [way.one for way in ways], [way.other for way in ways], shares


def seeded_noise(seeds: Sequence[Seed], shape: tuple[int, int, int]) -> tuple[Latent, DrawNoise]:
    """Return what seeds draw: the noise that sampling starts from and that of each step, shapes (b, *shape).

    Each is a row's place in the stream of noises, whatever batch it is in; between two seeds lies the blend of theirs.
    """
    one, other, shares = ends(seeds)

    def step(index: int) -> Latent:
        return blended(step_noise(0, one, shape)(index), lambda: step_noise(0, other, shape)(index))

    def blended(noise: Latent, towards: Callable[[], Latent]) -> Latent:
        return slerp(noise, towards(), shares) if one != other else noise

    return blended(initial_noise(0, one, shape), lambda: initial_noise(0, other, shape)), step


def slerp(one: Latent, other: Latent, share: float | Float[Tensor, " b"]) -> Latent:
    """Return the noise at a share of the way from one to another, along the sphere they lie on, row by row.

    Between independent standard normal latents every such blend is one again in its length; a straight line's middle is
    shorter by a factor of sqrt(2), where no training has been (White 2016, "Sampling generative networks").
    """
    flat = [latent.flatten(1).double() for latent in (one, other)]
    lengths = [latent.norm(dim=1) for latent in flat]
    cosine = (flat[0] * flat[1]).sum(dim=1) / (lengths[0] * lengths[1])
    angle = torch.arccos(cosine.clamp(-1, 1))
    shares = torch.as_tensor(share, dtype=torch.float64).expand(len(one))
    is_straight = angle.sin().abs() < 1e-6
    weights = [
        torch.where(is_straight, part, torch.sin(part * angle) / angle.sin()).to(one.dtype).reshape(-1, 1, 1, 1)
        for part in (1 - shares, shares)
    ]
    return weights[0] * one + weights[1] * other
