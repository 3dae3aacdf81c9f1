"""Every UNet of the paper and of Stable Diffusion has its parameters to the last one."""

from __future__ import annotations

import inspect

import pytest
import torch

from ldm.types import Condition
from ldm.unet import compression_study, zoo
from ldm.unet.compression_study import ldm_celeba, ldm_imagenet
from ldm.unet.model import UNet, UNetConfig

PARAMETERS = {
    "celebahq_ldm_vq_4": 274_056_163,
    "ffhq_ldm_vq_4": 274_056_163,
    "lsun_bedrooms_ldm_vq_4": 274_056_163,
    "lsun_churches_ldm_kl_8": 294_966_916,
    "cin_ldm_vq_f8": 394_984_196,
    "cin256_v2": 400_920_579,
    "text2img256": 403_623_939,
    "txt2img_1p4b": 872_300_484,
    "layout2img_openimages256": 246_277_379,
    "semantic_synthesis256": 215_229_315,
    "semantic_synthesis512": 215_229_315,
    "inpainting_big": 387_245_827,
    "bsr_sr": 113_622_563,
    "rdm": 1_335_480_400,
    "sd1": 859_520_964,
    "sd1_inpainting": 859_535_364,
    "sd2": 865_910_724,
    "sd2_inpainting": 865_925_124,
    "sdxl": 2_567_463_684,
    "emoji": 4_583_396,
    "emoji_unconditional": 2_786_980,
}
STUDY = {
    1: (396_835_971, 270_458_115),
    2: (390_888_578, 264_510_722),
    4: (400_920_579, 274_056_163),
    8: (394_984_196, 257_733_124),
    16: (395_002_632, 257_751_560),
    32: (395_113_248, 257_862_176),
}


def num_parameters(config: UNetConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_named_unet_has_the_exact_parameter_count_and_says_it(name):
    shape = getattr(zoo, name)
    assert num_parameters(shape()) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in shape.__doc__


def test_every_named_unet_has_its_count_in_the_table():
    shapes = inspect.getmembers(zoo, inspect.isfunction)
    assert {name for name, shape in shapes if shape.__module__ == zoo.__name__} == set(PARAMETERS)


@pytest.mark.parametrize("factor", STUDY)
def test_compression_study_has_the_exact_parameter_counts_and_says_them(factor):
    counts = num_parameters(ldm_imagenet(factor)), num_parameters(ldm_celeba(factor))
    assert counts == STUDY[factor]
    assert f"{counts[0]:,}" in ldm_imagenet.__doc__
    assert f"{counts[1]:,}" in ldm_celeba.__doc__


def test_compression_study_meets_the_released_models_where_they_are_the_same():
    assert ldm_imagenet(4) == zoo.cin256_v2()
    assert ldm_celeba(4) == zoo.celebahq_ldm_vq_4()
    assert set(compression_study.LATENT_CHANNELS) == set(STUDY)


def test_factor_outside_the_study_is_refused_with_those_inside():
    with pytest.raises(ValueError, match="factors 1, 2, 4, 8, 16, 32, got 3"):
        ldm_celeba(3)


@pytest.mark.parametrize("name", ["sdxl", "lsun_churches_ldm_kl_8", "inpainting_big"])
def test_forward_reads_no_value_so_the_device_never_waits(name):
    """On the meta device there are no values to read: whatever asked for one would fail."""
    config = getattr(zoo, name)()
    with torch.device("meta"):
        condition = Condition(
            states=None if config.context_width is None else torch.empty(2, 7, config.context_width),
            mask=None if config.context_width is None else torch.empty(2, 7, dtype=torch.bool),
            pooled=None if config.pooled_width is None else torch.empty(2, config.pooled_width),
            sizes=None if config.pooled_width is None else torch.empty(2, 6),
            spatial=torch.empty(2, config.in_channels - config.out_channels, 32, 32),
        )
        prediction = UNet(config)(torch.empty(2, config.out_channels, 32, 32), torch.empty(2), condition)
    assert prediction.shape == (2, config.out_channels, 32, 32)
