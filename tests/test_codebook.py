"""Laws of a codebook's training: the two forms of its loss, moving averages, dead codes that come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.autoencoder.codebook import (
    Chosen,
    CodebookConfig,
    CodebookMemory,
    CodebookUpdate,
    CommitmentForm,
    codebook_loss,
)
from ldm.autoencoder.quantizer import VectorQuantizer

AVERAGING = CodebookConfig(update=CodebookUpdate.MOVING_AVERAGE, half_life_samples=16)
REVIVING = CodebookConfig(revive_after_samples=12)


def quantizer(num_codes: int = 6, channels: int = 3) -> VectorQuantizer:
    torch.manual_seed(0)
    made = VectorQuantizer(num_codes, channels).double()
    torch.nn.init.normal_(made.embedding.weight)
    return made


def latent(rows: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 3, 2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen_by(book: VectorQuantizer, given: torch.Tensor) -> Chosen:
    return Chosen(latent=given, codes=book.codes(given), rows=torch.arange(len(given)))


@pytest.mark.parametrize(
    "form, codebook_weight, commitment_weight", [(CommitmentForm.FIXED, 2.0, 0.5), (CommitmentForm.LEGACY, 0.5, 2.0)]
)
def test_beta_stands_before_the_commitment_and_in_the_legacy_form_before_the_other_term(
    form, codebook_weight, commitment_weight
):
    book, given = quantizer(), latent().requires_grad_()
    found = book(given)
    loss = codebook_loss(CodebookConfig(weight=2.0, beta=0.25, form=form), found)
    # The authors' code: mean (sg[q] - z)^2 and mean (q - sg[z])^2 over all numbers.
    chosen = book.vectors(found.codes)
    codebook, commitment = (chosen - given.detach()).square().mean(), (chosen.detach() - given).square().mean()
    expected = codebook_weight * codebook + commitment_weight * commitment
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    leaves = (given, book.embedding.weight)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_moving_averages_free_the_codes_of_gradients_and_drop_the_codebook_term():
    book, given = quantizer(), latent().requires_grad_()
    CodebookMemory(book, AVERAGING, seed=0)
    found = book(given)
    loss = codebook_loss(AVERAGING, found)
    torch.testing.assert_close(loss, 0.25 * found.commitment_loss.mean(), rtol=1e-12, atol=0)
    loss.backward()
    assert book.embedding.weight.grad is None
    assert bool((given.grad != 0).all())


def test_moving_averages_equal_their_definition():
    book = quantizer()
    memory = CodebookMemory(book, AVERAGING, seed=0)
    counts, sums = torch.ones(6, dtype=torch.float64), book.embedding.weight.detach().clone()
    for step in range(1, 4):
        chosen = chosen_by(book, latent(seed=step))
        memory.update(book, chosen, (4 * step, 4))
        decay = 0.5 ** (4 / 16)
        for code in range(6):
            vectors = chosen.latent.movedim(1, -1)[chosen.codes == code]
            counts[code] = decay * counts[code] + (1 - decay) * len(vectors)
            sums[code] = decay * sums[code] + (1 - decay) * vectors.sum(dim=0)
        smoothed = (counts + 1e-5) / (counts.sum() + 6 * 1e-5) * counts.sum()
        torch.testing.assert_close(book.embedding.weight.detach(), sums / smoothed[:, None], rtol=1e-12, atol=1e-12)


def test_moving_averages_settle_on_the_clusters_means():
    torch.manual_seed(0)
    centres = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    given = centres[torch.arange(40) % 3] + 0.01 * torch.randn(40, 3, dtype=torch.float64)
    pictures = given.reshape(4, 2, 5, 3).movedim(-1, 1)
    book = quantizer(num_codes=3)
    with torch.no_grad():
        book.embedding.weight.copy_(0.3 * centres)
    memory = CodebookMemory(book, AVERAGING, seed=0)
    for step in range(1, 200):
        memory.update(book, chosen_by(book, pictures), (4 * step, 4))
    means = torch.stack([given[torch.arange(40) % 3 == code].mean(dim=0) for code in range(3)])
    torch.testing.assert_close(book.embedding.weight.detach(), means, rtol=1e-5, atol=1e-5)


def far_code(book: VectorQuantizer) -> None:
    """Put the last code where nothing chooses it."""
    with torch.no_grad():
        book.embedding.weight[-1] = 1_000.0


@pytest.mark.parametrize("update", CodebookUpdate)
def test_a_code_unused_for_so_many_samples_becomes_an_encoder_output_of_the_batch(update):
    book = quantizer()
    memory = CodebookMemory(book, replace(REVIVING, update=update), seed=0)
    for step in range(1, 4):
        far_code(book)
        chosen = chosen_by(book, latent(seed=step))
        metrics = memory.update(book, chosen, (4 * step, 4))
        if step < 3:
            assert metrics["codebook_revived"] == 0
    assert metrics["codebook_revived"] >= 1
    outputs = chosen.latent.movedim(1, -1).flatten(0, 2)
    assert bool((outputs == book.embedding.weight[-1]).all(dim=1).any())
    assert bool((book.codes(chosen.latent) == 5).any())


def test_codes_in_use_stay_where_they_are_when_others_are_revived():
    book = quantizer()
    far_code(book)
    memory = CodebookMemory(book, REVIVING, seed=0)
    before, chosen = book.embedding.weight.detach().clone(), chosen_by(book, latent(rows=12))
    used = torch.bincount(chosen.codes.flatten(), minlength=6) > 0
    memory.update(book, chosen, (12, 12))
    assert torch.equal(book.embedding.weight[used], before[used])
    assert not bool((book.embedding.weight[~used] == before[~used]).all(dim=1).any())


def test_revived_codes_are_drawn_by_seed_and_clock_alone():
    def revived(seed: int, clock: int) -> torch.Tensor:
        book = quantizer()
        far_code(book)
        CodebookMemory(book, REVIVING, seed).update(book, chosen_by(book, latent(rows=12)), (clock, 12))
        return book.embedding.weight.detach()[-1]

    assert torch.equal(revived(0, 12), revived(0, 12))
    assert not torch.equal(revived(0, 12), revived(1, 12))
    assert not torch.equal(revived(0, 12), revived(0, 24))


def test_more_dead_codes_than_positions_are_all_revived():
    book = quantizer(num_codes=50)
    memory = CodebookMemory(book, replace(REVIVING, revive_after_samples=1), seed=0)
    chosen = chosen_by(book, latent(rows=1))
    metrics = memory.update(book, chosen, (1, 1))
    outputs = chosen.latent.movedim(1, -1).flatten(0, 2)
    used = torch.bincount(chosen.codes.flatten(), minlength=50) > 0
    assert metrics["codebook_revived"] == (~used).sum()
    assert all(bool((outputs == vector).all(dim=1).any()) for vector in book.embedding.weight[~used])


def test_what_is_logged_is_the_use_of_the_codes_of_this_batch():
    book = quantizer()
    chosen = replace(chosen_by(book, latent()), codes=torch.arange(40).reshape(4, 2, 5) % 3)
    metrics = CodebookMemory(book, CodebookConfig(), seed=0).update(book, chosen, (4, 4))
    assert float(metrics["codebook_usage"]) == 0.5
    assert float(metrics["codebook_perplexity"]) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"beta": -1.0}, "can't be negative, got 1.0, -1.0 and 0"),
        ({"revive_after_samples": -1}, "can't be negative, got 1.0, 0.25 and -1"),
        ({"half_life_samples": 0}, "half_life_samples must be at least 1, got 0"),
    ],
)
def test_an_impossible_codebook_training_is_refused_with_its_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        CodebookConfig(**wrong)
