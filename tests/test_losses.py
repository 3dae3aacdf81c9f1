"""Laws of the losses: diffusion, perceptual."""

from __future__ import annotations

import hashlib
import importlib
import sys
import types
from dataclasses import replace
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from torch import nn

from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.diffusion.process import Prediction, clean_from, corrupt, target
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.losses import perceptual
from ldm.losses.diffusion import Weighting, loss_weight, per_sample_loss
from ldm.losses.perceptual import PerceptualConfig, PerceptualKind, perceptual_distance

SCHEDULE = Schedule(ScheduleConfig())


def image_pair(batch: int = 2, height: int = 64, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    seeded = torch.Generator().manual_seed(height * 1000 + width)
    image = torch.rand(batch, 3, height, width, generator=seeded) * 2 - 1
    other = (image + 0.3 * torch.randn(image.shape, generator=seeded)).clamp(-1, 1)
    return image, other


# --- diffusion


def diffusion_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.randn(3, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draws[0], draws[1], draws[2], torch.tensor([0.0, 120.0, 400.0, 999.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", Prediction)
def test_min_snr_weight_equals_its_closed_form(kind):
    at = SCHEDULE.scales(diffusion_case()[3])
    snr = SCHEDULE.log_snr[[0, 120, 400, 999]].exp()
    capped = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))
    expected = {
        Prediction.CLEAN: capped,
        Prediction.NOISE: capped / snr,
        Prediction.VELOCITY: capped / (snr + 1),
        Prediction.FLOW: capped / (snr.sqrt() + 1) ** 2,
    }
    weight = loss_weight(Weighting.MIN_SNR, kind, at, 5.0).flatten()
    torch.testing.assert_close(weight, expected[kind], rtol=1e-11, atol=0)


def test_min_snr_loss_of_one_estimate_is_the_same_for_every_prediction():
    clean, noise, output, times = diffusion_case()
    at = SCHEDULE.scales(times)
    noisy = corrupt(clean, noise, at)
    losses = []
    for kind in Prediction:
        estimate = clean_from(Prediction.NOISE, output, noisy, at)
        implied_noise = output
        same = target(kind, estimate, implied_noise, at)
        losses.append(per_sample_loss(kind, same, clean, noise, at, Weighting.MIN_SNR, gamma=5.0))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", Prediction)
def test_uniform_loss_is_the_mean_square_of_each_row(kind):
    clean, noise, output, times = diffusion_case()
    at = SCHEDULE.scales(times)
    loss = per_sample_loss(kind, output, clean, noise, at, Weighting.UNIFORM)
    expected = [nn.functional.mse_loss(output[row], target(kind, clean, noise, at)[row]) for row in range(4)]
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", Prediction)
@pytest.mark.parametrize("weighting", Weighting)
def test_loss_of_the_target_is_zero(kind, weighting):
    clean, noise, _, times = diffusion_case()
    at = SCHEDULE.scales(times)
    loss = per_sample_loss(kind, target(kind, clean, noise, at), clean, noise, at, weighting, gamma=1.0)
    assert loss.tolist() == [0.0] * 4


# --- perceptual


@pytest.fixture(scope="module")
def st_lpips():
    return perceptual_distance(PerceptualConfig())


@pytest.fixture(scope="module")
def st_lpips_of_its_authors():
    # The package imports a notebook's shell and a table printer at the top and never calls them in a forward pass.
    added = {"IPython": "embed", "torchsummary": "summary"}
    for module_name, member in added.items():
        if module_name not in sys.modules and importlib.util.find_spec(module_name) is None:
            module = types.ModuleType(module_name)
            setattr(module, member, None)
            sys.modules[module_name] = module
    authors = importlib.import_module("stlpips_pytorch.stlpips")
    return authors.LPIPS(net="alex", variant="shift_tolerant", verbose=False).requires_grad_(False)


@pytest.mark.parametrize("height, width", [(64, 64), (63, 64), (64, 61), (33, 35), (21, 22), (96, 128)])
def test_st_lpips_equals_its_authors_package(st_lpips, st_lpips_of_its_authors, height, width):
    image, other = image_pair(2, height, width)
    ours, theirs = other.clone().requires_grad_(), other.clone().requires_grad_()
    distance, expected = st_lpips(image, ours), st_lpips_of_its_authors(image, theirs).flatten()
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-7)
    distance.sum().backward()
    expected.sum().backward()
    assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < 1e-4


def test_st_lpips_equals_recorded_numbers(st_lpips):
    # Written down from the package's own output, so that the law holds where the package can't be imported.
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp * ramp[:, None]])
    images = image.expand(3, -1, -1, -1)
    others = torch.stack([-image, image.flip(2), image.roll(8, 1)])
    assert st_lpips(images, others).tolist() == pytest.approx([0.89196950, 0.52435654, 0.27940646], rel=1e-5)


@pytest.mark.parametrize("kind, net", [(PerceptualKind.LPIPS_ALEX, "alex"), (PerceptualKind.LPIPS_VGG, "vgg")])
def test_lpips_with_trunk_from_a_file_equals_the_package(tmp_path, kind, net):
    peer = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    trunk = {f"features.{name.split('.', 1)[1]}": value for name, value in peer.net.state_dict().items()}
    with torch.device("meta"):
        classifier = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net](weights=None)
    assert set(trunk) == {name for name in classifier.state_dict() if name.startswith("features.")}
    path = tmp_path / "trunk.pth"
    torch.save(trunk, path)
    ours = perceptual_distance(PerceptualConfig(kind=kind, trunk_weights=str(path)))
    image, other = image_pair(1)
    torch.testing.assert_close(ours(image, other), peer(image, other).flatten(), rtol=1e-5, atol=1e-8)


def published_trunk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Publish a random trunk as torchvision does: the name of the file ends with the beginning of its sha256."""
    peer = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = {f"features.{name.split('.', 1)[1]}": value for name, value in peer.net.state_dict().items()}
    torch.save(trunk, folder / "trunk.pth")
    digest = hashlib.sha256((folder / "trunk.pth").read_bytes()).hexdigest()[:8]
    (folder / "trunk.pth").rename(folder / f"alexnet-{digest}.pth")
    monkeypatch.setitem(perceptual.TRUNK_URLS, "alex", f"file://{folder}/alexnet-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(folder / "cache"))
    return trunk


def test_lpips_without_a_path_fetches_the_published_trunk_once(tmp_path, monkeypatch):
    trunk = published_trunk(tmp_path, monkeypatch)
    ours = perceptual_distance(PerceptualConfig(kind=PerceptualKind.LPIPS_ALEX))
    assert torch.equal(ours.trunk.slice1[0].weight, trunk["features.0.weight"])
    next(tmp_path.glob("alexnet-*.pth")).unlink()
    again = perceptual_distance(PerceptualConfig(kind=PerceptualKind.LPIPS_ALEX))
    assert torch.equal(again(*image_pair(1)), ours(*image_pair(1)))


def test_lpips_whose_trunk_can_not_be_fetched_or_is_another_file_says_that_a_path_can_be_given(tmp_path, monkeypatch):
    published_trunk(tmp_path, monkeypatch)
    published = next(tmp_path.glob("alexnet-*.pth"))
    content = bytearray(published.read_bytes())
    content[1000] ^= 1
    published.write_bytes(content)
    with pytest.raises(ValueError, match=r"could not be fetched \(invalid hash .*give its path as perceptual.trunk"):
        perceptual_distance(PerceptualConfig(kind=PerceptualKind.LPIPS_ALEX))
    published.unlink()
    with pytest.raises(ValueError, match=r"alexnet-\w+.pth could not be fetched .*give its path as perceptual.trunk"):
        perceptual_distance(PerceptualConfig(kind=PerceptualKind.LPIPS_ALEX))


def test_published_trunks_are_those_of_torchvision():
    weights = {"alex": torchvision.models.AlexNet_Weights, "vgg": torchvision.models.VGG16_Weights}
    assert {net: kind.IMAGENET1K_V1.url for net, kind in weights.items()} == perceptual.TRUNK_URLS


def test_lpips_with_other_weights_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="lacks features.0.bias"):
        perceptual_distance(PerceptualConfig(kind=PerceptualKind.LPIPS_ALEX, trunk_weights=str(path)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": PerceptualKind.ST_LPIPS_ALEX, "trunk_weights": "alex.pth"}, "brings its own weights"),
    ],
)
def test_perceptual_config_with_unfitting_weights_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PerceptualConfig(**fields)


def test_perceptual_distance_of_an_image_to_itself_is_zero_and_else_positive(st_lpips):
    image, other = image_pair()
    assert st_lpips(image, image).tolist() == [0.0, 0.0]
    assert bool((st_lpips(image, other) > 0).all())


def test_perceptual_distance_grows_with_distortion(st_lpips):
    image, other = image_pair(1)
    distances = [st_lpips(image, torch.lerp(image, other, share)).item() for share in (0.1, 0.3, 1.0)]
    assert distances == sorted(distances)


def test_perceptual_distance_gradient_reaches_the_reconstruction_only(st_lpips):
    image, other = image_pair()
    image.requires_grad_()
    other.requires_grad_()
    st_lpips(image, other).sum().backward()
    assert image.grad is None
    assert bool((other.grad.flatten(1).norm(dim=1) > 0).all())
    assert all(not parameter.requires_grad for parameter in st_lpips.parameters())
    assert all(parameter.grad is None for parameter in st_lpips.parameters())


def test_perceptual_distance_gradient_on_flat_images_is_finite(st_lpips):
    flat = torch.ones(1, 3, 64, 64).requires_grad_()
    st_lpips(torch.zeros(1, 3, 64, 64), flat).sum().backward()
    assert bool(flat.grad.isfinite().all())


def test_perceptual_distance_of_a_row_ignores_its_neighbours(st_lpips):
    image, other = image_pair(3)
    alone = torch.cat([st_lpips(image[row : row + 1], other[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(st_lpips(image, other), alone, rtol=1e-5, atol=1e-8)


def test_st_lpips_of_tiny_images_is_refused(st_lpips):
    with pytest.raises(ValueError, match="at least 21 px"):
        st_lpips(*image_pair(1, 20, 64))


def test_no_perceptual_distance_is_zero():
    distance = perceptual_distance(PerceptualConfig(kind=PerceptualKind.NONE))
    assert distance(*image_pair()).tolist() == [0.0, 0.0]


def test_perceptual_gradient_reaches_every_parameter_of_the_decoder_and_none_of_the_trunk(st_lpips):
    torch.manual_seed(0)
    config = AutoencoderConfig(latent_channels=3, base_channels=8, channel_mult=(1, 2), norm_groups=4)
    decoder = Autoencoder(replace(config, mid_attention=False)).decoder
    image, _ = image_pair()
    st_lpips(image, decoder(torch.randn(2, 3, 32, 32))).sum().backward()
    assert [name for name, weight in decoder.named_parameters() if not float(weight.grad.abs().sum()) > 0] == []
    assert all(weight.grad is None for weight in st_lpips.parameters())
