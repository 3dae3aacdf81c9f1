"""Laws of what a UNet may be besides the plain conditional one: other attention, time, resampling, conditions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from ldm.types import Condition
from ldm.unet.attention import PlainAttention, ProjectionForm
from ldm.unet.blocks import Resampling, TimedResidualBlock, TimeForm
from ldm.unet.model import UNet, UNetConfig
from tests.test_unet import SMALL, awake

PLAIN = dataclasses.replace(SMALL, context_width=None)
FORMS = {
    "plain": PLAIN,
    "churches": dataclasses.replace(PLAIN, time_form=TimeForm.SCALE_SHIFT, resampling=Resampling.RESIDUAL),
    "residual transformers": dataclasses.replace(SMALL, resampling=Resampling.RESIDUAL, attention_factors=(1, 2)),
    "beside": dataclasses.replace(SMALL, in_channels=9),
    "plain beside": dataclasses.replace(PLAIN, in_channels=7, resampling=Resampling.RESIDUAL),
    "linear": dataclasses.replace(SMALL, projections=ProjectionForm.LINEAR, transformer_depth=2),
    "sdxl": dataclasses.replace(
        SMALL,
        channel_mult=(1, 2, 4),
        attention_factors=(2, 4),
        transformer_depth=(0, 1, 2),
        projections=ProjectionForm.LINEAR,
        pooled_width=5,
        size_width=8,
    ),
}
each_form = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)


def given(config: UNetConfig, rows: int = 2, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Return a batch with every part of a condition that the config has a use for."""
    torch.manual_seed(1)
    num_beside = config.in_channels - config.out_channels
    has_tokens, has_pooled = config.context_width is not None, config.pooled_width is not None
    condition = Condition(
        states=torch.randn(rows, 5, config.context_width) if has_tokens else None,
        mask=torch.arange(5)[None] < torch.tensor([3, 1])[:rows, None] if has_tokens else None,
        pooled=torch.randn(rows, config.pooled_width) if has_pooled else None,
        sizes=torch.tensor([[512.0, 640, 0, 64, 512, 512], [300, 200, 10, 0, 256, 256]])[:rows] if has_pooled else None,
        spatial=torch.randn(rows, num_beside, side, side) if num_beside else None,
    )
    return torch.randn(rows, config.out_channels, side, side), torch.tensor([3.0, 700.5])[:rows], condition


@each_form
def test_fresh_network_predicts_zero_and_an_awake_one_the_latents_shape(config):
    torch.manual_seed(0)
    assert torch.equal(UNet(config)(*given(config)), torch.zeros(2, 4, 8, 8))
    prediction = awake(config)(*given(config))
    assert prediction.shape == (2, 4, 8, 8)
    assert prediction.std() > 0.1


@each_form
def test_fresh_blocks_leave_features_as_they_are(config):
    """Beside its shortcuts a fresh block is silent, so the features behind conv_in change only in number and size."""
    torch.manual_seed(0)
    model = UNet(config)
    features, time = torch.randn(1, config.widths[-1], 4, 4), torch.randn(1, 4 * config.base_channels)
    states = None if config.context_width is None else torch.randn(1, 3, config.context_width)
    assert torch.equal(model.mid_block(features, time, states, None), features)


@each_form
def test_gradient_reaches_every_parameter(config):
    model = awake(config)
    model(*given(config)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@each_form
def test_rows_of_a_batch_do_not_see_each_other(config):
    model, (noisy, timestep, condition) = awake(config), given(config)
    alone = model(noisy[1:], timestep[1:], condition.rows(1, 2))
    torch.testing.assert_close(model(noisy, timestep, condition)[1:], alone, atol=1e-5, rtol=1e-5)


@each_form
def test_checkpointed_activations_give_equal_outputs_and_gradients(config):
    plain = awake(config)
    frugal = UNet(dataclasses.replace(config, checkpoint_activations=True))
    frugal.load_state_dict(plain.state_dict())
    outputs = [model(*given(config)) for model in (plain, frugal)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for (name, ours), theirs in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


@each_form
def test_every_part_of_the_condition_has_influence_on_each_row(config):
    model, (noisy, timestep, condition) = awake(config), given(config)
    base = model(noisy, timestep, condition)
    for name in ("states", "pooled", "sizes", "spatial"):
        part = getattr(condition, name)
        if part is not None:
            other = model(noisy, timestep, dataclasses.replace(condition, **{name: part + 0.2}))
            assert (other - base).abs().amax(dim=(1, 2, 3)).min() > 1e-4, name


@each_form
def test_channels_last_stays_and_gives_the_same(config):
    model, (noisy, timestep, condition) = awake(config), given(config)
    expected = model(noisy, timestep, condition)
    spatial = condition.spatial
    last = dataclasses.replace(
        condition, spatial=None if spatial is None else spatial.to(memory_format=torch.channels_last)
    )
    model = model.to(memory_format=torch.channels_last)
    layouts = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm | TimedResidualBlock | PlainAttention):
            module.register_forward_hook(lambda _, __, output: layouts.append((output.stride(), output.dim())))
    result = model(noisy.to(memory_format=torch.channels_last), timestep, last)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert len(layouts) > 20
    assert all(stride[1] == 1 for stride, dim in layouts if dim == 4), "channels lie together in every feature map"


@each_form
def test_half_precision_network_predicts_in_its_precision_and_near_the_full_one(config):
    model, (noisy, timestep, condition) = awake(config), given(config)
    expected = model(noisy, timestep, condition)
    half = model.bfloat16()(noisy.bfloat16(), timestep, condition.to(noisy.device, torch.bfloat16))
    assert half.dtype is torch.bfloat16
    assert (half - expected).square().mean().sqrt() < 0.1 * expected.std()


def test_sizes_keep_their_digits_beside_a_half_precision_network():
    sizes = torch.tensor([[1023.0, 1024, 0, 1, 1022, 1021]])
    condition = Condition(pooled=torch.zeros(1, 2), sizes=sizes).to(torch.device("cpu"), torch.bfloat16)
    assert condition.pooled.dtype is torch.bfloat16
    assert torch.equal(condition.sizes, sizes)


def test_concatenation_inside_is_concatenation_outside():
    config = FORMS["beside"]
    model, (noisy, timestep, condition) = awake(config), given(config)
    outside = torch.cat([noisy, condition.spatial], dim=1)
    bare = dataclasses.replace(condition, spatial=None)
    assert torch.equal(model(noisy, timestep, condition), model(outside, timestep, bare))


def test_vector_and_sizes_without_use_are_not_heard():
    model, (noisy, timestep, condition) = awake(SMALL), given(SMALL)
    more = dataclasses.replace(condition, pooled=torch.randn(2, 3), sizes=torch.randn(2, 6))
    assert torch.equal(model(noisy, timestep, condition), model(noisy, timestep, more))


def test_projections_of_both_forms_compute_the_same():
    model = awake(SMALL)
    linear = UNet(dataclasses.replace(SMALL, projections=ProjectionForm.LINEAR))
    expected = linear.state_dict()
    weights = {name: tensor.reshape(expected[name].shape) for name, tensor in model.state_dict().items()}
    assert any(weights[name].shape != tensor.shape for name, tensor in model.state_dict().items())
    linear.load_state_dict(weights)
    assert torch.equal(model(*given(SMALL)), linear(*given(SMALL)))


def test_depth_of_each_level_is_one_number_where_all_agree():
    one = dataclasses.replace(SMALL, attention_factors=(1, 2), transformer_depth=2)
    assert torch.equal(awake(one)(*given(one)), awake(dataclasses.replace(one, transformer_depth=(2, 2)))(*given(one)))


def test_transformers_of_sdxl_are_as_deep_as_their_level_and_the_middle_as_the_last():
    model = UNet(FORMS["sdxl"])
    depths = [[len(each.transformer_blocks) for each in level.attentions] for level in model.down_blocks]
    assert depths == [[], [1], [2]]
    assert [len(each.transformer_blocks) for each in model.mid_block.attentions] == [2]
    assert [[len(each.transformer_blocks) for each in level.attentions] for level in model.up_blocks] == [
        [2, 2],
        [1, 1],
        [],
    ]


def test_plain_attention_is_the_weighted_mean_of_values_by_head():
    """Against the definition, in float64, one head and one position at a time."""
    torch.manual_seed(0)
    layer = PlainAttention(8, num_heads=2, norm_groups=4).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    features = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    normed = F.group_norm(features, 4, layer.group_norm.weight, layer.group_norm.bias, eps=1e-5)[0].flatten(1).T
    query, key, value = (each(normed) for each in (layer.to_q, layer.to_k, layer.to_v))  # n c
    gathered = torch.zeros_like(query)
    for head in (slice(0, 4), slice(4, 8)):
        for position in range(6):
            weights = [math.exp(query[position, head] @ key[other, head] / 2) for other in range(6)]
            gathered[position, head] = sum(
                weight / sum(weights) * value[other, head] for other, weight in enumerate(weights)
            )
    added = layer.to_out[0](gathered).T.reshape(1, 8, 2, 3)
    torch.testing.assert_close(layer(features, None, None), features + added)


def test_scale_and_shift_of_the_time_act_on_the_normalised_features():
    torch.manual_seed(0)
    block = TimedResidualBlock(8, 8, 6, norm_groups=4, time_form=TimeForm.SCALE_SHIFT, resize=None).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    features, time = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    scale, shift = (part[:, :, None, None] for part in block.time_emb_proj(time).split(8, dim=1))
    normed = block.norm2(block.conv1(F.silu(block.norm1(features))))
    expected = features + block.conv2(F.silu((1 + scale) * normed + shift))
    torch.testing.assert_close(block(features, time), expected)


def test_residual_resampling_of_a_constant_map_is_constant_and_of_means_and_copies():
    torch.manual_seed(0)
    config = FORMS["churches"]
    model, time = UNet(config), torch.randn(1, 4 * config.base_channels)
    features = torch.randn(1, 8, 4, 4)
    halved = model.down_blocks[0].downsamplers[0](features, time)
    torch.testing.assert_close(halved, features.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5)))
    coarse = torch.randn(1, 16, 4, 4)
    doubled = model.up_blocks[0].upsamplers[0](coarse, time)
    assert torch.equal(doubled, coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


@pytest.mark.parametrize(
    "config, wrong, message",
    [
        (SMALL, {"context_width": 0}, "context_width must be at least 1, got 0"),
        (SMALL, {"pooled_width": 0}, "pooled_width must be at least 1, got 0"),
        (SMALL, {"size_width": 7}, "size_width must be even .*got 7"),
        (SMALL, {"transformer_depth": (1,)}, r"one number for each level.*got \(1,\)"),
        (
            SMALL,
            {"transformer_depth": (1, 1)},
            r"0 where none attends.*got \(1, 1\) for attention at \(2,\) of \(1, 2\)",
        ),
        (SMALL, {"transformer_depth": (0, 0)}, r"at least 1 elsewhere and last, got \(0, 0\)"),
        (SMALL, {"transformer_depth": (0, -1)}, r"got \(0, -1\)"),
        (PLAIN, {"transformer_depth": 2}, "transformer_depth belongs to transformers, got 2"),
        (PLAIN, {"projections": ProjectionForm.LINEAR}, "projections belongs to transformers, got linear"),
    ],
)
def test_impossible_config_is_refused_with_its_numbers(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **wrong)


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("beside", {"spatial": None}, "must have 9 channels together, got 4 and 0"),
        ("beside", {"spatial": torch.zeros(2, 4, 8, 8)}, "must have 9 channels together, got 4 and 4"),
        (
            "beside",
            {"spatial": torch.zeros(2, 5, 4, 4)},
            r"a latent of sides \(8, 8\) must have its sides, got \(4, 4\)",
        ),
        ("plain", {"spatial": torch.zeros(2, 1, 8, 8)}, "must have 4 channels together, got 4 and 1"),
        ("plain", {"states": torch.zeros(2, 3, 6)}, "no cross-attention and no use for token states, got .* width 6"),
        ("plain", {"mask": torch.ones(2, 3, dtype=torch.bool)}, "no mask where it has no tokens, got one of 3"),
        ("sdxl", {"pooled": None}, "a pooled vector of width 5, got none"),
        ("sdxl", {"pooled": torch.zeros(2, 4)}, "a pooled vector of width 5, got one of width 4"),
        ("sdxl", {"sizes": None}, "6 sizes a row beside its pooled vector, got none"),
        ("sdxl", {"states": None}, "token states of width 6, got none"),
    ],
)
def test_condition_that_does_not_fit_is_refused_with_what_came(form, change, message):
    noisy, timestep, condition = given(FORMS[form])
    with pytest.raises(ValueError, match=message):
        UNet(FORMS[form])(noisy, timestep, dataclasses.replace(condition, **change))


def test_fields_added_later_leave_older_configs_as_they_were():
    said = SMALL.to_dict()
    assert {"projections", "time_form", "resampling", "pooled_width", "size_width"}.isdisjoint(said)


@each_form
def test_config_survives_yaml(config):
    assert UNetConfig.from_yaml(config.to_yaml()) == config
