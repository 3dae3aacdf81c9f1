"""Laws of the conditional UNet."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm.types import Condition
from ldm.unet.model import UNet, UNetConfig
from ldm.unet.zoo import emoji, sd1

SMALL = UNetConfig(
    in_channels=4,
    out_channels=4,
    base_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    head_channels=4,
    context_width=6,
    norm_groups=4,
)


def awake(config: UNetConfig = SMALL) -> UNet:
    """Return a UNet whose every weight is drawn, also those that start as zero."""
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    return model


def inputs(config: UNetConfig = SMALL, sides: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    torch.manual_seed(1)
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    condition = Condition(states=torch.randn(2, 5, config.context_width), mask=mask)
    return torch.randn(2, config.in_channels, *sides), torch.tensor([3.0, 700.5]), condition


def test_sd1_has_the_exact_parameter_count():
    with torch.device("meta"):
        model = UNet(sd1())
    assert sum(parameter.numel() for parameter in model.parameters()) == 859_520_964


def test_emoji_unet_is_of_laptop_size():
    with torch.device("meta"):
        model = UNet(emoji())
        prediction = model(
            torch.empty(2, 4, 16, 16), torch.empty(2), Condition(states=torch.empty(2, 24, 384), mask=None)
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_583_396
    assert prediction.shape == (2, 4, 16, 16)


def test_fresh_unet_predicts_exactly_zero():
    torch.manual_seed(0)
    assert torch.equal(UNet(SMALL)(*inputs()), torch.zeros(2, 4, 8, 8))


def test_fresh_unet_learns_in_all_its_output_layers_after_one_step():
    torch.manual_seed(0)
    model = UNet(SMALL)
    with torch.no_grad():
        model.conv_out.weight.normal_()
    model(*inputs()).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad.abs().sum() > 0}
    for zeroed in (
        "down_blocks.0.resnets.0.conv2",
        "up_blocks.0.attentions.0.proj_out",
        "mid_block.attentions.0.proj_out",
    ):
        assert {f"{zeroed}.weight", f"{zeroed}.bias"} <= reached


def test_gradient_reaches_every_parameter():
    model = awake()
    model(*inputs()).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("sides", [(8, 8), (2, 6), (10, 4)])
def test_prediction_has_the_latent_shape_for_any_sides(sides):
    assert awake()(*inputs(sides=sides)).shape == (2, 4, *sides)


def test_concatenated_condition_widens_only_the_input():
    config = dataclasses.replace(SMALL, in_channels=7, out_channels=3)
    assert awake(config)(*inputs(config)).shape == (2, 3, 8, 8)


def test_masked_token_has_no_influence():
    model, (noisy, timestep, condition) = awake(), inputs()
    changed = torch.where(condition.mask[..., None], condition.states, condition.states + 100.0)
    assert torch.equal(
        model(noisy, timestep, condition), model(noisy, timestep, Condition(states=changed, mask=condition.mask))
    )


def test_masked_tokens_may_as_well_be_absent():
    model, (noisy, timestep, condition) = awake(), inputs()
    masked = model(noisy, timestep, condition)
    for row, length in enumerate([3, 1]):
        alone = model(
            noisy[row : row + 1], timestep[row : row + 1], Condition(states=condition.states[row : row + 1, :length])
        )
        torch.testing.assert_close(masked[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_full_mask_is_no_mask():
    model, (noisy, timestep, condition) = awake(), inputs()
    full = Condition(states=condition.states, mask=torch.ones(2, 5, dtype=torch.bool))
    bare = Condition(states=condition.states)
    torch.testing.assert_close(model(noisy, timestep, full), model(noisy, timestep, bare), atol=1e-5, rtol=1e-5)


def test_real_tokens_time_and_noise_each_have_influence():
    model, (noisy, timestep, condition) = awake(), inputs()
    base = model(noisy, timestep, condition)
    others = [
        model(noisy + 0.1, timestep, condition),
        model(noisy, timestep + 0.5, condition),
        model(noisy, timestep, dataclasses.replace(condition, states=condition.states + 0.1)),
    ]
    assert all((other - base).abs().amax(dim=(1, 2, 3)).min() > 1e-4 for other in others)


def test_order_of_tokens_does_not_matter():
    model, (noisy, timestep, condition) = awake(), inputs()
    reverse = Condition(states=condition.states.flip(1), mask=condition.mask.flip(1))
    torch.testing.assert_close(model(noisy, timestep, condition), model(noisy, timestep, reverse), atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_do_not_see_each_other():
    model, (noisy, timestep, condition) = awake(), inputs()
    alone = model(noisy[1:], timestep[1:], condition.rows(1, 2))
    torch.testing.assert_close(model(noisy, timestep, condition)[1:], alone, atol=1e-5, rtol=1e-5)


def test_checkpointed_activations_give_equal_outputs_and_gradients():
    plain = awake()
    frugal = UNet(dataclasses.replace(SMALL, checkpoint_activations=True))
    frugal.load_state_dict(plain.state_dict())
    outputs = [model(*inputs()) for model in (plain, frugal)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for (name, ours), theirs in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_checkpointed_activations_keep_fewer_tensors_for_the_backward_pass():
    def num_bytes_kept(model: UNet) -> int:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            model(*inputs())
        return sum(tensor.numel() for tensor in kept.values())

    plain = awake()
    frugal = awake(dataclasses.replace(SMALL, checkpoint_activations=True))
    weights = sum(parameter.numel() for parameter in plain.parameters())
    assert num_bytes_kept(frugal) < weights + 0.5 * (num_bytes_kept(plain) - weights)


def test_heads_of_constant_width_and_of_constant_number_agree_where_they_mean_the_same():
    config = dataclasses.replace(SMALL, channel_mult=(1, 1))
    by_number = dataclasses.replace(config, head_channels=None, num_heads=2)
    assert config.head_counts == by_number.head_counts == (2, 2)
    assert torch.equal(awake(config)(*inputs()), awake(by_number)(*inputs()))


def test_head_counts_follow_the_width_of_each_level():
    assert dataclasses.replace(SMALL, channel_mult=(1, 2, 4)).head_counts == (2, 4, 8)
    assert dataclasses.replace(SMALL, head_channels=None, num_heads=4).head_counts == (4, 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"norm_groups": 3}, "norm_groups must divide every level's width, got 3 and 8"),
        ({"head_channels": 5}, "head_channels must divide every level's width, got 5 and 8"),
        ({"head_channels": None, "num_heads": 3}, "num_heads must divide every level's width, got 3 and 8"),
        ({"num_heads": 2}, "exactly one of head_channels and num_heads, got 4, 2"),
        ({"head_channels": None}, "exactly one of head_channels and num_heads, got None, None"),
        ({"attention_factors": (2, 4)}, r"attention_factors must be among the levels' \(1, 2\), got \[4\] besides"),
        ({"channel_mult": (2, 4)}, "channel_mult must start with 1"),
        ({"base_channels": 9, "norm_groups": 3, "head_channels": 3}, "base_channels must be even"),
        ({"transformer_depth": 0}, "transformer_depth must be at least 1, got 0"),
    ],
)
def test_impossible_config_is_refused_with_its_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize(
    "noisy, condition, message",
    [
        (torch.zeros(1, 4, 8, 7), Condition(states=torch.zeros(1, 2, 6)), r"multiples of 2, got \(8, 7\)"),
        (torch.zeros(1, 5, 8, 8), Condition(states=torch.zeros(1, 2, 6)), "must have 4 channels together, got 5 and 0"),
        (torch.zeros(1, 4, 8, 8), Condition(states=torch.zeros(1, 2, 7)), "condition width must be 6, got 7"),
        (torch.zeros(1, 4, 8, 8), Condition(), "token states of width 6, got none"),
    ],
)
def test_unfit_inputs_are_refused_with_what_came(noisy, condition, message):
    with pytest.raises(ValueError, match=message):
        UNet(SMALL)(noisy, torch.zeros(1), condition)


def test_row_without_any_real_token_stays_finite_and_hears_none():
    model, (noisy, timestep, condition) = awake(), inputs()
    silent = Condition(states=condition.states, mask=torch.zeros(2, 5, dtype=torch.bool))
    other = Condition(states=condition.states + 1.0, mask=silent.mask)
    prediction = model(noisy, timestep, silent)
    assert prediction.isfinite().all()
    assert torch.equal(prediction, model(noisy, timestep, other))
