"""The law of stage 1 on several processes: their steps are the steps of one process on the joined batches.

Perceptual term, discriminator, adaptive weight, batch norm, R1, LeCAM, guard and codebook are all at work. Everything
is done in double precision, so that the tolerance tells a wrong sum from a rounded one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.autoencoder.model import AutoencoderConfig
from ldm.losses.batch_norm import GlobalBatchNorm
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.world import World
from tests.ranks import alone, run_ranks
from tests.tiny_stage1 import EVERYTHING, KL, LOSS, VQ, stage1_config, stage1_task, state_of, train_steps

STEPS = range(4)
CASES: dict[str, tuple[AutoencoderConfig, ReconstructionConfig]] = {
    "kl": (KL, LOSS),
    "vq": (VQ, replace(LOSS, perceptual_weight=0.0)),
    "everything": (VQ, EVERYTHING),
}
Found = tuple[list[dict[str, float]], dict[str, float], dict[str, Tensor], list[float]]


def trained(case: str, world: World) -> Found:
    """Return metrics of each step, validation, the state, and the latents' statistics."""
    task = stage1_task(stage1_config("nowhere", *CASES[case]), world)
    task.perceptual.double()  # type: ignore[attr-defined]
    metrics = train_steps(task, world, STEPS)
    statistics = task.latent_statistics()
    return metrics, task.validate(), state_of(task), [*statistics.mean, *statistics.std, statistics.scale_factor]


def train_as_rank(world: World, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    for case in CASES:
        torch.save(trained(case, world), folder / f"{case}-{world.rank}.pt")
    torch.save(normalised(world), folder / f"norm-{world.rank}.pt")


def normalised(world: World) -> dict[str, Tensor]:
    """Return output, both derivatives and running statistics of batch norm on a rank's rows."""
    everything = torch.randn(8, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 3
    rows = everything[world.rank :: world.size].clone().requires_grad_()
    norm = GlobalBatchNorm(3, world.total) if world.size > 1 else torch.nn.BatchNorm2d(3)
    output = norm(rows)
    (slope,) = torch.autograd.grad(output.pow(3).sum(), rows, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), rows)
    found = {"output": output, "slope": slope, "curve": curve}
    return {name: value.detach() for name, value in found.items()} | norm.state_dict()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, train_as_rank, folder)
    return folder


@pytest.fixture
def _double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("_double_precision")
def test_two_ranks_train_as_one_with_the_joined_batch(ranks: Path, case: str) -> None:
    metrics, validation, state, statistics = trained(case, alone())
    for rank in range(2):
        found_metrics, found_validation, found_state, found_statistics = torch.load(ranks / f"{case}-{rank}.pt")
        for found, expected in zip(found_metrics, metrics, strict=True):
            assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)
        assert found_validation == pytest.approx(validation, rel=1e-6)
        assert found_statistics == pytest.approx(statistics, rel=1e-6)
        assert set(found_state) == set(state)
        for name, value in state.items():
            tolerance = 1e-6 if name.startswith("average") else 1e-8  # averages are kept in single precision
            torch.testing.assert_close(found_state[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_end_with_the_same_state_to_the_last_bit(ranks: Path, case: str) -> None:
    left, right = (torch.load(ranks / f"{case}-{rank}.pt") for rank in range(2))
    assert left[0] == right[0]
    assert left[1] == right[1]
    assert [name for name in left[2] if not torch.equal(left[2][name], right[2][name])] == []


@pytest.mark.usefixtures("_double_precision")
def test_batch_norm_over_ranks_is_that_of_the_joined_batch_with_first_and_second_derivatives(ranks: Path) -> None:
    expected = normalised(alone())
    shares = [torch.load(ranks / f"norm-{rank}.pt") for rank in range(2)]
    for name, value in expected.items():
        if name in ("output", "slope", "curve"):
            found = torch.empty_like(value)
            found[0::2], found[1::2] = shares[0][name], shares[1][name]
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9, msg=name)
        else:
            for share in shares:
                torch.testing.assert_close(share[name], value, rtol=1e-12, atol=1e-12, msg=name)
