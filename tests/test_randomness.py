"""Draws are functions of (seed, purpose, sample) and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.randomness import Draw, generator, normal, uniform


@pytest.mark.parametrize("seed", [0, 7, -3, 2**63 + 5])
def test_uniform_equals_numpys_own_philox_bit_for_bit(seed: int) -> None:
    samples = np.random.default_rng(0).integers(0, 2**62, 50)
    for draw in Draw:
        for sub in (0, 3):
            one_by_one = [generator(seed, draw, int(sample), sub).random() for sample in samples]
            assert uniform(seed, draw, samples, sub).tolist() == one_by_one


def test_a_rows_draws_do_not_depend_on_its_batch() -> None:
    together = normal(1, Draw.NOISE, range(10), (4, 3))
    alone = torch.cat([normal(1, Draw.NOISE, [row], (4, 3)) for row in range(10)])
    assert torch.equal(together, alone)
    assert torch.equal(uniform(1, Draw.CAPTION, [3, 9]), uniform(1, Draw.CAPTION, range(10))[[3, 9]])


def test_purposes_seeds_and_samples_are_independent_streams() -> None:
    base = normal(1, Draw.NOISE, [5], (1000,))
    others = [normal(2, Draw.NOISE, [5], (1000,)), normal(1, Draw.POSTERIOR, [5], (1000,))]
    others += [normal(1, Draw.NOISE, [6], (1000,)), normal(1, Draw.NOISE, [5], (1000,), sub=1)]
    for other in others:
        assert abs(torch.corrcoef(torch.cat([base, other]))[0, 1]) < 0.12


def test_draws_have_the_moments_of_their_distributions() -> None:
    drawn = normal(3, Draw.NOISE, range(200), (1000,))
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert drawn.std().item() == pytest.approx(1, abs=0.01)
    shares = uniform(3, Draw.DROPOUT, range(100_000))
    assert (shares < 0.1).double().mean().item() == pytest.approx(0.1, abs=0.005)
