"""What an optimizer remembers fits its weights, however either lies in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, LocalEngine
from ldm.training.optim import OptimConfig
from tests.ranks import alone

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def engine_of(layout: torch.memory_format) -> LocalEngine:
    torch.manual_seed(0)
    network = nn.Conv2d(4, 8, 3).to(memory_format=layout)
    return LocalEngine(network, OptimConfig(lr=1e-2), EmaConfig(half_life_samples=8), EngineConfig(), alone())


def step(engine: LocalEngine, number: int) -> None:
    weight = engine.raw.weight
    wanted = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    engine.update([lambda: (weight - wanted).square().sum()], 1e-2, (8 * number, 8))


@pytest.mark.parametrize("saved_in", LAYOUTS)
@pytest.mark.parametrize("loaded_in", LAYOUTS)
def test_training_goes_on_alike_in_another_memory_layout(
    tmp_path: Path, saved_in: torch.memory_format, loaded_in: torch.memory_format
) -> None:
    unbroken = engine_of(saved_in)
    step(unbroken, 1)
    step(unbroken, 2)
    unbroken.save(tmp_path)
    resumed = engine_of(loaded_in)
    resumed.load(tmp_path)
    step(unbroken, 3)
    step(resumed, 3)
    assert resumed.raw.weight.is_contiguous(memory_format=loaded_in)
    torch.testing.assert_close(resumed.raw.weight, unbroken.raw.weight, rtol=0, atol=1e-7)
    for name, average in unbroken.weights().items():
        torch.testing.assert_close(resumed.weights()[name], average, rtol=0, atol=1e-7)
