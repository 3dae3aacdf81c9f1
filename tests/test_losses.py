"""Laws of the losses: diffusion, perceptual, adversarial."""

from __future__ import annotations

import importlib
import sys
import types

import lpips
import pytest
import torch
import torchvision
from torch import nn

from ldm.diffusion.process import Prediction, clean_from, corrupt, target
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.losses.autoencoder import (
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
    reconstruction_loss,
    vanilla_discriminator_loss,
)
from ldm.losses.diffusion import Weighting, loss_weight, per_sample_loss
from ldm.losses.discriminator import Discriminator
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
    snr = SCHEDULE.alphas_cumprod[[0, 120, 400, 999]] / (1 - SCHEDULE.alphas_cumprod[[0, 120, 400, 999]])
    capped = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))
    expected = {Prediction.CLEAN: capped, Prediction.NOISE: capped / snr, Prediction.VELOCITY: capped / (snr + 1)}
    weight = loss_weight(Weighting.MIN_SNR, kind, at).flatten()
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
        losses.append(per_sample_loss(kind, same, clean, noise, at, Weighting.MIN_SNR))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-9, atol=0)


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
    loss = per_sample_loss(kind, target(kind, clean, noise, at), clean, noise, at, weighting)
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


def test_lpips_with_other_weights_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="lacks features.0.bias"):
        perceptual_distance(PerceptualConfig(kind=PerceptualKind.LPIPS_ALEX, trunk_weights=str(path)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": PerceptualKind.LPIPS_VGG}, "needs trunk_weights"),
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


# --- adversarial


@pytest.mark.parametrize("num_layers, count", [(3, 2_765_633), (2, 663_361)])
def test_discriminator_has_the_published_number_of_parameters(num_layers, count):
    assert sum(parameter.numel() for parameter in Discriminator(num_layers=num_layers).parameters()) == count


@pytest.mark.parametrize("num_layers, patches", [(3, 6), (2, 14)])
def test_discriminator_judges_overlapping_patches(num_layers, patches):
    assert Discriminator(8, num_layers)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, patches, patches)


def test_discriminator_patch_sees_seventy_pixels():
    network = Discriminator(4).eval()
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    network(image)[0, 0, 15, 15].backward()
    seen = image.grad.abs().sum(dim=(0, 1)) > 0
    assert (int(seen.any(dim=0).sum()), int(seen.any(dim=1).sum())) == (70, 70)


def test_hinge_loss_equals_its_closed_form():
    real = torch.tensor([2.0, 0.5, -1.0, 1.0]).reshape(1, 1, 2, 2)
    fake = torch.tensor([-2.0, 0.0, 1.0, -0.5]).reshape(1, 1, 2, 2)
    # relu(1 - real) = 0, 0.5, 2, 0; relu(1 + fake) = 0, 1, 2, 0.5
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))
    assert generator_loss(fake).item() == pytest.approx(1.5 / 4)


def test_vanilla_loss_of_an_undecided_discriminator_is_log_two():
    undecided = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    assert vanilla_discriminator_loss(undecided, undecided).item() == pytest.approx(0.6931471805599453, abs=1e-12)


def test_adaptive_weight_of_a_linear_decoder_equals_its_closed_form():
    seeded = torch.Generator().manual_seed(0)
    draws = torch.randn(3, 5, 7, generator=seeded, dtype=torch.float64)
    latent, pull, push = draws
    layer = nn.Parameter(torch.randn(7, 7, generator=seeded, dtype=torch.float64))
    decoded = latent @ layer
    # d/dW sum(G * (Z W)) = Z^T G for any constant G.
    weight = adaptive_weight((pull * decoded).sum(), (push * decoded).sum(), layer)
    expected = (latent.T @ pull).norm() / ((latent.T @ push).norm() + 1e-4)
    assert weight.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not weight.requires_grad


def test_adaptive_weight_balances_the_gradients():
    layer = nn.Parameter(torch.ones(4, dtype=torch.float64))
    reconstruction, generator = (layer * 3).sum(), (layer * torch.arange(1, 5)).sum()
    total = reconstruction + adaptive_weight(reconstruction, generator, layer) * generator
    total.backward()
    push = layer.grad - 3
    assert float(push.norm()) == pytest.approx(float(torch.full((4,), 3.0).norm()), rel=1e-4)


def test_adaptive_weight_is_clamped():
    layer = nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert adaptive_weight((layer * 1e6).sum(), (layer * 0).sum(), layer).item() == 1e4
    assert adaptive_weight((layer * 0).sum(), layer.sum(), layer).item() == 0.0


def test_reconstruction_loss_is_the_sum_over_pixel_values():
    image, other = (pixels.double() for pixels in image_pair())
    distance = torch.tensor([0.25, 0.5], dtype=torch.float64)
    # The authors add the distance to every pixel value's error and then sum.
    expected = ((image - other).abs() + 0.7 * distance[:, None, None, None]).flatten(1).sum(dim=1)
    torch.testing.assert_close(reconstruction_loss(image, other, distance, 0.7), expected, rtol=1e-12, atol=0)
