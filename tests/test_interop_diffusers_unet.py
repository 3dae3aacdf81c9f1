"""Every form of our UNet against diffusers' classes: files that they saved, files that we saved, equal outputs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch

from ldm.interop.diffusers import CONFIG_NAME, WEIGHTS_NAME, load_unet, save_unet
from ldm.interop.diffusers_unet import unet_config, unet_facts
from ldm.types import Condition
from ldm.unet import zoo
from ldm.unet.attention import AttentionForm, ProjectionForm
from ldm.unet.blocks import Resampling, TimeForm
from ldm.unet.model import UNet, UNetConfig
from tests.test_interop_diffusers import drawn, edited, oracle_of

CONDITIONAL = {
    "block_out_channels": (16, 32, 64, 64),
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
}
SD1: dict[str, Any] = {**CONDITIONAL, "attention_head_dim": 8}
SD2: dict[str, Any] = {
    **CONDITIONAL,
    "layers_per_block": 1,
    "attention_head_dim": (2, 4, 8, 8),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}
PLAIN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
RESIDUAL = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
FILM = {"resnet_time_scale_shift": "scale_shift"}
SAVED_THERE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": (SD1, {"num_heads": 8, "projections": ProjectionForm.CONVOLUTION, "attention_factors": (1, 2, 4)}),
    "sd1 inpainting": ({**SD1, "in_channels": 9, "layers_per_block": 1}, {"in_channels": 9, "out_channels": 4}),
    "sd2": (SD2, {"head_channels": 8, "projections": ProjectionForm.LINEAR}),
    "sdxl": (SDXL, {"transformer_depth": (0, 2, 3), "pooled_width": 10, "size_width": 8, "head_channels": 8}),
    "scale and shift": ({**SD2, **FILM}, {"time_form": TimeForm.SCALE_SHIFT}),
    "celebahq": ({**PLAIN, "attention_head_dim": 8}, {"head_channels": 8, "context_width": None}),
    "one head": ({**PLAIN, "attention_head_dim": None}, {"num_heads": 1, "attention": AttentionForm.PLAIN}),
    "levels of noise": ({**SD2, "num_class_embeds": 5, "in_channels": 7}, {"num_levels": 5, "in_channels": 7}),
    "levels of noise, plain": ({**PLAIN, "attention_head_dim": 8, "num_class_embeds": 5}, {"num_levels": 5}),
    "residual": ({**PLAIN, **RESIDUAL}, {"resampling": Resampling.RESIDUAL, "attention_factors": (2, 4)}),
    "residual, scale and shift": (
        {**PLAIN, **RESIDUAL, **FILM, "attn_norm_num_groups": 8},
        {"resampling": Resampling.RESIDUAL, "time_form": TimeForm.SCALE_SHIFT},
    ),
    "residual without attention": (
        {
            **PLAIN,
            **{
                name: (f"Resnet{way}sampleBlock2D",) * 3
                for name, way in zip(("down_block_types", "up_block_types"), ("Down", "Up"), strict=True)
            },
        },
        {"resampling": Resampling.RESIDUAL, "attention_factors": ()},
    ),
}
each_saved = pytest.mark.parametrize("facts, expected", SAVED_THERE.values(), ids=SAVED_THERE)

_OURS = {
    "in_channels": 4,
    "out_channels": 4,
    "base_channels": 16,
    "channel_mult": (1, 2, 4),
    "norm_groups": 8,
    "num_res_blocks": 1,
}
SAVED_HERE = {
    "sdxl": UNetConfig(
        **_OURS,
        attention_factors=(2, 4),
        head_channels=8,
        context_width=12,
        transformer_depth=(0, 2, 3),
        projections=ProjectionForm.LINEAR,
        pooled_width=10,
        size_width=8,
    ),
    "middle deeper than a level that is silent": UNetConfig(
        **_OURS, attention_factors=(1, 2), num_heads=4, context_width=12, transformer_depth=(1, 1, 2)
    ),
    "residual beside a transformer in the middle": UNetConfig(
        **_OURS, attention_factors=(), num_heads=4, context_width=12, resampling=Resampling.RESIDUAL
    ),
    "plain": UNetConfig(
        **_OURS | {"in_channels": 7},
        attention_factors=(4,),
        num_heads=1,
        context_width=None,
        time_form=TimeForm.SCALE_SHIFT,
        resampling=Resampling.RESIDUAL,
    ),
}
each_of_ours = pytest.mark.parametrize("config", SAVED_HERE.values(), ids=SAVED_HERE)
UNCONDITIONAL = dataclasses.replace(SAVED_HERE["plain"], resampling=Resampling.CONVOLUTION)


def assert_equal_outputs(ours: UNet, theirs: torch.nn.Module, side: int = 8) -> None:
    torch.manual_seed(1)
    config = ours.config
    noisy, timestep = torch.randn(2, config.in_channels, side, 2 * side), torch.tensor([37.25, 999.0])
    condition, words = Condition(), {}
    if isinstance(theirs, diffusers.UNet2DConditionModel):
        states = torch.randn(2, 6, config.context_width)
        words, condition = {"encoder_hidden_states": states}, Condition(states=states)
    if config.pooled_width is not None:
        pooled = torch.randn(2, config.pooled_width)
        sizes = torch.tensor([[1024.0, 768, 0, 128, 1024, 1024], [300, 200, 10, 0, 256, 256]])
        words["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        condition = dataclasses.replace(condition, pooled=pooled, sizes=sizes)
    if config.num_levels:
        level = torch.tensor([config.num_levels - 1, 1])
        words["class_labels"], condition = level, dataclasses.replace(condition, level=level)
    with torch.no_grad():
        expected = theirs(noisy, timestep, **words).sample
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(noisy, timestep, condition), expected, atol=2e-5, rtol=2e-5)


def saved_there(facts: dict[str, Any], folder: Path) -> torch.nn.Module:
    kind = diffusers.UNet2DConditionModel if "cross_attention_dim" in facts else diffusers.UNet2DModel
    theirs = drawn(kind(**facts))
    theirs.save_pretrained(folder)
    return theirs


@each_saved
def test_unet_that_diffusers_saved_loads_agrees_and_goes_back(facts, expected, tmp_path):
    theirs = saved_there(facts, tmp_path / "theirs")
    ours = load_unet(str(tmp_path / "theirs"))
    assert {name: getattr(ours.config, name) for name in expected} == expected
    assert_equal_outputs(ours, theirs)
    save_unet(ours.config, ours.state_dict(), str(tmp_path / "ours"))
    assert_equal_outputs(ours, oracle_of(type(theirs), tmp_path / "ours"))


@each_of_ours
def test_exported_unet_is_the_same_in_diffusers_and_here(config, tmp_path):
    ours = drawn(UNet(config))
    save_unet(config, ours.state_dict(), str(tmp_path))
    is_plain = config.attention is AttentionForm.PLAIN
    assert_equal_outputs(
        ours, oracle_of(diffusers.UNet2DModel if is_plain else diffusers.UNet2DConditionModel, tmp_path)
    )
    assert load_unet(str(tmp_path)).config == config


def test_full_size_sd1_fits_diffusers_to_the_last_name_and_shape():
    """The short form of the slow test: names and shapes, no numbers."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        ours = UNet(zoo.sd1())
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_full_size_sd1_that_diffusers_saved_agrees(tmp_path):
    theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768).eval()
    torch.manual_seed(0)
    theirs.save_pretrained(tmp_path)
    ours = load_unet(str(tmp_path))
    assert ours.config == zoo.sd1()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 859_520_964
    assert_equal_outputs(ours, theirs, side=16)


@pytest.mark.parametrize("name", ["sd2", "sd2_inpainting", "sdxl", "celebahq_ldm_vq_4", "bsr_sr", "cin256_v2", "rdm"])
def test_full_size_unet_fits_diffusers_to_the_last_name_and_shape(name):
    config = getattr(zoo, name)()
    facts = unet_facts(config)
    kind = getattr(diffusers, facts["_class_name"])
    with torch.device("meta"):
        ours, theirs = UNet(config), kind.from_config(facts)
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "name", ["sd1", "sd2", "sdxl", "celebahq_ldm_vq_4", "bsr_sr", "cin256_v2", "txt2img_1p4b", "rdm"]
)
def test_what_is_said_of_a_named_network_is_read_back(name):
    config = getattr(zoo, name)()
    assert unet_config(unet_facts(config), name) == config


def test_semantic_synthesis_goes_there_as_heads_of_one_width():
    """Only its middle attends, so eight heads are heads of width 128."""
    config = zoo.semantic_synthesis256()
    assert unet_config(unet_facts(config), "x") == dataclasses.replace(config, num_heads=None, head_channels=128)


def test_plain_attention_of_old_files_loads_and_agrees(tmp_path):
    """Folders from before 2023 say query, key, value and proj_attn, as that of CompVis' CelebA-HQ does."""
    theirs = saved_there({**PLAIN, "attention_head_dim": 8}, tmp_path)
    weights = safetensors.torch.load_file(tmp_path / WEIGHTS_NAME)
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in weights.items():
        for new_part, old_part in new_to_old.items():
            name = name.replace(new_part, old_part)
        old[name] = tensor
    assert old.keys() != weights.keys()
    safetensors.torch.save_file(old, tmp_path / WEIGHTS_NAME)
    assert_equal_outputs(load_unet(str(tmp_path)), theirs)


@pytest.mark.parametrize(
    "config, message",
    [
        (zoo.lsun_churches_ldm_kl_8(), r"got num_heads 8 and so widths \[24, 48, 96\]"),
        (zoo.inpainting_big(), r"one head at each, got num_heads 8 and so widths \[64, 96, 128\]"),
        (dataclasses.replace(UNCONDITIONAL, pooled_width=3), "UNet2DModel has no pooled_width, got 3"),
        (
            dataclasses.replace(SAVED_HERE["sdxl"], resampling=Resampling.RESIDUAL),
            r"no class for resampling residual beside levels of transformers \(attention_factors \(2, 4\)\)",
        ),
    ],
)
def test_unet_that_diffusers_cannot_be_is_refused_by_what_it_lacks(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_unet(config, {}, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "facts, changes, message",
    [
        (SDXL, {"addition_embed_type": "text_image"}, "addition_embed_type must be 'text_time', got 'text_image'"),
        (SDXL, {"projection_class_embeddings_input_dim": 48}, "a vector's width and 6 times .*, got 48 and 8"),
        (SDXL, {"addition_time_embed_dim": None}, "got 58 and None"),
        (SD1, {"cross_attention_dim": [12, 12, 12, 13]}, r"cross_attention_dim must be the same at all levels"),
        (SD1, {"class_embed_type": "timestep"}, "class_embed_type must be None, got 'timestep'"),
        (SD1, {"resnet_time_scale_shift": "ada_group"}, "must be 'default' or 'scale_shift', got 'ada_group'"),
        (SD1, {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type must be 'UNetMidBlock2DCrossAttn'"),
        (PLAIN, {"add_attention": False}, "add_attention must be True, got False"),
        (PLAIN, {"downsample_type": "resnet"}, "down_block_types must be .*'ResnetDownsampleBlock2D'"),
        (PLAIN, {"upsample_type": "resnet"}, "upsample_type must be 'conv', got 'resnet'"),
        (
            {**PLAIN, **FILM, "attn_norm_num_groups": 8},
            {"attn_norm_num_groups": None},
            "attn_norm_num_groups must be 8",
        ),
        (PLAIN, {"freq_shift": 1}, "freq_shift must be 0, got 1"),
    ],
)
def test_foreign_unet_is_refused_by_its_config(facts, changes, message, tmp_path):
    saved_there(facts, tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_unet(str(tmp_path))


def test_same_cross_attention_width_at_all_levels_may_be_a_list(tmp_path):
    theirs = saved_there(SD1, tmp_path)
    edited(tmp_path, cross_attention_dim=[12, 12, 12, 12])
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["cross_attention_dim"] == [12] * 4
    assert_equal_outputs(load_unet(str(tmp_path)), theirs)
