"""Laws of the map between raw and scaled latents."""

from __future__ import annotations

import pytest
import torch

from ldm.autoencoder import regularizer
from ldm.autoencoder.regularizer import LatentKind
from ldm.latents import LatentSpace

SPACE = LatentSpace(mean=(0.5, -2.0, 0.0, 10.0), std=(2.0, 0.1, 1.0, 30.0))


def moments(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_latent_space_unscaled_inverts_scaled():
    noise = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    raw = regularizer.sample(moments(), noise)
    torch.testing.assert_close(SPACE.unscaled(SPACE.scaled(moments(), noise)), raw, rtol=1e-12, atol=1e-12)
    mode = regularizer.mode(moments())
    torch.testing.assert_close(SPACE.unscaled(SPACE.scaled_mode(moments())), mode, rtol=1e-12, atol=1e-12)


def test_scaled_with_zero_noise_is_scaled_mode():
    noise = torch.zeros(3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(SPACE.scaled(moments(), noise), SPACE.scaled_mode(moments()), rtol=0, atol=0)


def test_scaled_with_the_population_statistics_is_white():
    raw = regularizer.mode(moments(64))
    mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
    space = LatentSpace(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    white = space.scaled_mode(moments(64))
    torch.testing.assert_close(white.mean(dim=(0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(white.std(dim=(0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_scaled_each_channel_uses_its_own_statistics():
    flat = torch.cat([torch.tensor(SPACE.mean), torch.zeros(4)])[None, :, None, None].expand(1, 8, 2, 2)
    torch.testing.assert_close(SPACE.scaled_mode(flat), torch.zeros(1, 4, 2, 2), rtol=0, atol=0)


def test_latent_space_dict_round_trip_is_exact():
    assert LatentSpace.from_dict(SPACE.to_dict()) == SPACE


@pytest.mark.parametrize(
    "mean, std, message",
    [
        ((), (), "one mean and one std"),
        ((0.0,), (1.0, 1.0), "got 1 and 2"),
        ((0.0,), (0.0,), "positive"),
        ((0.0,), (-1.0,), "positive"),
        ((0.0,), (float("nan"),), "finite"),
        ((float("inf"),), (1.0,), "finite"),
    ],
)
def test_latent_space_with_senseless_statistics_is_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        LatentSpace(mean=mean, std=std)


@pytest.mark.parametrize(
    "plain, message",
    [
        ({"mean": [0.0]}, "exactly 'mean' and 'std'"),
        ({"mean": [0.0], "std": [1.0], "scale": 1.0}, "exactly 'mean' and 'std'"),
        ({"mean": 0.0, "std": [1.0]}, "'mean' is a list of numbers"),
        ({"mean": [0.0], "std": ["1"]}, "'std' is a list of numbers"),
    ],
)
def test_latent_space_from_other_dict_is_refused(plain, message):
    with pytest.raises(ValueError, match=message):
        LatentSpace.from_dict(plain)


def test_unscaled_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="4 channels, the latent has 3"):
        SPACE.unscaled(torch.zeros(1, 3, 2, 2))


def test_vq_latents_are_scaled_as_they_are_and_take_no_noise():
    space = LatentSpace(mean=(0.5, -2.0), std=(2.0, 0.1), kind=LatentKind.VQ_LATENTS)
    raw = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scaled = space.scaled(raw, None)
    assert torch.equal(scaled, space.scaled_mode(raw))
    torch.testing.assert_close(space.unscaled(scaled), raw, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="not drawn"):
        space.scaled(raw, torch.zeros_like(raw))
    with pytest.raises(ValueError, match="2 channels, the latent has 4"):
        space.scaled_mode(moments()[:, :4])


def test_latent_space_of_vq_says_its_kind_and_that_of_kl_does_not():
    space = LatentSpace(mean=(0.5,), std=(2.0,), kind=LatentKind.VQ_LATENTS)
    assert space.to_dict() == {"mean": [0.5], "std": [2.0], "kind": "vq_latents"}
    assert LatentSpace.from_dict(space.to_dict()) == space
    assert SPACE.to_dict().keys() == {"mean", "std"}
    with pytest.raises(ValueError, match="'gumbel' is not a valid LatentKind"):
        LatentSpace.from_dict(space.to_dict() | {"kind": "gumbel"})
