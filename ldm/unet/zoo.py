"""Named UNet shapes: the paper's released models, Stable Diffusion, and the small one of the emoji recipe.

The paper's are of Rombach et al. 2022, tables 12 and 15 and the configurations released with them; whatever their
condition is made with (a class embedding, a transformer over text or boxes) is no part of them. The compression
study's have a file of their own.
"""

from __future__ import annotations

from dataclasses import replace

from ldm.unet.attention import ProjectionForm
from ldm.unet.blocks import Resampling, TimeForm
from ldm.unet.model import UNetConfig


def celebahq_ldm_vq_4() -> UNetConfig:
    """Return the paper's unconditional faces, 64x64x3: 274,056,163 parameters."""
    return UNetConfig(
        in_channels=3,
        out_channels=3,
        base_channels=224,
        channel_mult=(1, 2, 3, 4),
        attention_factors=(2, 4, 8),
        head_channels=32,
        context_width=None,
    )


def ffhq_ldm_vq_4() -> UNetConfig:
    """Return the paper's unconditional faces of FFHQ, as those of CelebA-HQ: 274,056,163 parameters."""
    return celebahq_ldm_vq_4()


def lsun_bedrooms_ldm_vq_4() -> UNetConfig:
    """Return the paper's unconditional bedrooms, as the faces of CelebA-HQ: 274,056,163 parameters."""
    return celebahq_ldm_vq_4()


def lsun_churches_ldm_kl_8() -> UNetConfig:
    """Return the paper's unconditional churches, 32x32x4: 294,966,916 parameters."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=192,
        channel_mult=(1, 2, 2, 4, 4),
        attention_factors=(1, 2, 4, 8),
        num_heads=8,
        context_width=None,
        time_form=TimeForm.SCALE_SHIFT,
        resampling=Resampling.RESIDUAL,
    )


def cin_ldm_vq_f8() -> UNetConfig:
    """Return the paper's ImageNet by class, 32x32x4, one token of width 512: 394,984,196 parameters."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=256,
        channel_mult=(1, 2, 4),
        attention_factors=(1, 2, 4),
        head_channels=32,
        context_width=512,
    )


def cin256_v2() -> UNetConfig:
    """Return the paper's best ImageNet by class, LDM-4, 64x64x3: 400,920,579 parameters."""
    return UNetConfig(
        in_channels=3,
        out_channels=3,
        base_channels=192,
        channel_mult=(1, 2, 3, 5),
        attention_factors=(2, 4, 8),
        num_heads=1,
        context_width=512,
    )


def text2img256() -> UNetConfig:
    """Return the paper's first text to image, 64x64x3, tokens of width 640: 403,623,939 parameters."""
    return replace(cin256_v2(), num_heads=None, head_channels=32, context_width=640)


def txt2img_1p4b() -> UNetConfig:
    """Return the paper's text to image on LAION, 32x32x4, tokens of width 1280: 872,300,484 parameters."""
    return replace(sd1(), context_width=1280)


def layout2img_openimages256() -> UNetConfig:
    """Return the paper's layout to image, 64x64x3, boxes as tokens of width 512: 246,277,379 parameters."""
    return UNetConfig(
        in_channels=3,
        out_channels=3,
        base_channels=128,
        channel_mult=(1, 2, 3, 4),
        attention_factors=(2, 4, 8),
        head_channels=32,
        context_width=512,
        transformer_depth=3,
    )


def semantic_synthesis256() -> UNetConfig:
    """Return the paper's label map to landscape, 64x64x3 beside 3 channels of the map: 215,229,315 parameters.

    Its configuration lists attention at factors 8 to 32, which its three levels don't reach: only the middle attends.
    """
    return UNetConfig(
        in_channels=6,
        out_channels=3,
        base_channels=128,
        channel_mult=(1, 4, 8),
        attention_factors=(),
        num_heads=8,
        context_width=None,
    )


def semantic_synthesis512() -> UNetConfig:
    """Return the paper's label map to landscape, 128x128x3, the same network: 215,229,315 parameters."""
    return semantic_synthesis256()


def inpainting_big() -> UNetConfig:
    """Return the paper's big inpainting, 64x64x3 beside the masked picture and the mask: 387,245,827 parameters."""
    return UNetConfig(
        in_channels=7,
        out_channels=3,
        base_channels=256,
        channel_mult=(1, 2, 3, 4),
        attention_factors=(2, 4, 8),
        num_heads=8,
        context_width=None,
        resampling=Resampling.RESIDUAL,
    )


def bsr_sr() -> UNetConfig:
    """Return the paper's released fourfold super-resolution, 64x64x3 beside the small picture: 113,622,563 parameters.

    Its configuration lists attention at factors 8 and 16; the four levels reach 8.
    """
    return UNetConfig(
        in_channels=6,
        out_channels=3,
        base_channels=160,
        channel_mult=(1, 2, 2, 4),
        attention_factors=(8,),
        head_channels=32,
        context_width=None,
    )


def rdm() -> UNetConfig:
    """Return the retrieval-augmented model (Blattmann et al. 2022), 48x48x16: 1,335,480,400 parameters."""
    return UNetConfig(
        in_channels=16,
        out_channels=16,
        base_channels=448,
        channel_mult=(1, 2, 3, 4),
        attention_factors=(1, 2, 4),
        head_channels=32,
        context_width=768,
    )


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


def sd1_inpainting() -> UNetConfig:
    """Return Stable Diffusion 1's inpainting, the mask and the masked picture beside the latent: 859,535,364."""
    return replace(sd1(), in_channels=9)


def sd2() -> UNetConfig:
    """Return Stable Diffusion 2's UNet, 2.1's too: 865,910,724 parameters."""
    return replace(sd1(), num_heads=None, head_channels=64, context_width=1024, projections=ProjectionForm.LINEAR)


def sd2_inpainting() -> UNetConfig:
    """Return Stable Diffusion 2's inpainting, the mask and the masked picture beside the latent: 865,925,124."""
    return replace(sd2(), in_channels=9)


def sdxl() -> UNetConfig:
    """Return Stable Diffusion XL's UNet (Podell et al. 2023, table 1): 2,567,463,684 parameters."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=320,
        channel_mult=(1, 2, 4),
        attention_factors=(2, 4),
        head_channels=64,
        context_width=2048,
        transformer_depth=(0, 2, 10),
        projections=ProjectionForm.LINEAR,
        pooled_width=1280,
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


def emoji_unconditional() -> UNetConfig:
    """Return the same with plain attention and without tokens: 2,786,980 parameters."""
    return replace(emoji(), context_width=None)
