"""The first stage: image to posterior moments and latent to image (Rombach et al. 2022, section 3.1 and appendix G).

Order: encoder (residual levels, each but the last halving the sides) → quant_conv → moments → sampled latent →
(VQ: nearest codes →) post_quant_conv → decoder (the levels back). Parameter names are those of diffusers'
`AutoencoderKL` and `VQModel`.

Letters: b batch, c latent channel, m moment channel (2c for KL, c for VQ), h latent row, w latent column, y pixel row,
x pixel column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import NamedTuple, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.autoencoder.blocks import NORM_EPSILON, Downsample, Features, PixelAttention, ResidualBlock, Upsample
from ldm.autoencoder.quantizer import Quantized, VectorQuantizer
from ldm.autoencoder.regularizer import LatentKind, Regularizer, kl_divergence, mode, sample
from ldm.config import Config, added_later
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
    attention_factors: tuple[int, ...] = added_later(())
    """Levels that attend over all positions behind each residual block, named by their pixels a side: 16 for f = 16."""
    regularizer: Regularizer = added_later(Regularizer.KL)
    """What holds the latent space together: kl or vq."""
    num_codes: int = added_later(0)
    """Vectors of the codebook; vq only."""
    z_channels: int | None = added_later(None)
    """Channels that the encoder ends and the decoder begins with, vq only; none for as many as the latent has."""

    def __post_init__(self) -> None:
        for name in ("latent_channels", "base_channels", "num_res_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_mult or self.channel_mult[0] != 1 or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must start with 1 and be positive, got {self.channel_mult}")
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups must divide every level's width, got {self.norm_groups} and {width}")
        if strangers := sorted(set(self.attention_factors) - set(self.factors)):
            raise ValueError(f"attention_factors must be among the levels' {self.factors}, got {strangers}")
        if self.attention_factors != tuple(sorted(set(self.attention_factors))):
            raise ValueError(f"attention_factors must ascend, got {self.attention_factors}")
        self._check_regularizer()

    def _check_regularizer(self) -> None:
        match self.regularizer:
            case Regularizer.KL:
                if self.num_codes or self.z_channels is not None:
                    raise ValueError(
                        f"num_codes and z_channels belong to vq, got {self.num_codes} and {self.z_channels} for kl"
                    )
            case Regularizer.VQ:
                if self.num_codes < 1:
                    raise ValueError(f"num_codes must be at least 1 for vq, got {self.num_codes}")
                if self.z_channels is not None and self.z_channels < 1:
                    raise ValueError(f"z_channels must be at least 1, got {self.z_channels}")
                if self.z_channels == self.latent_channels:  # one network, one digest
                    raise ValueError(f"z_channels is left out where it is latent_channels, got {self.z_channels}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * mult for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """Pixels a side for one position of each level, finest first."""
        return tuple(1 << level for level in range(len(self.channel_mult)))

    @property
    def factor(self) -> int:
        """Pixels a side for one latent position."""
        return self.factors[-1]

    @property
    def latent_kind(self) -> LatentKind:
        """What the moments are."""
        return self.regularizer.latent_kind

    @property
    def moment_channels(self) -> int:
        """Channels of the moments: mean, then log-variance; for vq the latent's own."""
        return self.latent_channels * (2 if self.latent_kind.has_log_variance else 1)

    @property
    def encoded_channels(self) -> int:
        """Channels that the encoder ends with, before `quant_conv`."""
        return self.moment_channels if self.z_channels is None else self.z_channels

    @property
    def decoded_channels(self) -> int:
        """Channels that the decoder begins with, behind `post_quant_conv`."""
        return self.latent_channels if self.z_channels is None else self.z_channels


def quantized(config: AutoencoderConfig, *, num_codes: int, code_channels: int | None = None) -> AutoencoderConfig:
    """Return the VQ model that otherwise has a KL model's shape.

    Args:
        config: the KL model; its latent channels become those between encoder and codebook.
        num_codes: vectors of the codebook.
        code_channels: their width, which is the latent's; none for as wide as between encoder and codebook.
    """
    width = config.latent_channels if code_channels is None else code_channels
    return replace(
        config,
        regularizer=Regularizer.VQ,
        num_codes=num_codes,
        latent_channels=width,
        z_channels=None if width == config.latent_channels else config.latent_channels,
    )


class EncoderLevel(nn.Module):
    """Residual blocks of one resolution, each followed by attention where it has any, then halving but at the last."""

    def __init__(self, config: AutoencoderConfig, level: int) -> None:
        super().__init__()
        width = config.widths[level]
        widths = [config.widths[max(level - 1, 0)]] + [width] * config.num_res_blocks
        self.resnets = nn.ModuleList(_residual_blocks(widths, config.norm_groups))
        self.attentions = nn.ModuleList(_attentions(config, level, config.num_res_blocks))
        self.downsamplers = nn.ModuleList([] if level == len(config.widths) - 1 else [Downsample(width)])

    def forward(self, features: Features) -> Tensor:
        """Return the features of the next level's resolution."""
        for layer in (*_alternating(self.resnets, self.attentions), *self.downsamplers):
            features = layer(features)
        return features


class DecoderLevel(nn.Module):
    """Residual blocks of one resolution, each followed by attention where it has any, then doubling but at the last."""

    def __init__(self, config: AutoencoderConfig, level: int) -> None:
        super().__init__()
        width, num_blocks = config.widths[level], config.num_res_blocks + 1
        widths = [config.widths[min(level + 1, len(config.widths) - 1)]] + [width] * num_blocks
        self.resnets = nn.ModuleList(_residual_blocks(widths, config.norm_groups))
        self.attentions = nn.ModuleList(_attentions(config, level, num_blocks))
        self.upsamplers = nn.ModuleList([Upsample(width)] if level else [])

    def forward(self, features: Features) -> Tensor:
        """Return the features of the next level's resolution."""
        for layer in (*_alternating(self.resnets, self.attentions), *self.upsamplers):
            features = layer(features)
        return features


def _residual_blocks(widths: Sequence[int], norm_groups: int) -> list[ResidualBlock]:
    return [ResidualBlock(before, behind, norm_groups) for before, behind in pairwise(widths)]


def _attentions(config: AutoencoderConfig, level: int, num_blocks: int) -> list[PixelAttention]:
    if config.factors[level] not in config.attention_factors:
        return []
    return [PixelAttention(config.widths[level], config.norm_groups) for _ in range(num_blocks)]


def _alternating(resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> list[nn.Module]:
    pairs = zip_longest(resnets, attentions)
    return [layer for pair in pairs for layer in pair if layer is not None]


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
    """Image to the features that become moments."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(EncoderLevel(config, level) for level in range(len(widths)))
        self.mid_block = Middle(widths[-1], norm_groups=config.norm_groups, has_attention=config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.encoded_channels, 3, padding=1)

    def forward(self, image: Image) -> Features:
        """Return the features that become moments."""
        features = self.conv_in(image)
        for level in self.down_blocks:
            features = level(features)
        features = self.mid_block(features)
        encoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(features)))
        return encoded


class Decoder(nn.Module):
    """Features of a latent to an image."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.decoded_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(DecoderLevel(config, level) for level in reversed(range(len(widths))))
        self.mid_block = Middle(widths[0], norm_groups=config.norm_groups, has_attention=config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], IMAGE_CHANNELS, 3, padding=1)

    def forward(self, features: Features) -> Image:
        """Return the image, not clamped."""
        features = self.mid_block(self.conv_in(features))
        for level in self.up_blocks:
            features = level(features)
        image: Tensor = self.conv_out(F.silu(self.conv_norm_out(features)))
        return image


class Reconstruction(NamedTuple):
    """All that a training needs of one forward pass, so that data-parallel wrappers see every gradient's way.

    Attributes:
        image: what the decoder makes, not clamped, shape (b, 3, y, x).
        moments: what the encoder gives, shape (b, m, h, w).
        kl: KL divergence of each row in sums over elements, shape (b,); None for vq.
        quantized: the codes and both terms of the codebook's loss; None for kl.
    """

    image: Image
    moments: Moments
    kl: Float[Tensor, " b"] | None
    quantized: Quantized | None


class Autoencoder(nn.Module):
    """Encoder, posterior or codebook, and decoder. Latents here are raw: scaling belongs to `LatentSpace`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.encoded_channels, config.moment_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.decoded_channels, 1)
        is_quantizing = config.regularizer is Regularizer.VQ
        self.quantize = VectorQuantizer(config.num_codes, config.latent_channels) if is_quantizing else None

    def encode(self, image: Image) -> Moments:
        """Return mean and log-variance of the posterior of each latent number; for vq the latent, not yet quantised.

        Raises:
            ValueError: if a side is not a multiple of the factor.
        """
        factor = self.config.factor
        if image.shape[-2] % factor or image.shape[-1] % factor:
            raise ValueError(f"image sides must be multiples of {factor}, got {tuple(image.shape[-2:])}")
        moments: Tensor = self.quant_conv(self.encoder(image))
        return moments

    def decode(self, latent: Latent, *, is_quantized: bool = False) -> Image:
        """Return the image of a raw latent, not clamped to [-1, 1].

        Args:
            latent: for vq any, which is quantised first: quantising belongs to the decoder (Rombach et al. 2022, 3.1).
            is_quantized: whether it holds vectors of the codebook already and is decoded as it is.

        Raises:
            ValueError: if the latent has another number of channels.
        """
        if latent.shape[1] != self.config.latent_channels:
            raise ValueError(f"a latent has {self.config.latent_channels} channels here, got {latent.shape[1]}")
        if self.quantize is not None and not is_quantized:
            latent = self.quantize(latent).latent
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image

    def forward(self, image: Image, noise: Latent | None = None) -> Reconstruction:
        """Encode, draw from the posterior with the given standard normal noise (vq quantises instead), decode."""
        moments = self.encode(image)
        latent = sample(moments, noise, self.config.latent_kind)
        if self.quantize is None:
            return Reconstruction(self.decode(latent), moments, kl_divergence(moments), None)
        quantized = self.quantize(latent)
        return Reconstruction(self.decode(quantized.latent, is_quantized=True), moments, None, quantized)

    def reconstruct(self, image: Image) -> Image:
        """Return what is left of an image behind encoder and decoder, with no noise between; not clamped."""
        return self.decode(mode(self.encode(image), self.config.latent_kind))

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive weight compares gradients (Esser et al. 2021, eq. 7)."""
        return cast(nn.Parameter, self.decoder.conv_out.weight)
