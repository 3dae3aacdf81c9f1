"""Laws of the scores, the features, the Fréchet distance and the protocol."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image as PillowImage

from ldm.evaluation.features import FD_EFFNETLITE0, FeatureKind, classifier_input, feature_network, levels
from ldm.evaluation.frechet import FeatureStatistics, frechet_distance, statistics_of
from ldm.evaluation.protocol import EvaluationProtocol
from ldm.evaluation.scores import psnr, ssim
from ldm.samplers.sample import SamplerConfig


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(batch: int = 2, height: int = 40, width: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    smooth = torch.nn.functional.avg_pool2d(randn(batch, 3, height + 4, width + 4), 5, stride=1) * 2
    return smooth.clamp(-1, 1), (smooth + 0.2 * randn(batch, 3, height, width, seed=1)).clamp(-1, 1)


# --- scores


def test_psnr_of_a_constant_error_equals_its_closed_form():
    image = torch.zeros(2, 3, 8, 8)
    error = torch.tensor([0.02, 0.2]).reshape(2, 1, 1, 1)
    # Pixels span 2, so an error of 0.02 is a hundredth: 40 dB.
    assert psnr(image, image + error).tolist() == pytest.approx([40.0, 20.0], abs=1e-5)
    assert psnr(image, image).tolist() == [math.inf, math.inf]


def test_ssim_of_constant_images_equals_its_closed_form():
    left, right = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    constant = (0.01 * 2) ** 2
    expected = (2 * 0.5 * -0.25 + constant) / (0.5**2 + 0.25**2 + constant)
    assert ssim(left, right).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_equals_its_definition_by_scipy():
    image, other = pictures()
    expected = [ssim_by_scipy(image[row].numpy(), other[row].numpy()) for row in range(2)]
    assert ssim(image, other).tolist() == pytest.approx(expected, rel=1e-10)


def ssim_by_scipy(left: np.ndarray, right: np.ndarray) -> float:
    def windowed(values: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(values, sigma=(0, 1.5, 1.5), radius=(0, 5, 5))[:, 5:-5, 5:-5]

    mean_left, mean_right = windowed(left), windowed(right)
    variances = windowed((left - right) ** 2) - (mean_left - mean_right) ** 2
    covariance = windowed(left * right) - mean_left * mean_right
    luminance = (2 * mean_left * mean_right + 0.02**2) / (mean_left**2 + mean_right**2 + 0.02**2)
    structure = (2 * covariance + 0.06**2) / (variances + 2 * covariance + 0.06**2)
    return float((luminance * structure).mean())


def test_ssim_is_symmetric_and_one_for_equal_images():
    image, other = pictures()
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    torch.testing.assert_close(ssim(image, other), ssim(other, image), rtol=1e-12, atol=0)
    assert bool((ssim(image, other) < 1).all())


def test_ssim_of_tiny_images_is_refused():
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(torch.zeros(1, 3, 10, 32), torch.zeros(1, 3, 10, 32))


# --- features


@pytest.fixture(scope="module")
def network():
    return feature_network(FeatureKind.EFFNETLITE0)


def test_features_have_their_shape_and_repeat_exactly(network):
    image, _ = pictures(3, 48, 48)
    features = network(image.float())
    assert features.shape == (3, 1280)
    assert features.dtype is torch.float32
    assert bool((features.std(dim=0) > 0).any())
    assert torch.equal(features, network(image.float()))
    assert not features.requires_grad


def test_features_of_a_row_ignore_its_neighbours(network):
    image = pictures(2, 48, 48)[0].float()
    alone = torch.cat([network(image[:1]), network(image[1:])])
    torch.testing.assert_close(network(image), alone, rtol=1e-4, atol=1e-4)


def test_features_of_an_image_equal_those_of_its_saved_file(network):
    image = pictures(1, 48, 48)[0].float()
    read_back = levels(image).float() / 127.5 - 1
    assert torch.equal(network(image), network(read_back))


def test_feature_network_knows_its_classes():
    # The trunk is trained, not drawn: a flat grey and a checkerboard lie further apart than two greys.
    grey, lighter = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.05)
    board = torch.zeros(1, 3, 8, 8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = 1
    board = board.repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
    network = feature_network(FeatureKind.EFFNETLITE0)
    near = (network(grey) - network(lighter)).norm()
    assert float((network(grey) - network(board)).norm()) > 5 * float(near)


@pytest.mark.parametrize("side", [64, 224, 500])
def test_classifier_input_equals_pillow_resizing(side):
    image = pictures(1, side, side)[0] * 0.6  # clear of black and white, where Pillow clips after each axis
    shown = PillowImage.fromarray(levels(image)[0].permute(1, 2, 0).numpy())
    resized = np.asarray(shown.resize((224, 224), PillowImage.Resampling.BICUBIC), dtype=np.float64)
    ours = classifier_input(image)[0].permute(1, 2, 0).double().numpy() * 128 + 127
    # Pillow rounds to whole levels after each axis.
    assert np.abs(ours - resized).max() < 1.5
    assert np.abs(ours - resized).mean() < 0.4


def test_classifier_input_spans_the_range_of_the_package():
    black, white = classifier_input(torch.full((1, 3, 32, 32), -1.0)), classifier_input(torch.ones(1, 3, 32, 32))
    assert float(black.mean()) == pytest.approx((0 - 0.498) / 0.502, abs=2e-3)
    assert float(white.mean()) == pytest.approx((1 - 0.498) / 0.502, abs=2e-3)


def test_levels_of_eight_bit_pixels_are_exact():
    expected = torch.arange(256).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).to(torch.uint8)
    assert torch.equal(levels(expected.float() / 127.5 - 1), expected)
    assert levels(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))[0, 0, 0].tolist() == [0, 255]


# --- Fréchet distance


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(mean=mean, covariance=covariance, num_images=1000)


def random_covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    root = randn(size, rank, seed=seed)
    return root @ root.T / rank


@pytest.mark.parametrize("num_images", [20, 400])
def test_frechet_distance_of_a_set_with_itself_is_zero(num_images):
    statistics = statistics_of(randn(num_images, 64) * 3 + 1)
    scale = float(statistics.covariance.trace())
    assert 0 <= frechet_distance(statistics, statistics) < 1e-10 * scale


def test_frechet_distance_of_two_diagonal_gaussians_equals_its_closed_form():
    left, right = randn(16).square() + 0.1, randn(16, seed=1).square() + 0.1
    shift = randn(16, seed=2)
    distance = frechet_distance(
        gaussian(shift, torch.diag(left)), gaussian(torch.zeros(16).double(), torch.diag(right))
    )
    expected = shift.square().sum() + (left.sqrt() - right.sqrt()).square().sum()
    assert distance == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_of_scaled_gaussians_equals_its_closed_form():
    covariance = random_covariance(12, 40, 0)
    mean = randn(12)
    distance = frechet_distance(gaussian(mean, covariance), gaussian(mean + 2, 9 * covariance))
    assert distance == pytest.approx(float(12 * 4 + 4 * covariance.trace()), rel=1e-12)


def test_frechet_distance_equals_scipys_formula():
    left = gaussian(randn(30), random_covariance(30, 90, 1))
    right = gaussian(randn(30, seed=3), random_covariance(30, 70, 2))
    root = scipy.linalg.sqrtm(left.covariance.numpy() @ right.covariance.numpy()).real
    shift = float((left.mean - right.mean).square().sum())
    expected = shift + float(left.covariance.trace() + right.covariance.trace()) - 2 * np.trace(root)
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_singular_covariances_equals_the_limit():
    # Rank 5 in 30 dimensions: the formula with a matrix root is ill-conditioned there, so add a little and let it go.
    left, right = random_covariance(30, 5, 1), random_covariance(30, 5, 2)
    mean = torch.zeros(30, dtype=torch.float64)
    exact = frechet_distance(gaussian(mean, left), gaussian(mean, right))
    ridge = 1e-12 * torch.eye(30, dtype=torch.float64)
    assert exact == pytest.approx(
        frechet_distance(gaussian(mean, left + ridge), gaussian(mean, right + ridge)), rel=1e-5
    )


def test_frechet_distance_is_symmetric_and_invariant_under_rotation():
    left, right = statistics_of(randn(50, 8) * 2), statistics_of(randn(60, 8, seed=1) + 0.5)
    rotation = torch.linalg.qr(randn(8, 8, seed=2))[0]
    turned = [gaussian(rotation @ one.mean, rotation @ one.covariance @ rotation.T) for one in (left, right)]
    distance = frechet_distance(left, right)
    assert frechet_distance(right, left) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(*turned) == pytest.approx(distance, rel=1e-10)


def test_statistics_equal_numpys_and_record_the_number_of_images():
    features = randn(37, 5)
    statistics = statistics_of(features.float())
    np.testing.assert_allclose(statistics.mean, features.float().double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.float().double(), rowvar=False), rtol=1e-12)
    assert statistics.num_images == 37


@pytest.mark.parametrize(
    "features, message", [(torch.zeros(1, 3), "at least 2"), (torch.full((4, 3), math.nan), "finite")]
)
def test_statistics_of_senseless_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        statistics_of(features)


def test_frechet_distance_of_different_features_is_refused():
    with pytest.raises(ValueError, match="got 3 and 4"):
        frechet_distance(statistics_of(randn(9, 3)), statistics_of(randn(9, 4)))


# --- protocol


def test_protocol_digest_changes_with_whatever_changes_a_number():
    base = EvaluationProtocol(num_images=100)
    others = [
        EvaluationProtocol(num_images=101),
        EvaluationProtocol(num_images=100, seed=1),
        EvaluationProtocol(num_images=100, guidance_scale=2.0),
        EvaluationProtocol(num_images=100, image_size=32),
        EvaluationProtocol(num_images=100, split="train"),
        EvaluationProtocol(num_images=100, sampler=SamplerConfig(num_steps=51)),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 7
    assert base.digest() == EvaluationProtocol(num_images=100).digest()


def test_protocol_yaml_round_trip_is_exact():
    protocol = EvaluationProtocol(num_images=100, sampler=SamplerConfig(num_steps=20), guidance_scale=3.0)
    assert EvaluationProtocol.from_yaml(protocol.to_yaml()) == protocol
    assert protocol.features.value == FD_EFFNETLITE0


@pytest.mark.parametrize(
    "fields", [{"num_images": 1}, {"num_images": 9, "guidance_scale": -1.0}, {"num_images": 9, "image_size": 0}]
)
def test_protocol_with_senseless_values_is_refused(fields):
    with pytest.raises(ValueError, match="must"):
        EvaluationProtocol(**fields)
