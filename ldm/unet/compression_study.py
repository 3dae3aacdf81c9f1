"""UNet shapes of the compression study: one model for each factor of the autoencoder, 1 (pixels) to 32.

Of about equal size, so that what differs is the latent they see (Rombach et al. 2022, section 4.1, tables 13 and 14).
"""

from __future__ import annotations

from ldm.unet.model import UNetConfig

LATENT_CHANNELS = {1: 3, 2: 2, 4: 3, 8: 4, 16: 8, 32: 32}
"""Channels of the latent of each factor; 1 is the picture itself. (Table 13 prints 88x8x32 for factor 32.)"""
CHANNEL_MULT = {1: (1, 1, 2, 2, 4, 4), 2: (1, 2, 2, 4, 4), 4: (1, 2, 3, 5), 8: (1, 2, 4), 16: (1, 2, 4), 32: (1, 2, 4)}
BASE_CHANNELS = {1: 192, 2: 192, 4: 192, 8: 256, 16: 256, 32: 256}
ATTENTION_FACTORS = {1: (8, 16, 32), 2: (4, 8, 16), 4: (2, 4, 8), 8: (1, 2, 4), 16: (1, 2, 4), 32: (1, 2, 4)}
"""Levels of 32, 16 and 8 positions a side where there are such, else all."""


def ldm_imagenet(factor: int) -> UNetConfig:
    """Return LDM-1 to LDM-32 by class on ImageNet (table 13).

    Factor 1 has 396,835,971 parameters, 2: 390,888,578, 4: 400,920,579, 8: 394,984,196, 16: 395,002,632,
    32: 395,113,248.

    Raises:
        ValueError: for a factor that the study lacks.
    """
    _check_factor(factor)
    return UNetConfig(
        in_channels=LATENT_CHANNELS[factor],
        out_channels=LATENT_CHANNELS[factor],
        base_channels=BASE_CHANNELS[factor],
        channel_mult=CHANNEL_MULT[factor],
        attention_factors=ATTENTION_FACTORS[factor],
        num_heads=1,
        context_width=512,
    )


def ldm_celeba(factor: int) -> UNetConfig:
    """Return unconditional LDM-1 to LDM-32 on CelebA-HQ (table 14); at factor 4 it is the released model of faces.

    Factor 1 has 270,458,115 parameters, 2: 264,510,722, 4: 274,056,163, 8: 257,733,124, 16: 257,751,560,
    32: 257,862,176.

    Raises:
        ValueError: for a factor that the study lacks.
    """
    _check_factor(factor)
    return UNetConfig(
        in_channels=LATENT_CHANNELS[factor],
        out_channels=LATENT_CHANNELS[factor],
        base_channels=224 if factor == 4 else BASE_CHANNELS[factor],
        channel_mult=(1, 2, 3, 4) if factor == 4 else CHANNEL_MULT[factor],
        attention_factors=ATTENTION_FACTORS[factor],
        head_channels=32,
        context_width=None,
    )


def _check_factor(factor: int) -> None:
    if factor not in LATENT_CHANNELS:
        raise ValueError(f"the study has factors {', '.join(map(str, LATENT_CHANNELS))}, got {factor}")
