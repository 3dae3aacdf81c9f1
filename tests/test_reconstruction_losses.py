"""Laws of the first stage's loss: pixels and KL, and the terms of an adversarial training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.autoencoder import zoo
from ldm.autoencoder.regularizer import kl_divergence
from ldm.losses.autoencoder import (
    AdversarialLoss,
    PixelLoss,
    accuracy,
    adaptive_weight,
    anchor_penalty,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    hinge_discriminator_loss,
    kl_weight_on_means,
    pixel_loss,
    reconstruction_loss,
    vanilla_discriminator_loss,
)
from ldm.losses.batch_norm import GlobalBatchNorm
from ldm.losses.discriminator import Discriminator


def image_pair(batch: int = 2, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    seeded = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 3, side, side, generator=seeded, dtype=torch.float64) * 2 - 1
    return image, (image + 0.3 * torch.randn(image.shape, generator=seeded, dtype=torch.float64)).clamp(-1, 1)


# --- pixels and KL


def test_pixel_losses_are_the_mean_absolute_and_the_mean_squared_error():
    image, other = image_pair()
    for kind, peer in ((PixelLoss.L1, nn.functional.l1_loss), (PixelLoss.L2, nn.functional.mse_loss)):
        torch.testing.assert_close(pixel_loss(kind, image, other), peer(other, image), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name, expected", [("kl_f4", 6.25e-8), ("kl_f8", 2.08e-8), ("kl_f16", 2.08e-8), ("kl_f32", 2.08e-8)]
)
def test_the_papers_kl_weight_on_sums_is_the_published_one_on_means(name, expected):
    config = getattr(zoo, name)()
    latent_elements = config.latent_channels * (256 // config.factor) ** 2
    found = kl_weight_on_means(1e-6, latent_elements=latent_elements, pixel_values=3 * 256 * 256)
    assert found == pytest.approx(expected, rel=2e-3)


def test_a_loss_in_sums_is_the_loss_in_means_with_the_weight_on_means():
    image, other = image_pair()
    moments = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kl, distance = kl_divergence(moments), torch.tensor([0.25, 0.5], dtype=torch.float64)
    sums = (reconstruction_loss(image, other, distance, 0.7) + 1e-6 * kl).mean()
    weight = kl_weight_on_means(1e-6, latent_elements=moments[0].numel() // 2, pixel_values=image[0].numel())
    mean_kl = (kl / (moments[0].numel() // 2)).mean()
    means = pixel_loss(PixelLoss.L1, image, other) + 0.7 * distance.mean() + weight * mean_kl
    torch.testing.assert_close(sums / image[0].numel(), means, rtol=1e-12, atol=0)


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


def test_either_discriminator_loss_is_the_one_of_its_name():
    real, fake = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert discriminator_loss(AdversarialLoss.HINGE, real, fake) == hinge_discriminator_loss(real, fake)
    assert discriminator_loss(AdversarialLoss.VANILLA, real, fake) == vanilla_discriminator_loss(real, fake)


def test_gradient_penalty_of_a_linear_discriminator_is_its_squared_weight():
    weight = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    image = torch.randn(4, 3, 8, 8, dtype=torch.float64).requires_grad_()
    penalty = gradient_penalty((image * weight).sum(dim=(1, 2, 3)).reshape(4, 1, 1, 1), image)
    torch.testing.assert_close(penalty, weight.square().sum(), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(slope, 2 * weight.detach(), rtol=1e-12, atol=1e-12)


def test_gradient_penalty_equals_finite_differences_of_a_discriminator():
    torch.manual_seed(0)
    judge = Discriminator(2, 1).double()
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    penalty = gradient_penalty(judge(leaf := image.clone().requires_grad_()), leaf)
    squares = torch.zeros((), dtype=torch.float64)
    for place in range(image.numel()):
        moved = image.flatten().repeat(2, 1)
        moved[0, place] += 1e-5
        moved[1, place] -= 1e-5
        ahead, behind = (judge(pixels.reshape(image.shape)).sum() for pixels in moved)
        squares = squares + ((ahead - behind).detach() / 2e-5) ** 2
    assert penalty.item() == pytest.approx(squares.item() / 2, rel=1e-5)


def test_anchor_penalty_equals_its_closed_form_and_pulls_each_side_to_the_others_average():
    real, fake = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1), torch.tensor([-1.0, 0.0]).reshape(2, 1, 1, 1)
    # (1 + 2)^2 and (3 + 2)^2 from the fake average -2; (-1 - 4)^2 and (0 - 4)^2 from the real one 4
    assert anchor_penalty(real, fake, torch.tensor(4.0), torch.tensor(-2.0)).item() == 17.0 + 20.5


def test_accuracy_counts_the_patches_that_are_taken_for_what_they_are():
    real, fake = torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert accuracy(real.reshape(1, 1, 2, 2), fake.reshape(1, 1, 2, 2)).item() == 0.5


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
    image, other = image_pair()
    distance = torch.tensor([0.25, 0.5], dtype=torch.float64)
    # The authors add the distance to every pixel value's error and then sum.
    expected = ((image - other).abs() + 0.7 * distance[:, None, None, None]).flatten(1).sum(dim=1)
    torch.testing.assert_close(reconstruction_loss(image, other, distance, 0.7), expected, rtol=1e-12, atol=0)


# --- batch norm


@pytest.mark.parametrize("is_training", [True, False])
def test_batch_norm_of_one_process_is_torchs_with_its_gradients_and_running_statistics(is_training):
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(4, lambda values: values).double(), nn.BatchNorm2d(4).double()
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.running_mean)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(3, 4, 5, 6, dtype=torch.float64) * 7 + 100
    upstream = torch.randn_like(features)
    found = []
    for norm in (ours.train(is_training), theirs.train(is_training)):
        leaf = features.clone().requires_grad_()
        output = norm(leaf)
        output.backward(upstream)
        found.append([output.detach(), leaf.grad, norm.weight.grad, norm.bias.grad, *norm.state_dict().values()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_batch_norm_of_large_means_keeps_its_variance_in_single_precision():
    features = torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(0)) + 3_000
    output = GlobalBatchNorm(2, lambda values: values)(features)
    assert output.std().item() == pytest.approx(1.0, rel=1e-2)
