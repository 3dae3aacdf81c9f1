"""Laws of classifier-free guidance."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.samplers.guidance import conditional_denoiser, guided_denoiser, joined
from ldm.types import Condition

SCHEDULE = Schedule(ScheduleConfig())


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted_network(calls: list[int]):
    def network(noisy: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        calls.append(noisy.shape[0])
        mask = torch.ones(condition.states.shape[:2]) if condition.mask is None else condition.mask
        summed = (condition.states * mask[:, :, None]).sum(dim=(1, 2)).reshape(-1, 1, 1, 1)
        return torch.tanh(noisy + summed) * (1 + timestep.reshape(-1, 1, 1, 1) / 1000)

    return network


def conditions(null_rows: int = 3, null_length: int = 6) -> tuple[Condition, Condition]:
    return Condition(states=randn(3, 6, 2)), Condition(states=randn(null_rows, null_length, 2, seed=1))


TIMES = torch.tensor([30.0, 400.0, 990.0], dtype=torch.float64)


def test_guidance_at_scale_one_is_the_conditional_prediction_with_one_batch():
    calls: list[int] = []
    network = weighted_network(calls)
    condition, null = conditions()
    noisy = randn(3, 4, 2, 2)
    plain = conditional_denoiser(network, SCHEDULE, Prediction.NOISE, condition)(noisy, TIMES)
    for scale in (1.0, torch.ones(3)):
        guided = guided_denoiser(network, SCHEDULE, Prediction.NOISE, condition, null, scale)(noisy, TIMES)
        torch.testing.assert_close(guided, plain, rtol=0, atol=0)
    assert calls == [3, 3, 3]


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("null_rows, null_length", [(3, 6), (1, 6), (3, 2), (1, 9)])
def test_guidance_at_another_scale_equals_the_formula_on_clean_latents(prediction, null_rows, null_length):
    calls: list[int] = []
    network = weighted_network(calls)
    condition, null = conditions(null_rows, null_length)
    noisy = randn(3, 4, 2, 2)
    whole_null = Condition(states=null.states.expand(3, -1, -1))
    conditional = conditional_denoiser(network, SCHEDULE, prediction, condition)(noisy, TIMES)
    unconditional = conditional_denoiser(network, SCHEDULE, prediction, whole_null)(noisy, TIMES)
    guided = guided_denoiser(network, SCHEDULE, prediction, condition, null, 7.5)(noisy, TIMES)
    # Guiding outputs equals guiding clean latents, whatever the network predicts.
    expected = unconditional + 7.5 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-9)
    assert calls == [3, 3, 6]


def test_guidance_scale_of_each_row_is_its_own():
    network = weighted_network([])
    condition, null = conditions()
    noisy = randn(3, 4, 2, 2)
    scales = torch.tensor([1.0, 2.0, 7.5])
    together = guided_denoiser(network, SCHEDULE, Prediction.VELOCITY, condition, null, scales)(noisy, TIMES)
    for row, scale in enumerate(scales.tolist()):
        alone = guided_denoiser(network, SCHEDULE, Prediction.VELOCITY, condition, null, scale)(noisy, TIMES)
        torch.testing.assert_close(together[row], alone[row], rtol=1e-12, atol=1e-12)


def test_guidance_keeps_the_masks_of_both_conditions():
    seen: list[Condition] = []

    def network(noisy: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen.append(condition)
        return noisy

    mask = torch.tensor([[True, True, True], [True, False, False]])
    condition = Condition(states=randn(2, 3, 2), mask=mask)
    null = Condition(states=randn(1, 1, 2))
    guided_denoiser(network, SCHEDULE, Prediction.NOISE, condition, null, 2.0)(randn(2, 1, 1, 1), TIMES[:2])
    null_mask = torch.tensor([[True, False, False], [True, False, False]])
    assert torch.equal(seen[0].mask, torch.cat([mask, null_mask]))
    assert torch.equal(seen[0].states[2:, 1:], torch.zeros(2, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("null_rows", [1, 2])
def test_guidance_keeps_the_pooled_text_of_both_conditions(null_rows):
    states, pooled, null_pooled = randn(2, 3, 2), randn(2, 5, seed=1), randn(null_rows, 5, seed=2)
    for mask in (None, torch.ones(2, 3, dtype=torch.bool)):
        condition = Condition(states=states, mask=mask, pooled=pooled)
        both = joined(condition, Condition(states=states[:null_rows], pooled=null_pooled))
        assert torch.equal(both.pooled, torch.cat([pooled, null_pooled.expand(2, -1)]))


@pytest.mark.parametrize(
    "null_pooled, message",
    [
        (None, "in both .* or in neither"),
        (torch.zeros(1, 4), r"1 or 2 rows of shape \(5,\), got 1 rows of shape \(4,\)"),
        (torch.zeros(3, 5), r"1 or 2 rows of shape \(5,\), got 3 rows of shape \(5,\)"),
    ],
)
def test_guidance_with_pooled_text_that_does_not_match_is_refused(null_pooled, message):
    states = torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match=message):
        joined(Condition(states=states, pooled=torch.zeros(2, 5)), Condition(states=states, pooled=null_pooled))


def test_condition_rows_copies_and_rolls_keep_every_part_of_a_row_together():
    mask = torch.arange(12).reshape(4, 3) % 2 == 0
    whole = Condition(states=randn(4, 3, 2), mask=mask, pooled=randn(4, 5, seed=1))
    order = [2, 3, 0, 1]
    rolled = whole.rolled(2)
    assert torch.equal(rolled.states, whole.states[order])
    assert torch.equal(rolled.mask, mask[order])
    assert torch.equal(rolled.pooled, whole.pooled[order])
    assert torch.equal(rolled.rows(0, 2).pooled, whole.rows(2, 4).pooled)
    placed = whole.to(torch.device("cpu"), torch.float32)
    assert (placed.states.dtype, placed.mask.dtype, placed.pooled.dtype) == (torch.float32, torch.bool, torch.float32)
    assert Condition().rolled(1) == Condition().rows(0, 1) == Condition()


@pytest.mark.parametrize(
    "null, message",
    [
        (Condition(), "token states in both"),
        (Condition(states=torch.zeros(2, 6, 2, dtype=torch.float64)), r"got 2 rows of shape \(6, 2\)"),
        (Condition(states=torch.zeros(3, 6, 5, dtype=torch.float64)), r"got 3 rows of shape \(6, 5\)"),
    ],
)
def test_guidance_with_conditions_that_do_not_match_is_refused(null, message):
    with pytest.raises(ValueError, match=message):
        guided_denoiser(weighted_network([]), SCHEDULE, Prediction.NOISE, conditions()[0], null, 2.0)
