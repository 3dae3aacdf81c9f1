"""Named autoencoder shapes: the paper's KL models (Rombach et al. 2022, table 8) and the emoji recipe's small one."""

from __future__ import annotations

from ldm.autoencoder.model import AutoencoderConfig


def kl_f4() -> AutoencoderConfig:
    """Return the paper's KL model of factor 4: 55,312,063 parameters."""
    return AutoencoderConfig(latent_channels=3, base_channels=128, channel_mult=(1, 2, 4), num_res_blocks=2)


def kl_f8() -> AutoencoderConfig:
    """Return the paper's KL model of factor 8, Stable Diffusion's first stage: 83,653,863 parameters."""
    return AutoencoderConfig(latent_channels=4, base_channels=128, channel_mult=(1, 2, 4, 4), num_res_blocks=2)


def emoji_f4() -> AutoencoderConfig:
    """Return a model for 64-pixel drawings that trains on a laptop's CPU: 64x64x3 to 16x16x4, 681,911 parameters.

    Most of the work is at full resolution, so it is narrow there and widens with depth.
    """
    return AutoencoderConfig(
        latent_channels=4, base_channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8
    )
