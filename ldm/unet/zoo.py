"""Named UNet shapes: Stable Diffusion 1 and the small one of the emoji recipe."""

from __future__ import annotations

from ldm.unet.model import UNetConfig


def sd1() -> UNetConfig:
    """Return Stable Diffusion 1's UNet: 859,520,964 parameters."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_factors=(1, 2, 4),
        num_heads=8,
        context_width=768,
    )


def emoji() -> UNetConfig:
    """Return a UNet for 16x16x4 latents and MiniLM tokens that trains on a laptop's CPU: 4,583,396 parameters."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=32,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        attention_factors=(2, 4),
        head_channels=32,
        context_width=384,
        norm_groups=16,
    )
