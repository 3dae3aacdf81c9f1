"""Laws of the autoencoder and its KL regulariser."""

from __future__ import annotations

import dataclasses
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.distributions import kl_divergence as kl_of_distributions

from ldm.autoencoder import zoo
from ldm.autoencoder.blocks import DoublingConv
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.autoencoder.regularizer import Regularizer, kl_divergence, mode, sample

SMALL = AutoencoderConfig(latent_channels=3, base_channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)


def made(config: AutoencoderConfig = SMALL) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(config)


ZOO = [
    ("kl_f2", None, (2, 128, 128)),
    ("kl_f4", 55_312_063, (3, 64, 64)),
    ("kl_f8", 83_653_863, (4, 32, 32)),
    ("kl_f16", 69_610_963, (16, 16, 16)),
    ("kl_f32", 103_880_131, (64, 8, 8)),
    ("vq_f2", None, (2, 128, 128)),
    ("vq_f2_n64", None, (2, 128, 128)),
    ("vq_f4", 55_322_782, (3, 64, 64)),
    ("vq_f4_noattn", 53_219_486, (3, 64, 64)),
    ("vq_f8", 67_717_295, (4, 32, 32)),
    ("vq_f8_n256", 67_652_783, (4, 32, 32)),
    ("vq_f16", 69_593_371, (8, 16, 16)),
    ("emoji_f4", 681_911, (4, 64, 64)),
    ("small_f4", 1_499_127, (4, 64, 64)),
    ("small_f8", 2_196_963, (16, 32, 32)),
]
"""Name, published number of parameters (none was published for factor 2), and latent of a 256-pixel image."""


def counted_parameters(config: AutoencoderConfig) -> int:
    """Count from the paper's description, one layer after the other."""

    def conv(inside: int, outside: int, side: int = 3) -> int:
        return inside * outside * side**2 + outside

    def norm(width: int) -> int:
        return 2 * width

    def block(inside: int, outside: int) -> int:
        shortcut = conv(inside, outside, 1) if inside != outside else 0
        return norm(inside) + conv(inside, outside) + norm(outside) + conv(outside, outside) + shortcut

    def attention(width: int) -> int:
        return norm(width) + 4 * conv(width, width, 1)

    def level(inside: int, outside: int, blocks: int, factor: int) -> int:
        attentions = blocks * attention(outside) if factor in config.attention_factors else 0
        return block(inside, outside) + (blocks - 1) * block(outside, outside) + attentions

    widths, z = [config.base_channels * mult for mult in config.channel_mult], config.latent_channels
    coarsest, num_codes = widths[-1], config.num_codes
    middle = 2 * block(coarsest, coarsest) + (attention(coarsest) if config.mid_attention else 0)
    moments = z if num_codes else 2 * z
    encoder = conv(3, widths[0]) + middle + norm(coarsest) + conv(coarsest, moments)
    decoder = conv(z, coarsest) + middle + norm(widths[0]) + conv(widths[0], 3)
    for number, width in enumerate(widths):
        finer, coarser = widths[max(number - 1, 0)], widths[min(number + 1, len(widths) - 1)]
        encoder += level(finer, width, config.num_res_blocks, 2**number)
        decoder += level(coarser, width, config.num_res_blocks + 1, 2**number)
        encoder += conv(width, width) if number < len(widths) - 1 else 0
        decoder += conv(width, width) if number else 0
    return encoder + decoder + conv(moments, moments, 1) + conv(z, z, 1) + num_codes * z


@pytest.mark.parametrize("name, num_parameters, latent", ZOO)
def test_named_autoencoder_has_the_exact_parameter_count(name, num_parameters, latent):
    config = getattr(zoo, name)()
    with torch.device("meta"):
        model = Autoencoder(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == counted_parameters(config)
    assert num_parameters in (None, count)
    assert f"{count:,}" in getattr(zoo, name).__doc__


@pytest.mark.parametrize("name, num_parameters, latent", ZOO)
def test_named_autoencoder_gives_latents_of_the_published_shape(name, num_parameters, latent):
    config = getattr(zoo, name)()
    with torch.device("meta"):
        model = Autoencoder(config)
        moments = model.encode(torch.empty(2, 3, 256, 256))
        found = mode(moments, config.latent_kind)
        assert found.shape == (2, *latent)
        assert model.decode(found).shape == (2, 3, 256, 256)
    assert 256 // config.factor == latent[1]


def test_zoo_names_every_public_function_here():
    named = {
        name for name, kind in vars(zoo).items() if isinstance(kind, FunctionType) and kind.__module__ == zoo.__name__
    }
    assert named == {name for name, _, _ in ZOO}


@pytest.mark.parametrize(
    "name, digest",
    [
        ("kl_f4", "a4431a701e"),
        ("kl_f8", "8b7d9792d4"),
        ("emoji_f4", "0e8dc54fbc"),
    ],
)
def test_digest_of_kl_configs_is_that_of_before_there_was_vq(name, digest):
    assert getattr(zoo, name)().digest().startswith(digest)
    assert "regularizer" not in getattr(zoo, name)().to_dict()


@pytest.mark.parametrize("sides", [(16, 16), (8, 24), (20, 4)])
def test_autoencoder_for_any_sides_divides_by_the_factor_and_multiplies_back(sides):
    model, image = made(), torch.randn(2, 3, *sides)
    latent_sides = (sides[0] // 4, sides[1] // 4)
    reconstruction, moments, *_ = model(image, torch.zeros(2, 3, *latent_sides))
    assert moments.shape == (2, SMALL.moment_channels, *latent_sides)
    assert reconstruction.shape == image.shape


def test_forward_is_encode_then_sample_then_decode():
    model, image, noise = made(), torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4)
    found = model(image, noise)
    assert torch.equal(found.moments, model.encode(image))
    assert torch.equal(found.image, model.decode(sample(found.moments, noise)))
    assert torch.equal(found.kl, kl_divergence(found.moments))
    assert found.quantized is None


def test_rows_of_a_batch_do_not_see_each_other():
    model, image = made(), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model.encode(image)[1:2], model.encode(image[1:2]), atol=1e-6, rtol=1e-5)


def test_reconstruction_gradient_reaches_every_parameter():
    model = made()
    reconstruction = model(torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4))
    (reconstruction.image.square().mean() + reconstruction.kl.mean()).backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike, which the softmax cancels.
    assert [name for name in silent if "to_k.bias" not in name] == []


def test_last_layer_is_the_parameter_that_makes_the_image():
    model = made()
    assert dict(model.named_parameters())["decoder.conv_out.weight"] is model.last_layer
    with torch.no_grad():
        model.last_layer.zero_()
    image = model.decode(torch.randn(1, 3, 2, 2))
    torch.testing.assert_close(image, model.decoder.conv_out.bias[None, :, None, None].expand_as(image))


def test_middle_attention_is_all_that_its_switch_removes():
    with_attention, without = made(), made(dataclasses.replace(SMALL, mid_attention=False))
    names = {name for name, _ in with_attention.named_parameters()} - {name for name, _ in without.named_parameters()}
    assert {name.split(".attentions.0.")[0] for name in names} == {"encoder.mid_block", "decoder.mid_block"}


@pytest.mark.parametrize("channels, height, width", [(1, 1, 1), (3, 4, 4), (5, 3, 7), (256, 2, 3)])
def test_doubling_convolution_equals_doubling_then_convolving(channels, height, width):
    torch.manual_seed(0)
    layer = DoublingConv(channels).double()
    features = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    doubled = F.interpolate(features, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(doubled, layer.weight, layer.bias, padding=1)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(layer(features), expected, atol=1e-12, rtol=1e-12)
    leaves = (features, layer.weight, layer.bias)
    for ours, theirs in zip(
        torch.autograd.grad(layer(features), leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_kl_of_the_standard_normal_is_zero():
    assert torch.equal(kl_divergence(torch.zeros(3, 8, 4, 4)), torch.zeros(3))


def test_kl_equals_the_sum_of_torch_distributions_kl():
    moments = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = Normal(mean, log_variance.mul(0.5).exp())
    expected = kl_of_distributions(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    torch.testing.assert_close(kl_divergence(moments), expected.sum(dim=(1, 2, 3)), atol=1e-12, rtol=1e-12)


def test_kl_of_half_precision_moments_is_summed_in_single_precision():
    moments = torch.full((1, 8, 64, 64), 0.1).half()
    exact = kl_divergence(moments.double())
    torch.testing.assert_close(kl_divergence(moments).double(), exact, rtol=1e-5, atol=0)


def test_sample_without_noise_is_the_mode():
    moments = torch.randn(2, 8, 4, 4)
    assert torch.equal(sample(moments, torch.zeros(2, 4, 4, 4)), mode(moments))


def test_samples_have_the_posterior_mean_and_variance():
    torch.manual_seed(0)
    moments = torch.tensor([0.5, -1.0, 0.3, -2.0], dtype=torch.float64).reshape(1, 4, 1, 1).expand(200_000, 4, 1, 1)
    drawn = sample(moments, torch.randn(200_000, 2, 1, 1, dtype=torch.float64)).squeeze()
    torch.testing.assert_close(drawn.mean(dim=0), torch.tensor([0.5, -1.0], dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(
        drawn.var(dim=0).log(), torch.tensor([0.3, -2.0], dtype=torch.float64), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("log_variance, clamped", [(1000.0, 20.0), (-1000.0, -30.0)])
def test_sample_and_kl_clamp_the_log_variance(log_variance, clamped):
    wild, tame = (torch.cat([torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), v)], 1) for v in (log_variance, clamped))
    assert torch.equal(sample(wild, torch.ones(1, 2, 2, 2)), sample(tame, torch.ones(1, 2, 2, 2)))
    assert torch.equal(kl_divergence(wild), kl_divergence(tame))
    assert kl_divergence(wild).isfinite().all()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"norm_groups": 3}, "norm_groups must divide every level's width, got 3 and 8"),
        ({"channel_mult": (2, 4)}, "channel_mult must start with 1"),
        ({"channel_mult": ()}, "channel_mult must start with 1"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ({"attention_factors": (2, 8)}, r"attention_factors must be among the levels' \(1, 2, 4\), got \[8\]"),
        ({"attention_factors": (4, 2)}, r"attention_factors must ascend, got \(4, 2\)"),
        ({"num_codes": 8}, "belong to vq, got 8 and None for kl"),
        ({"z_channels": 8}, "belong to vq, got 0 and 8 for kl"),
        ({"regularizer": Regularizer.VQ}, "num_codes must be at least 1 for vq, got 0"),
        ({"regularizer": Regularizer.VQ, "num_codes": 8, "z_channels": 3}, "left out where it is latent_channels"),
    ],
)
def test_impossible_config_is_refused_with_its_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)


def test_unfit_inputs_are_refused_with_their_shapes():
    model = made()
    with pytest.raises(ValueError, match=r"multiples of 4, got \(16, 18\)"):
        model.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match="3 channels here, got 4"):
        model.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\), got \(1, 1, 4, 4\)"):
        sample(torch.zeros(1, 6, 4, 4), torch.zeros(1, 1, 4, 4))
