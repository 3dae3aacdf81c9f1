"""UNets in the layout of CompVis: read as an independent network says, written back to the same tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from ldm.interop import compvis_unet_config
from ldm.interop.compvis_unet import WeightKind, load_unet, save_unet, to_compvis
from ldm.interop.diffusers_unet import unet_facts
from ldm.types import Condition
from ldm.unet import zoo
from ldm.unet.blocks import Resampling, TimeForm
from ldm.unet.model import UNet, UNetConfig
from tests.compvis_unet_network import CompVisUNet
from tests.test_interop_diffusers import drawn

SIZES = 6 * 256
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"context_dim": 12, "num_heads": 8, "channel_mult": (1, 2, 2), "attention_resolutions": (1, 2)},
    "sd2": {"context_dim": 12, "num_head_channels": 16, "use_linear_in_transformer": True, "in_channels": 9},
    "sdxl": {
        "context_dim": 12,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "channel_mult": (1, 2, 4),
        "attention_resolutions": (4, 2),
        "transformer_depth": (1, 1, 2),
        "adm_in_channels": 10 + SIZES,
    },
    "faces": {"num_head_channels": 16, "num_res_blocks": 2},
    "churches": {
        "num_heads": 4,
        "channel_mult": (1, 2, 2),
        "attention_resolutions": (1, 2),
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "inpainting": {"in_channels": 7, "out_channels": 3, "num_heads": 2, "resblock_updown": True},
    "semantic": {"attention_resolutions": (32, 16, 8), "num_heads": 4},
    "one level": {"channel_mult": (1,), "attention_resolutions": (1,), "num_heads": 4},
    "new order": {"num_heads": 4, "use_new_attention_order": True},
    "residual transformers": {"context_dim": 12, "num_heads": 2, "transformer_depth": 2, "resblock_updown": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def write(folder: Path, theirs: CompVisUNet, *, also: dict[str, torch.Tensor] | None = None) -> str:
    path = folder / "model.safetensors"
    safetensors.torch.save_file(
        {name: each.contiguous() for name, each in (theirs.state_dict | (also or {})).items()}, path
    )
    return str(path)


def assert_same(ours: UNet, theirs: CompVisUNet) -> None:
    torch.manual_seed(1)
    config, timestep = ours.config, torch.tensor([37.25, 999.0])
    noisy = torch.randn(2, config.in_channels, 8, 16)
    states = None if config.context_width is None else torch.randn(2, 5, config.context_width)
    vector, parts = None, {}
    if config.pooled_width is not None:
        parts = {
            "pooled": torch.randn(2, config.pooled_width),
            "sizes": torch.tensor([[1024.0, 768, 0, 5, 512, 512]] * 2),
        }
        half = torch.arange(128, dtype=torch.float64) / 128
        angles = parts["sizes"].double()[..., None] * 10000.0**-half
        vector = torch.cat([parts["pooled"].double(), torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1)], dim=1)
    with torch.no_grad():
        expected = theirs(noisy.double(), timestep, None if states is None else states.double(), vector).float()
        assert expected.std() > 0.1
        # The sinusoids of ours are float32, where an angle of 1000 is known to 6e-5.
        torch.testing.assert_close(
            ours(noisy, timestep, Condition(states=states, **parts)), expected, atol=2e-4, rtol=0
        )


@each_kind
def test_checkpoint_agrees_with_the_independent_network(kind, tmp_path):
    theirs = CompVisUNet(**KINDS[kind])
    assert_same(load_unet(write(tmp_path, theirs), theirs.yaml()), theirs)


@each_kind
def test_what_is_written_is_what_was_read(kind, tmp_path):
    theirs = CompVisUNet(**{**KINDS[kind], "use_new_attention_order": False})
    ours = load_unet(write(tmp_path, theirs), theirs.yaml())
    path = tmp_path / "again.safetensors"
    save_unet(ours.config, ours.state_dict(), str(path))
    again = safetensors.torch.load_file(path)
    assert again.keys() == theirs.state_dict.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict.items())
    loaded = load_unet(str(path), (tmp_path / "again.yaml").read_text())
    assert loaded.config == ours.config


@each_kind
def test_shapes_show_all_that_the_yaml_says_but_the_heads(kind):
    theirs = CompVisUNet(**KINDS[kind])
    said = compvis_unet_config.config_of_params(compvis_unet_config.params_of_yaml(theirs.yaml(), "x"), "x")
    heads = {"head_channels": said.head_channels, "num_heads": said.num_heads}
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.weights.items()}
    assert UNetConfig(**compvis_unet_config.fields_of_shapes(shapes, "x"), **heads) == said


@pytest.mark.parametrize("name", ["sd1", "sd1_inpainting", "sd2", "sd2_inpainting", "sdxl", "txt2img_1p4b"])
def test_released_networks_are_known_by_their_shapes_alone(name):
    config = getattr(zoo, name)()
    with torch.device("meta"):
        tensors = to_compvis(config, UNet(config).state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert compvis_unet_config.config_of_shapes(shapes, name) == config


@pytest.mark.parametrize(
    "name",
    ["lsun_churches_ldm_kl_8", "inpainting_big", "celebahq_ldm_vq_4", "bsr_sr", "semantic_synthesis256", "sdxl", "rdm"],
)
def test_yaml_says_all_of_a_network(name):
    config = getattr(zoo, name)()
    params = compvis_unet_config.params_of_yaml(compvis_unet_config.yaml_of(config), name)
    assert compvis_unet_config.config_of_params(params, name) == config


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_checkpoint_agrees_with_diffusers_own_conversion(kind, tmp_path):
    theirs = CompVisUNet(**KINDS[kind])
    ours = load_unet(write(tmp_path, theirs), theirs.yaml())
    facts = unet_facts(ours.config)
    converted = convert_ldm_unet_checkpoint(dict(theirs.state_dict), facts)
    assert converted.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, converted[name]), name


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_names_of_a_full_size_network_are_those_that_diffusers_converts(name):
    config = getattr(zoo, name)()
    with torch.device("meta"):
        ours = UNet(config).state_dict()
        single = {f"model.diffusion_model.{key}": tensor for key, tensor in to_compvis(config, ours).items()}
        theirs = diffusers.UNet2DConditionModel.from_config(unet_facts(config)).state_dict()
    converted = convert_ldm_unet_checkpoint(single, unet_facts(config))
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }


def test_averaged_weights_come_when_asked_for(tmp_path):
    theirs = CompVisUNet(**KINDS["faces"])
    path = write(tmp_path, theirs, also=theirs.averaged | {"first_stage_model.x": torch.zeros(1)})
    assert_same(load_unet(path, theirs.yaml()), theirs)
    half = dataclasses.replace(theirs, weights={name: 0.5 * tensor for name, tensor in theirs.weights.items()})
    assert_same(load_unet(path, theirs.yaml(), kind=WeightKind.AVERAGED), half)


def test_averaged_weights_are_written_beside_the_trained(tmp_path):
    config = UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=32,
        channel_mult=(1, 2),
        attention_factors=(2,),
        num_heads=2,
        context_width=None,
    )
    trained, averaged = drawn(UNet(config)).state_dict(), UNet(config).state_dict()
    path = str(tmp_path / "both.safetensors")
    save_unet(config, trained, path, averaged)
    text = (tmp_path / "both.yaml").read_text()
    for kind, weights in ((WeightKind.TRAINED, trained), (WeightKind.AVERAGED, averaged)):
        loaded = load_unet(path, text, kind=kind).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_stabilitys_later_yaml_names_the_network_otherwise(tmp_path):
    theirs = CompVisUNet(**KINDS["sdxl"])
    assert_same(load_unet(write(tmp_path, theirs), theirs.yaml(key="network_config")), theirs)


def test_bare_names_of_the_network_alone_are_read(tmp_path):
    theirs = CompVisUNet(**KINDS["faces"])
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: tensor.float() for name, tensor in theirs.weights.items()}, path)
    assert_same(load_unet(str(path), theirs.yaml()), theirs)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("sd1", {"dims": 3}, "unet_config.dims must be 2, got 3"),
        ("sd1", {"num_classes": 1000}, "unet_config.num_classes must be None or 'sequential', got 1000"),
        ("sd1", {"conv_resample": False}, "unet_config.conv_resample must be True, got False"),
        ("sd1", {"context_dim": "absent"}, "context_dim must be one width of tokens, got None"),
        ("sd1", {"model_channels": "absent"}, "it lacks model_channels"),
        ("sd1", {"num_heads": "absent"}, "must have num_heads or num_head_channels"),
        ("sd1", {"num_res_blocks": [1, 2, 1]}, r"num_res_blocks must be one number, got \[1, 2, 1\]"),
        ("sd1", {"transformer_depth": [1, 1]}, "transformer_depth must be one number for each of 3 levels"),
        ("sd1", {"num_res_blocks": 2}, "missing: input_blocks.1.*misshapen|missing: input_blocks"),
        ("sd1", {"context_dim": 13}, r"attn2.to_k.weight \(32, 12\), expected \(32, 13\)"),
        ("faces", {"use_scale_shift_norm": True}, r"emb_layers.1.bias \(32,\), expected \(64,\)"),
        (
            "faces",
            {"resblock_updown": True},
            "missing: input_blocks.3.0.emb_layers.1.bias.*unexpected: input_blocks.3.0.op",
        ),
        ("sdxl", {"adm_in_channels": 1000}, "6 times 256 sinusoids of sizes.*got 1000 in all"),
    ],
)
def test_yaml_of_another_network_is_refused_naming_what_differs(kind, changes, message, tmp_path):
    theirs = CompVisUNet(**KINDS[kind])
    path = write(tmp_path, theirs)
    with pytest.raises(ValueError, match=message) as refusal:
        load_unet(path, theirs.yaml(**changes))
    assert path in str(refusal.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out.2.weight": None}, "1 missing: out.2.weight"),
        ({"stranger": torch.zeros(1)}, "1 unexpected: stranger"),
        ({"middle_block.1.qkv.weight": torch.zeros(3, 64, 1)}, r"1 misshapen: middle_block.1.qkv.weight \(3, 64, 1\)"),
        ({"input_blocks.0.0.weight": None}, "holds no UNet in the layout of CompVis"),
    ],
)
def test_partial_file_is_refused_with_its_own_names(change, message, tmp_path):
    theirs = CompVisUNet(**KINDS["faces"])
    weights = {name: tensor.float() for name, tensor in theirs.weights.items()} | change
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_unet(str(path), theirs.yaml())
    assert str(path) in str(refusal.value)


def test_tensors_that_leave_something_open_are_refused_saying_what(tmp_path):
    path = write(tmp_path, CompVisUNet(**KINDS["faces"]))
    with pytest.raises(ValueError, match="don't show how many heads attend: give the YAML"):
        load_unet(path)
    with pytest.raises(ValueError, match="tensors show no UNet: 'output_blocks.0.0.in_layers.0.weight'"):
        compvis_unet_config.config_of_shapes({"input_blocks.0.0.weight": (32, 4, 3, 3)}, "x")
    with pytest.raises(ValueError, match="x: what lies beside it is no YAML"):
        compvis_unet_config.params_of_yaml("a: {", "x")
    with pytest.raises(ValueError, match="holds no averaged weights of the network"):
        load_unet(path, CompVisUNet(**KINDS["faces"]).yaml(), kind=WeightKind.AVERAGED)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm_groups": 16}, "norm_groups must be 32 in the layout of CompVis, got 16"),
        ({"pooled_width": 3, "size_width": 8}, "size_width must be 256 in the layout of CompVis, got 8"),
    ],
)
def test_network_that_the_layout_cannot_be_is_refused(change, message, tmp_path):
    config = dataclasses.replace(zoo.emoji(), **{"norm_groups": 32} | change)
    with pytest.raises(ValueError, match=message):
        save_unet(config, {}, str(tmp_path / "model.safetensors"))
    assert list(tmp_path.iterdir()) == []


_FACES = {"in_channels": 3, "out_channels": 3, "num_res_blocks": 2, "channel_mult": [1, 2, 3, 4]}
RELEASED: dict[str, dict[str, Any]] = {
    "celebahq_ldm_vq_4": {
        **_FACES,
        "model_channels": 224,
        "attention_resolutions": [8, 4, 2],
        "num_head_channels": 32,
    },
    "lsun_churches_ldm_kl_8": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 192,
        "attention_resolutions": [1, 2, 4, 8],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 2, 4, 4],
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "semantic_synthesis256": {
        **_FACES,
        "in_channels": 6,
        "model_channels": 128,
        "attention_resolutions": [32, 16, 8],
        "channel_mult": [1, 4, 8],
        "num_heads": 8,
    },
    "bsr_sr": {
        **_FACES,
        "in_channels": 6,
        "model_channels": 160,
        "attention_resolutions": [16, 8],
        "channel_mult": [1, 2, 2, 4],
        "num_head_channels": 32,
    },
    "inpainting_big": {
        **_FACES,
        "in_channels": 7,
        "model_channels": 256,
        "attention_resolutions": [8, 4, 2],
        "num_heads": 8,
        "resblock_updown": True,
    },
    "layout2img_openimages256": {
        **_FACES,
        "model_channels": 128,
        "attention_resolutions": [8, 4, 2],
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "transformer_depth": 3,
        "context_dim": 512,
    },
    "sdxl": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4],
        "num_head_channels": 64,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "spatial_transformer_attn_type": "softmax-xformers",
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_parameters_mean_the_named_network(name):
    assert compvis_unet_config.config_of_params(RELEASED[name], name) == getattr(zoo, name)()


def test_forms_of_the_yaml_are_those_of_ours():
    theirs = CompVisUNet(**KINDS["churches"])
    config = compvis_unet_config.config_of_params(compvis_unet_config.params_of_yaml(theirs.yaml(), "x"), "x")
    assert (config.time_form, config.resampling) == (TimeForm.SCALE_SHIFT, Resampling.RESIDUAL)
