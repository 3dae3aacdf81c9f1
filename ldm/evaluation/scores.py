"""Scores of one image against another: PSNR and SSIM.

    psnr = 10 log10(L^2 / mse)
    ssim = mean over windows of (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2))

with L = 2 for pixels in [-1, 1]
(Wang et al. 2004, eq. 13, windows of section III.C: 11 pixels, Gaussian with deviation 1.5).

Letters: b batch, y and x pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.types import Image

PIXEL_RANGE = 2.0
WINDOW = 11
WINDOW_STD = 1.5
LUMINANCE_CONSTANT = (0.01 * PIXEL_RANGE) ** 2
CONTRAST_CONSTANT = (0.03 * PIXEL_RANGE) ** 2


def psnr(image: Image, reference: Image) -> Float[Tensor, " b"]:
    """Return the peak signal-to-noise ratio of each image in decibels; infinite where both are equal."""
    error = (image.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PIXEL_RANGE**2 / error)


def ssim(image: Image, reference: Image) -> Float[Tensor, " b"]:
    """Return the structural similarity of each image, 1 where both are equal; windows lie wholly inside.

    Raises:
        ValueError: for images smaller than a window.
    """
    if min(image.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} px, got {tuple(image.shape[2:])}")
    left, right = image.double(), reference.double()
    mean_left, mean_right = _windowed(left), _windowed(right)
    variance_left = _windowed(left.square()) - mean_left.square()
    variance_right = _windowed(right.square()) - mean_right.square()
    covariance = _windowed(left * right) - mean_left * mean_right
    luminance = (2 * mean_left * mean_right + LUMINANCE_CONSTANT) / (
        mean_left.square() + mean_right.square() + LUMINANCE_CONSTANT
    )
    structure = (2 * covariance + CONTRAST_CONSTANT) / (variance_left + variance_right + CONTRAST_CONSTANT)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _windowed(values: Tensor) -> Tensor:
    """Return the Gaussian mean around each pixel, one axis after the other."""
    offsets = torch.arange(WINDOW, dtype=values.dtype, device=values.device) - WINDOW // 2
    taps = torch.exp(-0.5 * (offsets / WINDOW_STD).square())
    taps = (taps / taps.sum()).expand(values.shape[1], 1, WINDOW)
    along_columns = F.conv2d(values, taps[:, :, None, :], groups=values.shape[1])
    return F.conv2d(along_columns, taps[:, :, :, None], groups=values.shape[1])
