"""Noise over the small pictures of super-resolution: as much as its level says, drawn by row, and heard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.noise_levels import with_noise
from ldm.conditioning.rows import RowConditions
from ldm.denoiser import check_denoiser
from ldm.drawing import Drawing, Given, check_told
from ldm.latents import LatentSpace
from ldm.types import Condition, LatentBatch
from ldm.unet import zoo
from ldm.unet.model import UNet

TOLD = ConditioningConfig(text=TextUse.NONE, has_low_res=True, noise_levels=350)


def rows_of(samples: list[int], *, value: float = 0.5) -> LatentBatch:
    return LatentBatch(
        keys=tuple(map(str, samples)),
        samples=torch.tensor(samples),
        moments=torch.zeros(len(samples), 8, 16, 16),
        condition=Condition(),
        columns={"low_res": torch.full((len(samples), 3, 16, 16), value)},
    )


def conditions(config: ConditioningConfig = TOLD, seed: int = 0) -> RowConditions:
    return RowConditions(config=config, space=LatentSpace(mean=(0.0,) * 4, std=(1.0,) * 4), factor=4, seed=seed)


@pytest.mark.parametrize("level", [0, 100, 349, 999])
def test_noise_at_a_level_is_that_of_its_timestep_in_a_linear_schedule(level: int) -> None:
    kept = 1.0
    for step in range(level + 1):  # Ho et al. 2020, section 4: beta from 1e-4 to 0.02 in 1,000 steps
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
    torch.manual_seed(0)
    small = torch.full((2, 3, 64, 64), 0.5, dtype=torch.float64)
    found = with_noise(small, torch.tensor([level, level]), torch.randn_like(small))
    assert float(found.mean()) == pytest.approx(0.5 * kept**0.5, abs=0.03)
    assert float(found.std()) == pytest.approx((1 - kept) ** 0.5, rel=0.03)


def test_levels_and_noise_belong_to_the_row_wherever_it_stands() -> None:
    whole = conditions().drawn(rows_of([5, 6, 7, 8]))
    part = conditions().drawn(rows_of([7]))
    assert whole.level is not None
    assert part.level is not None
    assert part.spatial is not None
    assert whole.spatial is not None
    assert part.level[0] == whole.level[2]
    assert (part.spatial[0] == whole.spatial[2]).all()
    other = conditions(seed=1).drawn(rows_of([7]))
    assert (other.spatial != part.spatial).any()


def test_training_draws_every_level_equally_often_and_measures_at_the_lowest() -> None:
    levels = conditions().drawn(rows_of(list(range(7_000)))).level
    assert levels is not None
    counts = torch.bincount(levels, minlength=350)
    assert len(counts) == 350
    assert int(counts.min()) > 0
    assert float(counts.float().std()) < 1.2 * 20**0.5
    measured = conditions().whole(rows_of([1, 2]))
    assert measured.level is not None
    assert measured.spatial is not None
    assert measured.level.tolist() == [0, 0]
    assert float((measured.spatial - 0.5).abs().max()) < 0.06
    asked = conditions().whole(rows_of([1, 2]), 300)
    assert asked.level is not None
    assert asked.spatial is not None
    assert asked.level.tolist() == [300, 300]
    assert float((asked.spatial - 0.5).abs().mean()) > 0.3


def test_without_levels_the_small_picture_is_as_it_is() -> None:
    found = conditions(replace(TOLD, noise_levels=0)).drawn(rows_of([1, 2]))
    assert found.level is None
    assert found.spatial is not None
    assert (found.spatial == 0.5).all()


def test_the_network_hears_the_level() -> None:
    torch.manual_seed(0)
    config = replace(zoo.emoji_unconditional(), in_channels=7, num_levels=350)
    network = UNet(config).eval()
    for weight in network.parameters():  # fresh blocks hear nothing: their last convolution is zero
        torch.nn.init.normal_(weight, std=0.05)
    noisy, time = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 500.0])
    told = conditions().whole(rows_of([1, 2]))
    with torch.no_grad():
        low, high = (network(noisy, time, replace(told, level=torch.tensor([n, n]))) for n in (0, 349))
    assert float((low - high).std()) > 0.01 * float(low.std())
    with pytest.raises(ValueError, match="a level of noise for each row, below 350, got none"):
        network(noisy, time, replace(told, level=None))


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="from 0 to 1000, are of the small copy.*got 1001"):
        replace(TOLD, noise_levels=1001)
    with pytest.raises(ValueError, match="got 5 and has_low_res False"):
        ConditioningConfig(noise_levels=5)
    with pytest.raises(ValueError, match="350 noise_levels .* the unet hears 0"):
        check_denoiser(
            replace(zoo.emoji_unconditional(), in_channels=7), TOLD, latent_channels=4, text_width=1, pooled_width=None
        )
    small = Given(small=torch.zeros(1, 16, 16, 3, dtype=torch.uint8).numpy())
    check_told(TOLD, small, 349)
    with pytest.raises(ValueError, match="noise_level 350 is not among the 350"):
        check_told(TOLD, small, 350)
    with pytest.raises(ValueError, match="noise_level 1 is not among the 0"):
        check_told(replace(TOLD, noise_levels=0), small, 1)
    with pytest.raises(ValueError, match="noise_level can't be negative, got -1"):
        Drawing(noise_level=-1)
