"""Laws of layouts that are read object by object, and of the waves that tell places."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.layout import (
    POSITION_CHANNELS,
    BoxReader,
    LayoutForm,
    layout_tokens,
    null_layout,
    position_channels,
    waves,
)
from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.denoiser import build_denoiser
from ldm.samplers.tiles import tiled_network
from ldm.types import Condition
from ldm.unet import zoo as unets

CONFIG = TokenTransformerConfig(vocab_size=1_025, max_tokens=11, depth=1)  # three objects
WIDTH = 16
WHOLE = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
BOXES = torch.tensor([[[3.0, 0.1, 0.2, 0.5, 0.6], [7.0, 0.5, 0.5, 1.0, 0.9]]])


def reader() -> BoxReader:
    torch.manual_seed(0)
    return BoxReader(CONFIG, WIDTH)


def tokens_of(boxes: Tensor, crop: Tensor = WHOLE) -> Tensor:
    return layout_tokens(boxes, torch.tensor([[64.0, 64.0]]), crop, CONFIG)


def test_an_object_is_one_state_wherever_it_stands_in_the_list() -> None:
    read = reader()
    states, other = read(tokens_of(BOXES)), read(tokens_of(BOXES.flip(1)))
    assert states.shape == (1, 4, WIDTH)  # two objects, one that is not there, the crop
    torch.testing.assert_close(other[:, [1, 0, 2, 3]], states)
    assert not torch.allclose(states[0, 0], states[0, 1])


@pytest.mark.parametrize("number", range(5))
def test_class_and_every_side_of_a_box_are_heard_by_its_own_state_alone(number: int) -> None:
    read, changed = reader(), BOXES.clone()
    changed[0, 0, number] += 1.0 if number == 0 else 0.07
    before, after = read(tokens_of(BOXES)), read(tokens_of(changed))
    assert not torch.allclose(before[0, 0], after[0, 0], atol=1e-3)
    assert (before[0, 1:] == after[0, 1:]).all()


def test_what_is_not_there_is_one_state_and_the_null_layout_is_nothing_but_that() -> None:
    read = reader()
    null = read(null_layout(1, CONFIG))
    assert (null == null[:, :1]).all()
    assert (read(tokens_of(BOXES))[0, 2] == null[0, 0]).all()
    part = tokens_of(BOXES, torch.tensor([[16.0, 0.0, 32.0, 64.0]]))
    assert not torch.allclose(read(part)[0, 3], read(tokens_of(BOXES))[0, 3], atol=1e-3)


def test_near_places_have_near_waves_and_no_two_positions_the_same() -> None:
    one = position_channels(2, (16, 16))
    assert one.shape == (2, POSITION_CHANNELS, 16, 16)
    flat = one[0].flatten(1).T
    apart = torch.cdist(flat, flat).fill_diagonal_(math.inf)
    assert float(apart.min()) > 0.1
    likeness = (waves(torch.tensor([0.4, 0.41, 0.5, 0.9])) @ waves(torch.tensor([0.4])).T).flatten()
    assert list(likeness.argsort(descending=True)) == [0, 1, 2, 3]
    # Twice as many positions: the mean of two is where one was.
    finer = position_channels(1, (32, 32))[0, : POSITION_CHANNELS // 2, :, 0].unflatten(1, (16, 2))
    torch.testing.assert_close(finer.mean(dim=2), one[0, : POSITION_CHANNELS // 2, :, 0], rtol=0.1, atol=0.08)


def test_a_tile_is_told_its_places_in_the_whole_picture() -> None:
    seen = []

    def network(noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        seen.append(condition.spatial)
        return noisy

    whole = position_channels(1, (16, 24))
    tiled_network(network, 8)(torch.zeros(1, 4, 16, 24), torch.zeros(1), Condition(spatial=whole))
    parts = [whole[:, :, top : top + 8, left : left + 8] for top in range(9) for left in range(17)]
    assert len(seen) > 6
    assert all(any((tile == part).all() for part in parts) for tile in seen)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"has_layout": False}, "has_layout is needed"),
        ({"layout_transformer": replace(CONFIG, vocab_size=1_024)}, "no square, such as 1,025"),
        ({"layout_transformer": replace(CONFIG, vocab_size=3)}, "four cells at least"),
    ],
)
def test_boxes_that_could_not_be_told_from_none_are_refused(changes: dict[str, object], message: str) -> None:
    told = ConditioningConfig(
        text=TextUse.NONE, has_layout=True, layout_form=LayoutForm.BOXES, layout_transformer=CONFIG
    )
    with pytest.raises(ValueError, match=message):
        replace(told, **changes)


def test_boxes_widen_the_input_and_the_corners_reach_the_prediction() -> None:
    told = ConditioningConfig(
        text=TextUse.NONE, has_layout=True, layout_form=LayoutForm.BOXES, layout_transformer=CONFIG
    )
    assert told.spatial_channels(4) == POSITION_CHANNELS
    assert replace(told, layout_form=LayoutForm.TOKENS).spatial_channels(4) == 0
    config = replace(unets.emoji(), in_channels=4 + POSITION_CHANNELS, context_width=WIDTH)
    torch.manual_seed(0)
    network = build_denoiser(config, told)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    noisy = torch.randn(1, 4, 16, 16)
    moved = BOXES + torch.tensor([0.0, 0.2, 0.2, 0.2, 0.2])
    with torch.no_grad():
        places = position_channels(1, (16, 16))
        conditions = [Condition(layout=tokens_of(boxes), spatial=places) for boxes in (BOXES, moved)]
        found = [network(noisy, torch.zeros(1), condition) for condition in conditions]
    assert float((found[0] - found[1]).abs().max()) > 1e-5
