"""Small pictures as the world makes them: blurred, shrunk, noisy and compressed, in any order (Zhang et al. 2021).

    blur, blur, shrink, noise, JPEG in an order that is drawn → the wanted size → JPEG

BSRGAN's degradations in the light form with which the paper's super-resolution model was trained (Rombach et al. 2022,
appendix D.6): narrower kernels, less noise, higher quality. Every shrinking here filters; theirs also takes every n-th
pixel of a blurred picture now and then. Numbers in comments are for a factor of 4.

Letters: y pixel row, x pixel column, k side of a kernel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "y x 3"]

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)
NOISE_LEVELS = (1.0, 2.0)
"""Standard deviations in units of a pixel's 255 levels."""
NOISE_SHARES = (0.4, 0.4, 0.2)
"""How often noise is independent in each channel, alike in all, or correlated between them."""
QUALITIES = (80, 95)
JPEG_SHARE = 0.9
ISOTROPIC_SHARE = 0.5
MIN_SIGMA = 0.1
MAX_OVERSHRINK = 2.0


def degraded(dice: np.random.Generator, pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Return a small copy of a picture, as if it had been through several hands.

    Args:
        dice: decides everything.
        pixels: the picture.
        size: rows and columns of the copy.
    """
    factor = max(1.0, pixels.shape[0] / size[0])
    steps: list[Callable[[Pixels], Pixels]] = [
        lambda image: _blurred(dice, image, factor),
        lambda image: _blurred(dice, image, factor),
        lambda image: _shrunk(dice, image, factor, size),
        lambda image: _noisy(dice, image),
        lambda image: _compressed(dice, image) if dice.random() < JPEG_SHARE else image,
    ]
    for step in dice.permutation(len(steps)):
        pixels = steps[step](pixels)
    return _compressed(dice, _resized(dice, pixels, size))


def _blurred(dice: np.random.Generator, pixels: Pixels, factor: float) -> Pixels:
    """Blur by a Gaussian that is round (up to 0.8 pixels wide) or long and turned (up to 1.4)."""
    if dice.random() < ISOTROPIC_SHARE:
        width = MIN_SIGMA + dice.random() * (2 + 0.2 * factor) / 4
        widths, angle = (width, width), 0.0
    else:
        longest = (4 + factor) / 4  # of the variances
        variances = MIN_SIGMA + dice.random(2) * longest
        widths = (math.sqrt(variances[0]), math.sqrt(variances[1]))
        angle = dice.uniform(0, math.pi)
    kernel = torch.from_numpy(_gaussian(widths, angle)).float()
    image = torch.tensor(pixels).permute(2, 0, 1)[:, None].float()  # 3 1 y x
    margin = min(kernel.shape[0] // 2, min(pixels.shape[:2]) - 1)
    inner = kernel.shape[0] // 2 - margin
    kernel = kernel[inner : kernel.shape[0] - inner, inner : kernel.shape[0] - inner]
    padded = F.pad(image, (margin,) * 4, mode="reflect")
    return _rounded(F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0].permute(1, 2, 0).numpy())


def _gaussian(widths: tuple[float, float], angle: float) -> Float64[np.ndarray, "k k"]:
    """Return a Gaussian of two widths along turned axes, as far as three of the wider one."""
    reach = max(1, math.ceil(3 * max(widths)))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    weights: Float64[np.ndarray, "k k"] = np.exp(-0.5 * ((along / widths[0]) ** 2 + (across / widths[1]) ** 2))
    return weights / weights.sum()


def _shrunk(dice: np.random.Generator, pixels: Pixels, factor: float, size: tuple[int, int]) -> Pixels:
    """Shrink by a drawn factor, at most twice the wanted one."""
    by = dice.uniform(1.0, MAX_OVERSHRINK * factor)
    sides = tuple(max(1, round(side / by)) for side in pixels.shape[:2])
    return _resized(dice, pixels, (sides[0], sides[1]))


def _noisy(dice: np.random.Generator, pixels: Pixels) -> Pixels:
    deviation = dice.uniform(*NOISE_LEVELS)
    height, width = pixels.shape[:2]
    match dice.choice(len(NOISE_SHARES), p=NOISE_SHARES):
        case 0:
            noise = dice.normal(0, deviation, (height, width, 3))
        case 1:
            noise = dice.normal(0, deviation, (height, width, 1))
        case _:
            mix = np.linalg.qr(dice.normal(size=(3, 3)))[0] * dice.random(3)
            noise = dice.normal(0, deviation, (height, width, 3)) @ mix.T
    return _rounded(pixels + noise)


def _compressed(dice: np.random.Generator, pixels: Pixels) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(dice.integers(QUALITIES[0], QUALITIES[1] + 1)))
    with Image.open(file) as image:
        return np.asarray(image)


def _resized(dice: np.random.Generator, pixels: Pixels, size: tuple[int, int]) -> Pixels:
    resampling = FILTERS[dice.integers(len(FILTERS))]
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), resampling))


def _rounded(values: np.ndarray) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)
