"""The first stage: image to posterior moments and latent to image (Rombach et al. 2022, section 3.1 and appendix G).

Order: encoder (residual levels, each but the last halving the sides) → quant_conv → moments → sampled latent →
post_quant_conv → decoder (the levels back). Parameter names are those of diffusers' `AutoencoderKL`.

Letters: b batch, c latent channel, m moment channel (2c), h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.blocks import NORM_EPSILON, Downsample, Features, PixelAttention, ResidualBlock, Upsample
from ldm.autoencoder.regularizer import sample
from ldm.config import Config
from ldm.types import Image, Latent, Moments

IMAGE_CHANNELS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig(Config):
    """Shape of an autoencoder."""

    latent_channels: int
    """Channels of the latent."""
    base_channels: int = 128
    """Width of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level in units of `base_channels`, finest first; each level but the last halves the sides."""
    num_res_blocks: int = 2
    """Residual blocks a level of the encoder; the decoder has one more."""
    mid_attention: bool = True
    """Whether the coarsest features attend over all positions."""
    norm_groups: int = 32
    """Groups of every group normalisation; divides every level's width."""

    def __post_init__(self) -> None:
        for name in ("latent_channels", "base_channels", "num_res_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_mult or self.channel_mult[0] != 1 or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must start with 1 and be positive, got {self.channel_mult}")
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups must divide every level's width, got {self.norm_groups} and {width}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * mult for mult in self.channel_mult)

    @property
    def factor(self) -> int:
        """Pixels a side for one latent position."""
        return 1 << (len(self.channel_mult) - 1)

    @property
    def moment_channels(self) -> int:
        """Channels of the moments: mean, then log-variance."""
        return 2 * self.latent_channels


class EncoderLevel(nn.Module):
    """Residual blocks of one resolution, then halving unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_blocks: int, norm_groups: int, is_last: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b, norm_groups) for a, b in zip(widths, widths[1:], strict=False))
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(out_channels)])

    def forward(self, features: Features) -> Tensor:
        """Return the features of the next level's resolution."""
        for layer in (*self.resnets, *self.downsamplers):
            features = layer(features)
        return features


class DecoderLevel(nn.Module):
    """Residual blocks of one resolution, then doubling unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_blocks: int, norm_groups: int, is_last: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b, norm_groups) for a, b in zip(widths, widths[1:], strict=False))
        self.upsamplers = nn.ModuleList([] if is_last else [Upsample(out_channels)])

    def forward(self, features: Features) -> Tensor:
        """Return the features of the next level's resolution."""
        for layer in (*self.resnets, *self.upsamplers):
            features = layer(features)
        return features


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, with attention between them."""

    def __init__(self, channels: int, *, norm_groups: int, has_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, norm_groups)] if has_attention else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, norm_groups) for _ in range(2))

    def forward(self, features: Features) -> Features:
        """Return features of the same shape."""
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            features = layer(features)
        return features


class Encoder(nn.Module):
    """Image to features of twice the latent's channels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(
                widths[max(level - 1, 0)],
                width,
                num_blocks=config.num_res_blocks,
                norm_groups=config.norm_groups,
                is_last=level == last,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], norm_groups=config.norm_groups, has_attention=config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.moment_channels, 3, padding=1)

    def forward(self, image: Image) -> Moments:
        """Return the features that become moments."""
        features = self.conv_in(image)
        for level in self.down_blocks:
            features = level(features)
        features = self.mid_block(features)
        encoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(features)))
        return encoded


class Decoder(nn.Module):
    """Features of the latent's channels to an image."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(
                widths[max(level - 1, 0)],
                width,
                num_blocks=config.num_res_blocks + 1,
                norm_groups=config.norm_groups,
                is_last=level == last,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = Middle(widths[0], norm_groups=config.norm_groups, has_attention=config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], IMAGE_CHANNELS, 3, padding=1)

    def forward(self, latent: Latent) -> Image:
        """Return the image, not clamped."""
        features = self.mid_block(self.conv_in(latent))
        for level in self.up_blocks:
            features = level(features)
        image: Tensor = self.conv_out(F.silu(self.conv_norm_out(features)))
        return image


class Autoencoder(nn.Module):
    """Encoder, posterior and decoder. Latents here are raw: scaling belongs to `LatentSpace`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.moment_channels, config.moment_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Image) -> Moments:
        """Return mean and log-variance of the posterior of each latent number.

        Raises:
            ValueError: if a side is not a multiple of the factor.
        """
        factor = self.config.factor
        if image.shape[-2] % factor or image.shape[-1] % factor:
            raise ValueError(f"image sides must be multiples of {factor}, got {tuple(image.shape[-2:])}")
        moments: Tensor = self.quant_conv(self.encoder(image))
        return moments

    def decode(self, latent: Latent) -> Image:
        """Return the image of a raw latent, not clamped to [-1, 1].

        Raises:
            ValueError: if the latent has another number of channels.
        """
        if latent.shape[1] != self.config.latent_channels:
            raise ValueError(f"a latent has {self.config.latent_channels} channels here, got {latent.shape[1]}")
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image

    def forward(self, image: Image, noise: Latent) -> tuple[Image, Moments]:
        """Encode, draw from the posterior with the given standard normal noise, decode."""
        moments = self.encode(image)
        return self.decode(sample(moments, noise)), moments

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive weight compares gradients (Esser et al. 2021, eq. 7)."""
        return cast(nn.Parameter, self.decoder.conv_out.weight)
