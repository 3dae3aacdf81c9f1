"""Laws of tiles: with margins they are the whole picture, blending leaves no edges, memory is that of a tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig, quantized
from ldm.autoencoder.regularizer import mode
from ldm.autoencoder.tiling import sight, tiled_decode, tiled_encode

SMALL = AutoencoderConfig(latent_channels=3, base_channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)
LOCAL = replace(SMALL, mid_attention=False)


def smooth(number: int, height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(number)) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True).clamp(-1, 1)


def without_norms(config: AutoencoderConfig) -> Autoencoder:
    """Return a network whose positions see only what its convolutions see."""
    torch.manual_seed(0)
    model = Autoencoder(config).double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return model


@pytest.fixture(scope="module")
def trained() -> Autoencoder:
    """A network with attention that has seen sixty batches of smooth pictures."""
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(60):
        images = torch.cat([smooth(1000 + 4 * step + row, 32, 32) for row in range(4)])
        optimizer.zero_grad()
        (model.reconstruct(images) - images).abs().mean().backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.mark.parametrize("sides", [(192, 256), (260, 188), (64, 300)])
@torch.no_grad()
def test_tiles_with_margins_as_wide_as_the_convolutions_see_are_the_whole_picture(sides):
    model = without_norms(LOCAL)
    image = smooth(0, *sides).double()
    moments = model.encode(image)
    latent = mode(moments)
    margin = sight(LOCAL)
    fields = {"tile": 2 * margin + 48, "overlap": 2 * margin + 8, "margin": margin}
    torch.testing.assert_close(tiled_encode(model, image, **fields), moments, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tiled_decode(model, latent, **fields), model.decode(latent), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_without_margins_only_positions_near_inner_borders_differ():
    model, image = without_norms(LOCAL), smooth(0, 64, 400).double()
    apart = (tiled_encode(model, image, tile=240, overlap=80) - model.encode(image)).abs().amax(dim=(0, 1, 2))
    reach = sight(LOCAL) // 4
    # Tiles [0, 60) and [40, 100) in latent positions.
    untouched = [*range(40), *range(60, 100)]
    assert apart[untouched].max() < 1e-12
    assert apart[40:60].max() > 1e-9
    assert reach >= 15


@pytest.mark.parametrize("name", ["kl_f4", "vq_f8", "kl_f32", "emoji_f4"])
def test_sight_is_a_multiple_of_the_factor(name):
    config = getattr(zoo, name)()
    assert sight(config) % config.factor == 0


@torch.no_grad()
def test_tiles_of_a_network_with_attention_and_norms_stay_near_the_whole_picture(trained):
    """The bound: latents within 6 % of their deviation on average, pixels within 1 % of their range, 5 % at worst."""
    image = smooth(0, 192, 160)
    moments = trained.encode(image)
    latent = mode(moments)
    tiles = {"tile": 128, "overlap": 64}
    apart = mode(tiled_encode(trained, image, **tiles)) - latent
    assert apart.square().mean().sqrt() < 0.06 * latent.std()
    apart = tiled_decode(trained, latent, **tiles) - trained.decode(latent)
    assert apart.square().mean().sqrt() < 0.01 * 2
    assert apart.abs().max() < 0.05 * 2


@torch.no_grad()
def test_blended_tiles_leave_no_edge_where_tiles_side_by_side_do(trained):
    latent = mode(trained.encode(smooth(0, 64, 240)))
    whole = trained.decode(latent)
    blended = tiled_decode(trained, latent, tile=128, overlap=64) - whole
    beside = torch.cat([trained.decode(part) for part in latent.split(30, dim=3)], dim=3) - whole
    # Jumps of what tiling adds between neighbouring columns, worst over the picture: seen where there is an edge.
    jumps = [apart.diff(dim=3).abs().mean(dim=(0, 1, 2)) for apart in (blended, beside)]
    assert jumps[1].argmax() == 119
    assert jumps[0].max() < 0.2 * jumps[1].max()


@pytest.mark.parametrize("config", [SMALL, quantized(SMALL, num_codes=16)])
@torch.no_grad()
def test_a_picture_no_larger_than_a_tile_and_any_rows_at_once_change_nothing(config):
    torch.manual_seed(0)
    model, images = Autoencoder(config), torch.cat([smooth(row, 48, 64) for row in range(3)])
    moments = model.encode(images)
    latent = mode(moments, config.latent_kind)
    assert torch.equal(tiled_encode(model, images, tile=64, overlap=16), moments)
    assert torch.equal(tiled_decode(model, latent, tile=64, overlap=16), model.decode(latent))
    for rows in (1, 2):
        torch.testing.assert_close(tiled_encode(model, images, tile=64, overlap=16, rows=rows), moments)
        torch.testing.assert_close(tiled_decode(model, latent, tile=64, overlap=16, rows=rows), model.decode(latent))


@torch.no_grad()
def test_no_network_sees_more_than_a_tile_of_as_many_rows_as_asked():
    seen: list[tuple[int, ...]] = []
    model = Autoencoder(LOCAL)
    model.encoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    model.decoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    tiled_encode(model, torch.zeros(3, 3, 128, 100), tile=64, overlap=16, rows=2)
    tiled_decode(model, torch.zeros(1, 3, 33, 16), tile=64, overlap=16)
    assert set(seen) == {(2, 3, 64, 64), (1, 3, 64, 64), (1, 3, 16, 16)}
    assert len(seen) == 2 * 3 * 2 + 3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tile": 66, "overlap": 16}, r"must be multiples of 4 px, got \(66, 16, 0\)"),
        ({"tile": 64, "overlap": 64}, r"larger than its overlap, .* got \(64, 64, 0\)"),
        ({"tile": 64, "overlap": 16, "margin": 8}, r"and that than two margins, got \(64, 16, 8\)"),
        ({"tile": 64, "overlap": 16, "margin": -4}, r"got \(64, 16, -4\)"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_with_their_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        tiled_encode(Autoencoder(LOCAL), torch.zeros(1, 3, 128, 128), **fields)
    with pytest.raises(ValueError, match=message):
        tiled_decode(Autoencoder(LOCAL), torch.zeros(1, 3, 32, 32), **fields)


def test_sides_that_are_no_multiples_of_the_factor_are_refused():
    with pytest.raises(ValueError, match=r"image sides must be multiples of 4, got \(130, 128\)"):
        tiled_encode(Autoencoder(LOCAL), torch.zeros(1, 3, 130, 128))
