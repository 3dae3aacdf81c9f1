"""Laws of what a denoiser is told: tokens and channels are exact, nulls are what was dropped, draws belong to rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.conditioner import ClassTable, Conditioner, ConditioningConfig, MapRescaler, TextUse
from ldm.conditioning.degradation import degraded
from ldm.conditioning.layout import layout_tokens, null_layout
from ldm.conditioning.rows import RowConditions, null_condition
from ldm.conditioning.text_embedding import numbered_condition
from ldm.conditioning.transformer import TokenTransformer, TokenTransformerConfig
from ldm.evaluation.scores import psnr
from ldm.latents import LatentSpace
from ldm.randomness import Draw, uniform
from ldm.types import Condition, LatentBatch

SPACE = LatentSpace(mean=(1.0, -1.0), std=(2.0, 0.5))
SMALL = TokenTransformerConfig(vocab_size=50, max_tokens=8, depth=2, num_heads=2, head_channels=4)
LAYOUT = TokenTransformerConfig(vocab_size=8_192, max_tokens=92, depth=1)
TOLD = ConditioningConfig(
    num_classes=3, has_layout=True, layout_transformer=LAYOUT, map_classes=4, has_low_res=True, has_masked_image=True
)


def batch_of(num_rows: int, **columns: Tensor) -> LatentBatch:
    return LatentBatch(
        keys=tuple(map(str, range(num_rows))),
        samples=torch.arange(num_rows),
        moments=torch.zeros(num_rows, 4, 4, 6),
        condition=Condition(states=torch.ones(num_rows, 2, 5)),
        columns=columns,
    )


def conditions(config: ConditioningConfig, seed: int = 0) -> RowConditions:
    return RowConditions(config=config, space=SPACE, factor=8, seed=seed)


# Networks that are trained with the denoiser


@pytest.mark.parametrize(
    "config, width, with_output_layer",
    [
        (TokenTransformerConfig(vocab_size=30_522, max_tokens=77, depth=32), 1280, 581_994_042),  # txt2img-1p4B
        (
            TokenTransformerConfig(vocab_size=8_192, max_tokens=92, depth=16),
            512,
            58_858_496,
        ),  # layout2img-openimages256
    ],
)
def test_transformer_has_the_papers_exact_count_but_for_its_unused_output_layer(config, width, with_output_layer):
    with torch.device("meta"):
        count = sum(weight.numel() for weight in TokenTransformer(config, width).parameters())
    assert count == with_output_layer - config.vocab_size * (width + 1)


def test_transformer_state_depends_on_every_token_and_its_place():
    torch.manual_seed(0)
    network = TokenTransformer(SMALL, 6)
    tokens = torch.tensor([[1, 2, 3, 4]])
    states = network(tokens)
    for place in range(4):
        other = tokens.clone()
        other[0, place] = 9
        assert (network(other) - states).abs().amin(dim=(0, 2)).min() > 0  # each state has moved
    swapped = network(tokens[:, [1, 0, 2, 3]])
    assert not torch.allclose(swapped[:, [1, 0, 2, 3]], states)
    with pytest.raises(ValueError, match="the transformer has 8 positions, got 9 tokens"):
        network(torch.zeros(1, 9, dtype=torch.long))


def test_class_is_one_token_of_a_table_with_one_row_more_than_classes():
    table = ClassTable(1000, 512)
    assert table.embedding.weight.shape == (1001, 512)  # cin256-v2
    assert torch.equal(table(torch.tensor([7, 1000])), table.embedding.weight[[7, 1000], None])


def test_map_is_what_halving_its_one_hot_form_bilinearly_and_mixing_gives():
    """The paper's rescaler: n halvings, then a 1x1 convolution without a bias."""
    torch.manual_seed(0)
    rescaler = MapRescaler(5, 3)
    semantic_map = torch.randint(-1, 5, (2, 16, 24))
    one_hot = F.one_hot(semantic_map.clamp(min=0), 5).movedim(-1, 1) * (semantic_map >= 0)[:, None]
    halved = one_hot.float()
    for _ in range(2):
        halved = F.interpolate(halved, scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(rescaler(semantic_map, (4, 6)), rescaler.mix(halved))


def test_conditioner_puts_states_one_behind_the_other_and_channels_beside():
    torch.manual_seed(0)
    conditioner = Conditioner(replace(TOLD, has_low_res=False, has_masked_image=False), 5)
    told = Condition(
        states=torch.randn(2, 3, 5),
        mask=torch.tensor([[True, True, False], [True, False, False]]),
        spatial=torch.randn(2, 1, 2, 2),
        class_id=torch.tensor([0, 3]),
        layout=null_layout(2, LAYOUT),
        semantic_map=torch.zeros(2, 4, 4, dtype=torch.long),
    )
    made = conditioner(told, (2, 2))
    assert made.states.shape == (2, 3 + 1 + 92, 5)
    assert torch.equal(made.states[:, :3], told.states)
    assert torch.equal(made.states[:, 3], conditioner.class_table.embedding.weight[told.class_id])
    assert torch.equal(made.mask, F.pad(told.mask, (0, 93), value=True))
    assert torch.equal(made.spatial[:, :1], told.spatial)
    assert made.spatial.shape == (2, 1 + 3, 2, 2)
    assert (made.class_id, made.layout, made.semantic_map, made.tokens) == (None, None, None, None)
    with pytest.raises(ValueError, match="the denoiser is told class_id, and the condition has none"):
        conditioner(replace(told, class_id=None), (2, 2))


# From rows to conditions


def test_layout_is_the_papers_ninety_two_tokens():
    boxes = torch.full((1, 4, 5), -1.0)
    boxes[0, 0] = torch.tensor([17, 0.0, 0.0, 1.0, 1.0])
    boxes[0, 1] = torch.tensor([3, 0.5, 0.25, 0.75, 0.5])
    tokens = layout_tokens(boxes, torch.tensor([[100.0, 200.0]]), torch.tensor([[0.0, 50.0, 100.0, 100.0]]), LAYOUT)
    side = 90  # floor(sqrt(8192))
    first = [17, 0, 89 * side + 89]
    second = [3, round(0.25 * 89) * side + round(0.5 * 89), round(0.5 * 89) * side + round(0.75 * 89)]
    crop = [round(0.25 * 89), 89 * side + round(0.75 * 89)]
    assert tokens[0].tolist() == [*first, *second, *[8191] * 84, *crop]


def test_layout_of_classes_beyond_the_vocabulary_or_a_sequence_of_broken_objects_is_refused():
    box, whole = torch.tensor([[[8191.0, 0, 0, 1, 1]]]), torch.tensor([[0.0, 0, 8, 8]])
    with pytest.raises(ValueError, match="layouts of 8192 tokens have classes below 8191, got 8191"):
        layout_tokens(box, torch.tensor([[8.0, 8.0]]), whole, LAYOUT)
    with pytest.raises(ValueError, match=r"3 tokens an object and 2 of the crop \(30 objects: 92\), got 90"):
        ConditioningConfig(has_layout=True, layout_transformer=replace(LAYOUT, max_tokens=90))


def test_dropped_conditions_are_the_null_ones_for_the_share_of_rows_that_the_config_says():
    config = replace(
        TOLD, class_dropout=0.25, layout_dropout=0.5, map_dropout=0.1, has_low_res=False, has_masked_image=False
    )
    rows = 4096
    batch = batch_of(
        rows,
        class_id=torch.arange(rows) % 3,
        boxes=torch.tensor([[[1.0, 0.1, 0.1, 0.9, 0.9]]]).expand(rows, -1, -1),
        size=torch.full((rows, 2), 32.0),
        crop=torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(rows, -1),
        semantic_map=torch.ones(rows, 2, 2, dtype=torch.long),
    )
    drawn, whole = conditions(config).drawn(batch), conditions(config).whole(batch)
    nulls = {
        "class_id": drawn.class_id == 3,
        "layout": (drawn.layout == 8191).all(dim=1),
        "semantic_map": (drawn.semantic_map == -1).flatten(1).all(dim=1),
    }
    for (name, dropped), share in zip(nulls.items(), (0.25, 0.5, 0.1), strict=True):
        assert float(dropped.float().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / rows) ** 0.5)
        kept = ~dropped
        assert torch.equal(getattr(drawn, name)[kept], getattr(whole, name)[kept])
    # One draw for all: the rarer null falls within the more frequent ones, so guidance's null is one that was seen.
    assert (nulls["class_id"] <= nulls["layout"]).all()
    assert (nulls["semantic_map"] <= nulls["class_id"]).all()
    captions = uniform(0, Draw.DROPOUT, range(rows)) < 0.25  # as the loader drops them
    assert torch.equal(captions, nulls["class_id"])
    part = conditions(config).drawn(batch.rows(1000, 1010))  # a row's draw is its own, whatever it comes with
    assert torch.equal(part.class_id, drawn.class_id[1000:1010])
    assert not torch.equal(conditions(config, seed=1).drawn(batch).class_id, drawn.class_id)


def test_row_without_a_class_has_the_null_class_and_one_beyond_them_is_refused():
    config = ConditioningConfig(num_classes=3)
    whole = conditions(config).whole(batch_of(2, class_id=torch.tensor([-1, 2])))
    assert whole.class_id.tolist() == [3, 2]
    with pytest.raises(ValueError, match="numbers below 3 are known to the denoiser, and a class has 3"):
        conditions(config).whole(batch_of(1, class_id=torch.tensor([3])))
    with pytest.raises(ValueError, match="the denoiser is told class_id, and the latents hold only size"):
        conditions(config).whole(batch_of(1, size=torch.zeros(1, 2)))


def test_masked_image_and_small_image_lie_beside_the_latent_at_its_size():
    config = ConditioningConfig(has_masked_image=True, has_low_res=True)
    assert config.spatial_channels(latent_channels=2) == 1 + 2 + 3
    masked, mask = torch.randn(2, 4, 4, 6), torch.ones(2, 1, 4, 6)
    small = torch.rand(2, 3, 4, 6)
    made = conditions(config).whole(batch_of(2, masked_moments=masked, mask=mask, low_res=small))
    assert torch.equal(made.spatial, torch.cat([mask, SPACE.scaled_mode(masked), small], dim=1))
    larger = F.interpolate(small, scale_factor=2, mode="nearest")
    made = conditions(ConditioningConfig(has_low_res=True)).whole(batch_of(2, low_res=larger))
    assert made.spatial.shape == (2, 3, 4, 6)


def test_sizes_are_those_of_sdxl():
    """Section 2.2: original size, corner of the crop in the resized picture, size of the result."""
    columns = {"size": torch.tensor([[600.0, 900.0]]), "crop": torch.tensor([[60.0, 100.0, 400.0, 600.0]])}
    made = conditions(ConditioningConfig(has_sizes=True)).whole(batch_of(1, **columns))
    assert made.sizes[0].tolist() == pytest.approx([600, 900, 60 * 32 / 400, 100 * 48 / 600, 32, 48])


def test_null_condition_is_what_training_drops_to_and_keeps_what_it_never_drops():
    config = replace(TOLD, map_dropout=0.0)
    told = Condition(
        states=torch.ones(2, 2, 5),
        class_id=torch.tensor([0, 1]),
        layout=torch.zeros(2, 92, dtype=torch.long),
        semantic_map=torch.zeros(2, 4, 4, dtype=torch.long),
        spatial=torch.ones(2, 6, 4, 6),
    )
    null = null_condition(config, told, Condition(states=torch.zeros(1, 2, 5)))
    assert null.class_id.tolist() == [3, 3]
    assert torch.equal(null.layout, null_layout(2, LAYOUT))
    assert torch.equal(null.semantic_map, told.semantic_map)
    assert torch.equal(null.spatial, told.spatial)
    assert null.states.sum() == 0
    kept = null_condition(replace(config, class_dropout=0.0, layout_dropout=0.0), told, Condition(states=told.states))
    assert kept.class_id is told.class_id
    assert kept.layout is told.layout
    dropped = null_condition(replace(config, map_dropout=0.1), told, Condition(states=torch.zeros(1, 2, 5)))
    assert (dropped.semantic_map == -1).all()


def test_tokens_of_captions_are_padded_and_those_of_two_tokenizers_refused():
    made = numbered_condition([np.array([[5], [6]], np.int32), np.array([[7]], np.int32)], 3)
    assert made.tokens.tolist() == [[5, 6, 0], [7, 0, 0]]
    with pytest.raises(ValueError, match=r"reads 3 tokens of one tokenizer, got \(2, 2\)"):
        numbered_condition([np.zeros((2, 2), np.int32)], 3)


def test_conditioning_without_text_forgets_the_caption():
    made = conditions(ConditioningConfig(text=TextUse.NONE)).whole(batch_of(2))
    assert made == Condition()


# Degradation


def test_degraded_picture_is_a_function_of_its_dice_and_still_shows_the_picture():
    y, x = np.mgrid[0:96, 0:128]
    picture = np.stack([x * 2, y * 2, 128 + 60 * np.sin(x / 9)], -1).clip(0, 255).astype(np.uint8)
    clean = F.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), (24, 32), mode="area") / 127.5 - 1
    made = [degraded(np.random.default_rng(seed), picture, (24, 32)) for seed in range(24)]
    assert all(one.shape == (24, 32, 3) and one.dtype == np.uint8 for one in made)
    assert np.array_equal(made[3], degraded(np.random.default_rng(3), picture, (24, 32)))
    small = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 127.5 - 1
    decibels = psnr(small, clean.expand(24, -1, -1, -1))
    assert decibels.min() > 18
    assert decibels.max() - decibels.min() > 3  # some are worse than others


def test_degraded_picture_of_a_few_pixels_is_made_too():
    tiny = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    for seed in range(20):
        assert degraded(np.random.default_rng(seed), tiny, (2, 2)).shape == (2, 2, 3)
