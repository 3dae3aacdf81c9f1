"""Our networks against diffusers': the same files, the same outputs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch

from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.autoencoder.regularizer import Regularizer
from ldm.autoencoder.zoo import kl_f8
from ldm.interop.diffusers import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_autoencoder,
    load_unet,
    save_autoencoder,
    save_unet,
    weights_digest,
)
from ldm.types import Condition
from ldm.unet.model import UNet, UNetConfig

AUTOENCODERS = [
    AutoencoderConfig(
        latent_channels=2, base_channels=8, channel_mult=(1, 1, 2), norm_groups=4, attention_factors=(2, 4)
    ),
    AutoencoderConfig(latent_channels=4, base_channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4),
    AutoencoderConfig(
        latent_channels=3, base_channels=16, channel_mult=(1, 3), num_res_blocks=2, norm_groups=8, mid_attention=False
    ),
]
_SHAPE = {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4}
VQ_AUTOENCODERS = [
    AutoencoderConfig(latent_channels=3, regularizer=Regularizer.VQ, num_codes=32, **_SHAPE),
    AutoencoderConfig(
        latent_channels=2,
        regularizer=Regularizer.VQ,
        num_codes=16,
        z_channels=5,
        attention_factors=(2,),
        mid_attention=False,
        **_SHAPE,
    ),
]
COMMON = {"in_channels": 4, "out_channels": 4, "base_channels": 16, "context_width": 12, "norm_groups": 8}
UNETS = [
    UNetConfig(**COMMON, channel_mult=(1, 2, 3), num_res_blocks=2, attention_factors=(2, 4), head_channels=8),
    UNetConfig(**COMMON, channel_mult=(1, 2, 2), num_res_blocks=1, attention_factors=(1, 2), num_heads=4),
    UNetConfig(**COMMON, channel_mult=(1, 2), attention_factors=(), num_heads=2, transformer_depth=2),
    UNetConfig(**COMMON | {"in_channels": 9}, channel_mult=(1, 1), attention_factors=(1, 2), head_channels=4),
]


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with every weight drawn, also those that start as zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.5))
    return model.eval()


def oracle_of(kind: type, folder: Path) -> torch.nn.Module:
    """Return diffusers' model of a folder that we wrote, which must fit it to the last key."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def edited(folder: Path, **changes: object) -> None:
    facts = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(facts | changes))


def assert_equal_unets(ours: UNet, theirs: torch.nn.Module) -> None:
    torch.manual_seed(1)
    noisy, timestep = torch.randn(3, ours.config.in_channels, 8, 16), torch.tensor([0.0, 37.25, 999.0])
    states, mask = (
        torch.randn(3, 6, ours.config.context_width),
        torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None],
    )
    with torch.no_grad():
        for given in (None, mask):
            expected = theirs(noisy, timestep, states, encoder_attention_mask=given).sample
            assert expected.std() > 0.01
            torch.testing.assert_close(
                ours(noisy, timestep, Condition(states=states, mask=given)), expected, atol=1e-5, rtol=1e-5
            )


def assert_equal_autoencoders(ours: Autoencoder, theirs: torch.nn.Module, tolerance: float = 1e-5) -> None:
    torch.manual_seed(1)
    image = torch.randn(2, 3, 16, 32)
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        torch.testing.assert_close(ours.encode(image), posterior.parameters, atol=tolerance, rtol=tolerance)
        expected = theirs.decode(posterior.mean).sample
        assert expected.std() > 0.01
        torch.testing.assert_close(ours.decode(posterior.mean), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("config", AUTOENCODERS)
def test_exported_autoencoder_is_the_same_in_diffusers(config, tmp_path):
    ours = drawn(Autoencoder(config))
    save_autoencoder(ours, str(tmp_path))
    assert_equal_autoencoders(ours, oracle_of(diffusers.AutoencoderKL, tmp_path))


def with_used_codes(model: torch.nn.Module) -> torch.nn.Module:
    """Return a drawn VQ model of either house, its codes taken from latents, so that many of them are nearest."""
    torch.manual_seed(2)
    book = drawn(model).quantize.embedding.weight
    with torch.no_grad():
        features = model.quant_conv(model.encoder(torch.randn(1, 3, 16, 32)))
        positions = features.movedim(1, -1).flatten(0, 2)
        book.copy_(positions[torch.randperm(len(positions))[: len(book)]])
    return model


def assert_equal_quantizing_autoencoders(ours: Autoencoder, theirs: torch.nn.Module) -> None:
    torch.manual_seed(1)
    image = torch.randn(2, 3, 16, 32)
    with torch.no_grad():
        latent = theirs.encode(image).latents
        torch.testing.assert_close(ours.encode(image), latent, atol=1e-5, rtol=1e-5)
        expected, plain = theirs.decode(latent).sample, theirs.decode(latent, force_not_quantize=True).sample
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(ours.decode(latent), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(latent, is_quantized=True), plain, atol=1e-5, rtol=1e-5)
        codes = theirs.quantize(latent)[2][2].reshape(2, *latent.shape[-2:])
        assert torch.equal(ours.quantize(latent).codes, codes)
        assert len(codes.unique()) > 8


@pytest.mark.parametrize("config", VQ_AUTOENCODERS)
def test_exported_vq_autoencoder_is_the_same_in_diffusers(config, tmp_path):
    ours = with_used_codes(Autoencoder(config))
    save_autoencoder(ours, str(tmp_path))
    assert_equal_quantizing_autoencoders(ours, oracle_of(diffusers.VQModel, tmp_path))


@pytest.mark.parametrize("code_channels", [None, 2])
def test_vq_autoencoder_that_diffusers_saved_loads_and_agrees(code_channels, tmp_path):
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    theirs = diffusers.VQModel(
        block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=24, vq_embed_dim=code_channels, **levels
    )
    with_used_codes(theirs).save_pretrained(tmp_path)
    ours = load_autoencoder(str(tmp_path))
    assert (ours.config.latent_channels, ours.config.num_codes) == (code_channels or 3, 24)
    assert_equal_quantizing_autoencoders(ours, theirs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "VQDecoder"}, "_class_name must be 'AutoencoderKL' or 'VQModel', got 'VQDecoder'"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook must be False, got True"),
        ({"norm_type": "spatial"}, "norm_type must be 'group', got 'spatial'"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types must be"),
        ({"num_vq_embeddings": 99}, r"misshapen: quantize.embedding.weight \(32, 3\), expected \(99, 3\)"),
    ],
)
def test_foreign_vq_autoencoder_is_refused_by_its_config(changes, message, tmp_path):
    save_autoencoder(Autoencoder(VQ_AUTOENCODERS[0]), str(tmp_path))
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize("config", UNETS)
def test_exported_unet_is_the_same_in_diffusers(config, tmp_path):
    ours = drawn(UNet(config))
    save_unet(config, ours.state_dict(), str(tmp_path))
    assert_equal_unets(ours, oracle_of(diffusers.UNet2DConditionModel, tmp_path))


def test_autoencoder_that_diffusers_saved_loads_and_agrees(tmp_path):
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    theirs = diffusers.AutoencoderKL(block_out_channels=(8, 16, 32), layers_per_block=2, norm_num_groups=4, **levels)
    drawn(theirs).save_pretrained(tmp_path)
    assert_equal_autoencoders(load_autoencoder(str(tmp_path)), theirs)


def test_full_size_stable_diffusion_autoencoder_agrees_both_ways(tmp_path):
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    theirs = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(str(tmp_path / "theirs")).eval()
    assert ours.config == kl_f8()
    assert_equal_autoencoders(ours, theirs, tolerance=1e-4)
    save_autoencoder(ours, str(tmp_path / "ours"))
    assert_equal_autoencoders(ours, oracle_of(diffusers.AutoencoderKL, tmp_path / "ours"), tolerance=1e-4)


@pytest.mark.parametrize(
    "heads, expected", [(2, {"num_heads": 2}), ((2, 4), {"head_channels": 8}), ((4, 4), {"num_heads": 4})]
)
def test_unet_that_diffusers_saved_loads_and_agrees(heads, expected, tmp_path):
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=heads,
        cross_attention_dim=12,
        norm_num_groups=8,
        transformer_layers_per_block=(2, 2),
    )
    drawn(theirs).save_pretrained(tmp_path)
    ours = load_unet(str(tmp_path))
    assert {name: getattr(ours.config, name) for name in expected} == expected
    assert_equal_unets(ours, theirs)


def test_autoencoder_with_attention_names_of_old_files_loads_and_agrees(tmp_path):
    ours = drawn(Autoencoder(AUTOENCODERS[0]))
    save_autoencoder(ours, str(tmp_path))
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in ours.state_dict().items():
        for new_part, old_part in new_to_old.items():
            name = name.replace(new_part, old_part)
        old[name] = tensor
    assert old.keys() != ours.state_dict().keys()
    safetensors.torch.save_file(old, tmp_path / WEIGHTS_NAME)
    assert_equal_autoencoders(load_autoencoder(str(tmp_path)), oracle_of(diffusers.AutoencoderKL, tmp_path))


@pytest.mark.parametrize("config", AUTOENCODERS + VQ_AUTOENCODERS)
def test_autoencoder_round_trip_is_exact(config, tmp_path):
    model = drawn(Autoencoder(config))
    save_autoencoder(model, str(tmp_path))
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.config == config
    assert weights_digest(loaded.state_dict(), loaded.config) == weights_digest(model.state_dict(), config)


@pytest.mark.parametrize("config", UNETS)
def test_unet_round_trip_is_exact(config, tmp_path):
    model = drawn(UNet(config))
    save_unet(config, model.state_dict(), str(tmp_path))
    loaded = load_unet(str(tmp_path))
    assert loaded.config == config
    assert weights_digest(loaded.state_dict(), loaded.config) == weights_digest(model.state_dict(), config)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = drawn(UNet(UNETS[1]))
    weights = model.state_dict()
    save_unet(UNETS[1], weights, str(tmp_path / "once"))
    save_unet(UNETS[1], dict(reversed(weights.items())), str(tmp_path / "twice"))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_half_precision_weights_load_as_single_precision(tmp_path):
    model = drawn(UNet(UNETS[1]))
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_unet(UNETS[1], half, str(tmp_path))
    for name, tensor in load_unet(str(tmp_path)).state_dict().items():
        assert torch.equal(tensor, half[name].float())


def test_digest_depends_on_every_weight_and_on_the_config_only():
    config = UNETS[0]
    weights = drawn(UNet(config)).state_dict()
    digest = weights_digest(weights, config)
    assert weights_digest(dict(reversed(weights.items())), config) == digest
    for name in ("conv_in.weight", "up_blocks.2.resnets.0.conv1.bias", "time_embedding.linear_1.weight"):
        changed = weights | {name: weights[name].clone()}
        changed[name].view(-1)[0] = torch.nextafter(changed[name].view(-1)[0], torch.tensor(1e9))
        assert weights_digest(changed, config) != digest
    assert weights_digest(weights | {"conv_in.bias": weights["conv_in.bias"].half()}, config) != digest
    assert weights_digest(weights, UNETS[1]) != digest


def test_digest_does_not_depend_on_how_activations_are_kept():
    frugal = dataclasses.replace(UNETS[0], checkpoint_activations=True)
    weights = drawn(UNet(frugal)).state_dict()
    assert weights_digest(weights, frugal) == weights_digest(weights, UNETS[0])


def test_wrong_weights_are_refused_with_the_names_listed(tmp_path):
    model = drawn(Autoencoder(AUTOENCODERS[0]))
    save_autoencoder(model, str(tmp_path))
    weights = model.state_dict() | {"stranger": torch.zeros(1), "encoder.conv_in.weight": torch.zeros(1, 3, 3, 3)}
    del weights["decoder.conv_in.bias"], weights["decoder.conv_in.weight"]
    safetensors.torch.save_file(weights, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="does not hold the weights of this Autoencoder") as refusal:
        load_autoencoder(str(tmp_path))
    assert "2 missing: decoder.conv_in.bias, decoder.conv_in.weight; 1 unexpected: stranger" in str(refusal.value)
    assert "1 misshapen: encoder.conv_in.weight (1, 3, 3, 3), expected (8, 3, 3, 3)" in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_weights_of_another_unet_are_not_saved(tmp_path):
    weights = drawn(UNet(UNETS[0])).state_dict()
    with pytest.raises(ValueError, match=r"missing: .*unexpected: .*misshapen: "):
        save_unet(UNETS[1], weights, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_truncated_weights_file_is_refused(tmp_path):
    save_autoencoder(drawn(Autoencoder(AUTOENCODERS[0])), str(tmp_path))
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_autoencoder(str(tmp_path))


def test_folder_without_weights_is_refused(tmp_path):
    save_autoencoder(drawn(Autoencoder(AUTOENCODERS[0])), str(tmp_path))
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "UNet3D"}, "_class_name must be 'UNet2DConditionModel' or 'UNet2DModel', got 'UNet3D'"),
        ({"use_linear_projection": True}, r"misshapen: .*proj_in.weight \(16, 16, 1, 1\), expected \(16, 16\)"),
        ({"attention_head_dim": [1, 4, 4]}, "equally many or equally wide"),
        ({"transformer_layers_per_block": [1, [1, 2], 1]}, "as deep on the way up as on the way down"),
        ({"transformer_layers_per_block": [1, 2, 1]}, "missing: .*transformer_blocks.1"),
        ({"block_out_channels": [16, 24, 32]}, "multiples of the first"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types must be"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "down_block_types must be"),
        ({"norm_num_groups": 7}, "norm_groups must divide"),
    ],
)
def test_foreign_architecture_is_refused_by_its_config(changes, message, tmp_path):
    save_unet(UNETS[1], UNet(UNETS[1]).state_dict(), str(tmp_path))
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_unet(str(tmp_path))


def test_config_without_a_needed_fact_is_refused_by_its_name(tmp_path):
    save_unet(UNETS[1], UNet(UNETS[1]).state_dict(), str(tmp_path))
    facts = json.loads((tmp_path / CONFIG_NAME).read_text())
    del facts["cross_attention_dim"], facts["layers_per_block"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="lacks layers_per_block, cross_attention_dim"):
        load_unet(str(tmp_path))


def test_networks_are_stored_on_any_file_system():
    model = drawn(UNet(UNETS[1]))
    save_unet(UNETS[1], model.state_dict(), "memory://models/unet")
    loaded = load_unet("memory://models/unet")
    assert weights_digest(loaded.state_dict(), loaded.config) == weights_digest(model.state_dict(), UNETS[1])
