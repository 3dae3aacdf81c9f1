"""Bricks of the convolutional networks: residual block, attention over pixels, halving and doubling of the sides.

Letters: b batch, c channel, h row, w column. Attributes are named so that parameter names are those of diffusers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NORM_EPSILON = 1e-6
WIDE = 256
"""Channels from which a kernel outgrows the caches: with fewer pixels than channels, making it is most of the work."""

Features = Float[Tensor, "b c h w"]


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPSILON)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPSILON)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, features: Features) -> Float[Tensor, "b d h w"]:
        """Return the features plus what the two convolutions add to them."""
        shortcut = features if self.conv_shortcut is None else self.conv_shortcut(features)
        hidden = self.conv1(F.silu(self.norm1(features)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return torch.add(shortcut, hidden)


class PixelAttention(nn.Module):
    """Self-attention of one head over all pixels, added to its input."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, features: Features) -> Features:
        """Return the features plus what each pixel gathers from the others."""
        tokens = self.group_norm(features).flatten(2).transpose(1, 2).contiguous()  # b hw c
        query, key, value = (project(tokens).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        gathered = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        added = self.to_out[0](gathered).transpose(1, 2).reshape(features.shape)  # b c h w
        return torch.add(features, added)


class Downsample(nn.Module):
    """Halves both sides by a strided convolution that pads only after the last row and column."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Features) -> Float[Tensor, "b c h2 w2"]:
        """Return features of half the sides."""
        halved: Tensor = self.conv(F.pad(features, (0, 1, 0, 1)))
        return halved


class DoublingConv(nn.Conv2d):
    """A 3x3 convolution of the nearest-neighbour doubling of its input, as one transposed 4x4 convolution.

    Doubling is itself a transposed convolution by a 2x2 block of ones, and two convolutions in a row are one by the
    convolved kernels: 16 products an input pixel and channel pair instead of 36, and no doubled input in memory. Making
    that kernel takes longer than it saves where it is wide and the pixels are few.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Features) -> Float[Tensor, "b c h2 w2"]:
        """Return features of twice the sides."""
        if WIDE <= self.in_channels > input.numel() // self.in_channels:
            doubled = F.interpolate(input, scale_factor=2.0, mode="nearest")
            return F.conv2d(doubled, self.weight, self.bias, padding=1)
        flipped = self.weight.flip(2, 3).transpose(0, 1)
        wide = F.pad(flipped, (0, 1)) + F.pad(flipped, (1, 0))
        kernel = F.pad(wide, (0, 0, 0, 1)) + F.pad(wide, (0, 0, 1, 0))
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = DoublingConv(channels)

    def forward(self, features: Features) -> Float[Tensor, "b c h2 w2"]:
        """Return features of twice the sides."""
        doubled: Tensor = self.conv(features)
        return doubled
