"""Levels of the UNet: residual blocks that know the time, transformers that know the condition, halving and doubling.

Letters: b batch, c channel, h row, w column, e width of the time embedding, l token, d embedding width.
Attributes are named so that parameter names are those of diffusers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.autoencoder.blocks import Upsample
from ldm.types import TextStates
from ldm.unet.attention import Features, KeyMask, SpatialTransformer

NORM_EPSILON = 1e-5

TimeEmbedding = Float[Tensor, "b e"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelShape:
    """What the layers of one level have in common.

    Attributes:
        channels: width of the level.
        time_width: width of the time embedding.
        norm_groups: groups of every group normalisation.
        num_heads: heads of the attention, or None for a level without transformers.
        context_width: width of the condition's tokens.
        depth: blocks a transformer.
    """

    channels: int
    time_width: int
    norm_groups: int
    num_heads: int | None
    context_width: int
    depth: int

    def residual(self, in_channels: int) -> TimedResidualBlock:
        """Return a residual block to this level's width."""
        return TimedResidualBlock(in_channels, self.channels, self.time_width, self.norm_groups)

    def transformers(self, count: int) -> nn.ModuleList:
        """Return `count` transformers, or none for a level without."""
        if self.num_heads is None:
            return nn.ModuleList()
        return nn.ModuleList(
            SpatialTransformer(
                self.channels,
                context_width=self.context_width,
                num_heads=self.num_heads,
                depth=self.depth,
                norm_groups=self.norm_groups,
            )
            for _ in range(count)
        )


def sinusoids(timestep: Float[Tensor, "b"], width: int) -> Float[Tensor, "b width"]:
    """Return cosines then sines of the timestep at geometric frequencies (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep.float()[:, None] * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeMLP(nn.Module):
    """Two linear layers over the sinusoids of the timestep."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, waves: Float[Tensor, "b i"]) -> TimeEmbedding:
        """Return the time embedding."""
        embedding: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return embedding


class TimedResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut; the time is added between them."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPSILON)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPSILON)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        zero_initialise(self.conv2)

    def forward(self, features: Features, activated_time: TimeEmbedding) -> Float[Tensor, "b d h w"]:
        """Return the features plus what the convolutions add; `activated_time` is the SiLU of the time embedding."""
        shortcut = features if self.conv_shortcut is None else self.conv_shortcut(features)
        hidden = self.conv1(F.silu(self.norm1(features)))
        hidden = hidden + self.time_emb_proj(activated_time)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return torch.add(shortcut, hidden)


class Downsample(nn.Module):
    """Halves both sides by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, features: Features) -> Float[Tensor, "b c h2 w2"]:
        """Return features of half the sides."""
        halved: Tensor = self.conv(features)
        return halved


class DownLevel(nn.Module):
    """A level on the way down: every intermediate result is kept for the way up."""

    def __init__(self, in_channels: int, shape: LevelShape, *, num_blocks: int, is_last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            shape.residual(in_channels if index == 0 else shape.channels) for index in range(num_blocks)
        )
        self.attentions = shape.transformers(num_blocks)
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(shape.channels)])

    def forward(
        self, features: Features, activated_time: TimeEmbedding, context: TextStates, mask: KeyMask | None
    ) -> tuple[Tensor, ...]:
        """Return the result of each layer; the last is what the next level starts from."""
        results: list[Tensor] = []
        for index, resnet in enumerate(self.resnets):
            features = resnet(features, activated_time)
            if self.attentions:
                features = self.attentions[index](features, context, mask)
            results.append(features)
        for downsample in self.downsamplers:
            results.append(downsample(features))
        return tuple(results)


class MiddleLevel(nn.Module):
    """The coarsest features: residual block, transformer, residual block."""

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.attentions = shape.transformers(1)
        self.resnets = nn.ModuleList(shape.residual(shape.channels) for _ in range(2))

    def forward(
        self, features: Features, activated_time: TimeEmbedding, context: TextStates, mask: KeyMask | None
    ) -> Features:
        """Return features of the same shape."""
        features = self.resnets[0](features, activated_time)
        features = self.attentions[0](features, context, mask)
        middle: Tensor = self.resnets[1](features, activated_time)
        return middle


class UpLevel(nn.Module):
    """A level on the way up: every residual block also reads one result of the way down."""

    def __init__(self, in_channels: int, skip_channels: tuple[int, ...], shape: LevelShape, *, is_last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            shape.residual((in_channels if index == 0 else shape.channels) + skip)
            for index, skip in enumerate(skip_channels)
        )
        self.attentions = shape.transformers(len(skip_channels))
        self.upsamplers = nn.ModuleList([] if is_last else [Upsample(shape.channels)])

    def forward(
        self,
        features: Features,
        skips: tuple[Tensor, ...],
        activated_time: TimeEmbedding,
        context: TextStates,
        mask: KeyMask | None,
    ) -> Tensor:
        """Return the features the next level starts from; `skips` come in the order they are read."""
        for index, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            features = resnet(torch.cat([features, skip], dim=1), activated_time)
            if self.attentions:
                features = self.attentions[index](features, context, mask)
        for upsample in self.upsamplers:
            features = upsample(features)
        return features


def zero_initialise(layer: nn.Conv2d) -> None:
    """Make a layer's output zero until it is trained, so that a fresh network is the identity beside its shortcuts."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
