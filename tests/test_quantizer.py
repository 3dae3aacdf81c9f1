"""Laws of the codebook: nearest vectors, straight-through gradients, the two terms of its loss."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.autoencoder import quantizer
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.autoencoder.quantizer import VectorQuantizer, code_shares, perplexity, usage
from ldm.autoencoder.regularizer import LatentKind, Regularizer, mode, sample

SMALL = AutoencoderConfig(
    latent_channels=3,
    base_channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    norm_groups=4,
    regularizer=Regularizer.VQ,
    num_codes=32,
    z_channels=5,
)


def codebook(num_codes: int = 16, channels: int = 3) -> VectorQuantizer:
    torch.manual_seed(0)
    made = VectorQuantizer(num_codes, channels).double()
    torch.nn.init.normal_(made.embedding.weight)
    return made


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_codes_are_the_nearest_by_all_distances_at_once():
    book, given = codebook(), latent(2, 3, 5, 7)
    apart = (given[:, None] - book.embedding.weight[None, :, :, None, None]).square().sum(dim=2)
    found = book(given)
    assert torch.equal(found.codes, apart.argmin(dim=1))
    assert torch.equal(found.latent, book.vectors(found.codes))


def test_codes_do_not_depend_on_how_many_positions_are_looked_at_at_once(monkeypatch):
    book, given = codebook(), latent(3, 3, 5, 7)
    whole = book.codes(given)
    for scores in (1, 16, 100):
        monkeypatch.setattr(quantizer, "MAX_SCORES", scores)
        assert torch.equal(book.codes(given), whole)


def test_quantising_twice_is_quantising_once():
    book = codebook().float()
    once = book(latent(2, 3, 4, 4).float()).latent
    again = book(once)
    assert torch.equal(again.latent, once)
    assert torch.equal(again.codebook_loss, torch.zeros(2))


def test_codes_under_autocast_are_those_of_full_precision():
    book = codebook(512).float()
    given = latent(2, 3, 16, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.codes(given), book.codes(given.double()))


def test_gradient_goes_straight_through_to_the_latent_and_not_to_the_codes():
    book, given = codebook(), latent(2, 3, 4, 4).requires_grad_()
    upstream = latent(2, 3, 4, 4).cos()
    book(given).latent.backward(upstream)
    assert torch.equal(given.grad, upstream)
    assert book.embedding.weight.grad is None


def test_both_terms_are_mean_squared_distances_and_each_moves_its_own_side():
    book, given = codebook(), latent(2, 3, 4, 4).requires_grad_()
    found = book(given)
    expected = (found.latent - given).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.codebook_loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.commitment_loss, expected, rtol=1e-12, atol=0)
    to_latent, to_codes = torch.autograd.grad(
        found.codebook_loss.sum(), (given, book.embedding.weight), retain_graph=True, allow_unused=True
    )
    assert to_latent is None
    # d/de mean (e - z)^2: each code is pulled to the mean of what it stands for.
    numbers = given[0].numel()
    pull = torch.zeros_like(book.embedding.weight)
    apart = (found.latent - given).detach().movedim(1, -1).flatten(0, 2)
    pull.index_add_(0, found.codes.flatten(), 2 * apart / numbers)
    torch.testing.assert_close(to_codes, pull, rtol=1e-12, atol=1e-12)
    to_latent, to_codes = torch.autograd.grad(
        found.commitment_loss.sum(), (given, book.embedding.weight), allow_unused=True
    )
    torch.testing.assert_close(to_latent, 2 * (given - found.latent).detach() / numbers, rtol=1e-12, atol=1e-12)
    assert to_codes is None


def test_descending_the_codebook_term_moves_codes_onto_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    given = (centres[torch.arange(300) % 3] + 0.01 * torch.randn(300, 2)).T.reshape(1, 2, 30, 10)
    book = VectorQuantizer(3, 2)
    with torch.no_grad():
        book.embedding.weight.copy_(torch.tensor([[0.3, 0.1], [-0.2, 0.1], [0.0, 0.4]]))
    optimizer = torch.optim.Adam(book.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        book(given).codebook_loss.mean().backward()
        optimizer.step()
    torch.testing.assert_close(book.embedding.weight.detach(), centres, atol=0.01, rtol=0)


def test_usage_and_perplexity_of_known_codes():
    codes = torch.tensor([[[0, 1], [2, 3]]])
    assert usage(codes, 8) == 0.5
    assert perplexity(codes, 8) == pytest.approx(4.0, rel=1e-12)
    assert perplexity(torch.zeros(1, 2, 2, dtype=torch.long), 8) == pytest.approx(1.0)
    uneven = torch.tensor([0, 0, 0, 1])
    assert perplexity(uneven, 2) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert code_shares(uneven, 3).tolist() == [0.75, 0.25, 0.0]


def test_a_new_codebook_is_uniform_within_one_over_its_size():
    weight = VectorQuantizer(500, 4).embedding.weight
    assert weight.abs().max() <= 1 / 500
    assert weight.std().item() == pytest.approx(1 / 500 / math.sqrt(3), rel=0.05)


def test_broken_numbers_stay_broken():
    given = latent(1, 3, 2, 2)
    given[0, 0, 0, 0] = float("nan")
    assert codebook()(given).latent.isnan().any()


def made() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def test_vq_autoencoder_encodes_to_unquantised_latents_and_its_decoder_quantises():
    model, image = made(), torch.randn(2, 3, 16, 24)
    moments = model.encode(image)
    assert moments.shape == (2, 3, 4, 6)
    words = model.quantize(moments).latent
    assert (words - moments).abs().max() > 0.1
    assert torch.equal(model.decode(moments), model.decode(words, is_quantized=True))
    assert torch.equal(model.decode(moments), model.decode(words))
    assert (model.decode(moments, is_quantized=True) - model.decode(moments)).abs().max() > 0.01
    assert torch.equal(model.reconstruct(image), model.decode(moments))


def test_vq_forward_takes_no_noise_and_reaches_every_parameter_with_its_terms():
    model, image = made(), torch.randn(2, 3, 16, 16)
    found = model(image)
    assert torch.equal(found.image, model.decode(found.moments))
    assert found.kl is None
    terms = found.quantized
    assert torch.equal(terms.codes, model.quantize.codes(found.moments))
    loss = found.image.square().mean() + (terms.codebook_loss + 0.25 * terms.commitment_loss).mean()
    loss.backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert [name for name in silent if "to_k.bias" not in name] == []
    with pytest.raises(ValueError, match="vq_latents are not drawn"):
        model(image, torch.zeros(2, 3, 4, 4))


def test_vq_moments_are_the_latent_and_kl_needs_noise():
    moments = torch.randn(2, 4, 3, 3)
    assert mode(moments, LatentKind.VQ_LATENTS) is moments
    assert sample(moments, None, LatentKind.VQ_LATENTS) is moments
    with pytest.raises(ValueError, match=r"must have the latent's shape \(2, 2, 3, 3\), got None"):
        sample(moments, None)
