"""Named autoencoder shapes: the paper's (Rombach et al. 2022, table 8) and small ones for a laptop's CPU.

The paper's have 128 channels at full resolution and two residual blocks a level. Those of factor 2 were never released:
table 8 says their latents and codebooks; that they have one level for each halving, of widths 1 and 2, is our reading.
"""

from __future__ import annotations

from dataclasses import replace

from ldm.autoencoder.model import AutoencoderConfig, quantized


def kl_f2() -> AutoencoderConfig:
    """Return a KL model of factor 2 and 2 channels: 13,314,465 parameters."""
    return AutoencoderConfig(latent_channels=2, channel_mult=(1, 2))


def kl_f4() -> AutoencoderConfig:
    """Return the paper's KL model of factor 4: 55,312,063 parameters."""
    return AutoencoderConfig(latent_channels=3, base_channels=128, channel_mult=(1, 2, 4), num_res_blocks=2)


def kl_f8() -> AutoencoderConfig:
    """Return the paper's KL model of factor 8, Stable Diffusion's first stage: 83,653,863 parameters."""
    return AutoencoderConfig(latent_channels=4, base_channels=128, channel_mult=(1, 2, 4, 4), num_res_blocks=2)


def kl_f16() -> AutoencoderConfig:
    """Return the paper's KL model of factor 16: 69,610,963 parameters."""
    return AutoencoderConfig(latent_channels=16, channel_mult=(1, 1, 2, 2, 4), attention_factors=(16,))


def kl_f32() -> AutoencoderConfig:
    """Return the paper's KL model of factor 32: 103,880,131 parameters."""
    return AutoencoderConfig(latent_channels=64, channel_mult=(1, 1, 2, 2, 4, 4), attention_factors=(16, 32))


def vq_f2() -> AutoencoderConfig:
    """Return a VQ model of factor 2 and 2048 codes of 2 channels: 13,313,937 parameters."""
    return quantized(kl_f2(), num_codes=2048)


def vq_f2_n64() -> AutoencoderConfig:
    """Return a VQ model of factor 2 and 64 codes of 2 channels: 13,309,969 parameters."""
    return replace(vq_f2(), num_codes=64)


def vq_f4() -> AutoencoderConfig:
    """Return the paper's VQ model of factor 4 and 8192 codes: 55,322,782 parameters."""
    return quantized(kl_f4(), num_codes=8192)


def vq_f4_noattn() -> AutoencoderConfig:
    """Return the same without any attention: 53,219,486 parameters."""
    return replace(vq_f4(), mid_attention=False)


def vq_f8() -> AutoencoderConfig:
    """Return the paper's VQ model of factor 8 and 16384 codes: 67,717,295 parameters."""
    shape = AutoencoderConfig(latent_channels=4, channel_mult=(1, 2, 2, 4), attention_factors=(8,))
    return quantized(shape, num_codes=16384)


def vq_f8_n256() -> AutoencoderConfig:
    """Return the same with 256 codes: 67,652,783 parameters."""
    return replace(vq_f8(), num_codes=256)


def vq_f16() -> AutoencoderConfig:
    """Return the paper's VQ model of factor 16 and 16384 codes: 69,593,371 parameters."""
    return quantized(replace(kl_f16(), latent_channels=8), num_codes=16384)


def emoji_f4() -> AutoencoderConfig:
    """Return a model for 64-pixel drawings that trains on a laptop's CPU: 64x64x3 to 16x16x4, 681,911 parameters.

    Most of the work is at full resolution, so it is narrow there and widens with depth.
    """
    return AutoencoderConfig(
        latent_channels=4, base_channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8
    )


def small_f4() -> AutoencoderConfig:
    """Return a model of factor 4 for a CPU and pictures of about 64 px: 64x64x3 to 16x16x4, 1,499,127 parameters."""
    return AutoencoderConfig(
        latent_channels=4, base_channels=16, channel_mult=(1, 3, 6), num_res_blocks=1, norm_groups=8
    )


def small_f8() -> AutoencoderConfig:
    """Return a model of factor 8 for a CPU, 64x64x3 to 8x8x16: 2,196,963 parameters.

    Its 16 channels keep as many numbers of a picture as small_f4's 4 do.
    """
    return AutoencoderConfig(
        latent_channels=16, base_channels=16, channel_mult=(1, 3, 6, 6), num_res_blocks=1, norm_groups=8
    )
