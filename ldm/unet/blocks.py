"""Levels of the UNet: residual blocks that know the time, attention that may know a condition, halving and doubling.

Letters: b batch, c channel, h row, w column, e width of the time embedding, l token, d embedding width.
Attributes are named so that parameter names are those of diffusers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.autoencoder.blocks import Upsample
from ldm.types import TextStates
from ldm.unet.attention import (
    Features,
    KeyMask,
    PlainAttention,
    ProjectionForm,
    SpatialTransformer,
    zero_initialise,
)

NORM_EPSILON = 1e-5

TimeEmbedding = Float[Tensor, "b e"]


class TimeForm(StrEnum):
    """How a residual block hears of the time, between its convolutions."""

    SHIFT = "shift"
    """Added before the normalisation: most of the paper's models, Stable Diffusion."""
    SCALE_SHIFT = "scale_shift"
    """Scales and shifts what the normalisation gives (FiLM; Dhariwal and Nichol 2021, eq. 3): LSUN churches."""


class Resampling(StrEnum):
    """How levels halve and double the sides."""

    CONVOLUTION = "convolution"
    """A strided convolution; nearest neighbour and a convolution."""
    RESIDUAL = "residual"
    """A residual block around 2x2 means; one around nearest neighbours (Dhariwal and Nichol 2021, section 3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelShape:
    """What the layers of one level have in common.

    Attributes:
        channels: width of the level.
        time_width: width of the time embedding.
        norm_groups: groups of every group normalisation.
        num_heads: heads of the attention, or None for a level without.
        context_width: width of the tokens that transformers read, or None for plain attention.
        depth: blocks a transformer.
        projections: what leads into a transformer and out of it.
        time_form: how residual blocks hear of the time.
        resampling: how the sides are halved and doubled.
    """

    channels: int
    time_width: int
    norm_groups: int
    num_heads: int | None
    context_width: int | None
    depth: int
    projections: ProjectionForm
    time_form: TimeForm
    resampling: Resampling

    def residual(self, in_channels: int, resize: nn.Module | None = None) -> TimedResidualBlock:
        """Return a residual block to this level's width, which may also resize."""
        return TimedResidualBlock(
            in_channels,
            self.channels,
            self.time_width,
            norm_groups=self.norm_groups,
            time_form=self.time_form,
            resize=resize,
        )

    def attentions(self, count: int) -> nn.ModuleList:
        """Return `count` layers of attention, or none for a level without."""
        if self.num_heads is None:
            return nn.ModuleList()
        return nn.ModuleList(self._attention(self.num_heads) for _ in range(count))

    def halving(self) -> nn.Module:
        """Return what leads to the next coarser level."""
        match self.resampling:
            case Resampling.CONVOLUTION:
                return Downsample(self.channels)
            case Resampling.RESIDUAL:
                return self.residual(self.channels, nn.AvgPool2d(2))

    def doubling(self) -> nn.Module:
        """Return what leads to the next finer level."""
        match self.resampling:
            case Resampling.CONVOLUTION:
                return Upsample(self.channels)
            case Resampling.RESIDUAL:
                return self.residual(self.channels, nn.Upsample(scale_factor=2, mode="nearest"))

    def _attention(self, num_heads: int) -> nn.Module:
        if self.context_width is None:
            return PlainAttention(self.channels, num_heads=num_heads, norm_groups=self.norm_groups)
        return SpatialTransformer(
            self.channels,
            context_width=self.context_width,
            num_heads=num_heads,
            depth=self.depth,
            norm_groups=self.norm_groups,
            projections=self.projections,
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
    """Two normalised 3x3 convolutions beside a shortcut, which hear of the time between them; some also resize."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_width: int,
        *,
        norm_groups: int,
        time_form: TimeForm,
        resize: nn.Module | None,
    ) -> None:
        super().__init__()
        self.time_form = time_form
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPSILON)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, (2 if time_form is TimeForm.SCALE_SHIFT else 1) * out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPSILON)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.resize = resize
        zero_initialise(self.conv2)

    def forward(self, features: Features, activated_time: TimeEmbedding) -> Float[Tensor, "b d h2 w2"]:
        """Return the features plus what the convolutions add; `activated_time` is the SiLU of the time embedding."""
        # The shortcut comes first: gradients are summed in the order of the forward pass.
        resized = features if self.resize is None else self.resize(features)
        shortcut = resized if self.conv_shortcut is None else self.conv_shortcut(resized)
        hidden = F.silu(self.norm1(features))
        hidden = hidden if self.resize is None else self.resize(hidden)
        hidden = self._timed(self.conv1(hidden), self.time_emb_proj(activated_time)[:, :, None, None])
        return torch.add(shortcut, self.conv2(F.silu(hidden)))

    def _timed(self, hidden: Tensor, time: Tensor) -> Tensor:
        match self.time_form:
            case TimeForm.SHIFT:
                shifted: Tensor = self.norm2(hidden + time)
                return shifted
            case TimeForm.SCALE_SHIFT:
                scale, shift = time.chunk(2, dim=1)
                scaled: Tensor = self.norm2(hidden) * (1 + scale) + shift
                return scaled


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
        self.attentions = shape.attentions(num_blocks)
        self.downsamplers = nn.ModuleList([] if is_last else [shape.halving()])

    def forward(
        self, features: Features, activated_time: TimeEmbedding, context: TextStates | None, mask: KeyMask | None
    ) -> tuple[Tensor, ...]:
        """Return the result of each layer; the last is what the next level starts from."""
        results: list[Tensor] = []
        for index, resnet in enumerate(self.resnets):
            features = resnet(features, activated_time)
            if self.attentions:
                features = self.attentions[index](features, context, mask)
            results.append(features)
        for downsample in self.downsamplers:
            results.append(_resampled(downsample, features, activated_time))
        return tuple(results)


class MiddleLevel(nn.Module):
    """The coarsest features: residual block, attention, residual block."""

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.attentions = shape.attentions(1)
        self.resnets = nn.ModuleList(shape.residual(shape.channels) for _ in range(2))

    def forward(
        self, features: Features, activated_time: TimeEmbedding, context: TextStates | None, mask: KeyMask | None
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
        self.attentions = shape.attentions(len(skip_channels))
        self.upsamplers = nn.ModuleList([] if is_last else [shape.doubling()])

    def forward(
        self,
        features: Features,
        skips: tuple[Tensor, ...],
        activated_time: TimeEmbedding,
        context: TextStates | None,
        mask: KeyMask | None,
    ) -> Tensor:
        """Return the features the next level starts from; `skips` come in the order they are read."""
        for index, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            features = resnet(torch.cat([features, skip], dim=1), activated_time)
            if self.attentions:
                features = self.attentions[index](features, context, mask)
        for upsample in self.upsamplers:
            features = _resampled(upsample, features, activated_time)
        return features


def _resampled(layer: nn.Module, features: Features, activated_time: TimeEmbedding) -> Tensor:
    resampled: Tensor = layer(features, activated_time) if isinstance(layer, TimedResidualBlock) else layer(features)
    return resampled
