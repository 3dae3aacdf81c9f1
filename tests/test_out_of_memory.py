"""Laws of memory that runs out: a person is told what takes less, whichever memory it was; other errors stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.training.out_of_memory import OutOfMemoryError
from tests.ranks import alone
from tests.small_task import BATCH, GreedyTask, raise_as_a_gpu_does, small_engine, small_training


@pytest.mark.parametrize(
    "ask, said",
    [
        (raise_as_a_gpu_does, "no memory is left on cpu: .* CUDA out of memory. Tried to allocate 2.00 GiB"),
        (lambda: torch.empty(1 << 52), "no memory is left on machine .* DefaultCPUAllocator: can't allocate memory"),
        (lambda: np.empty(1 << 52), "no memory is left on machine .* Unable to allocate"),
    ],
)
def test_the_error_says_where_it_was_and_what_takes_less(tmp_path: Path, ask: Callable[[], object], said: str) -> None:
    task = GreedyTask(small_engine(alone(), tmp_path))
    task.ask = ask
    with pytest.raises(OutOfMemoryError, match=said) as told:
        small_training(task, alone(), tmp_path / "run")
    assert isinstance(told.value, ValueError)
    assert f"in the step at sample {2 * BATCH}" in str(told.value)
    for remedy in ("--engine.micro-batch-size", "infra/deepspeed/zero2.json", "zero2-offload.json"):
        assert remedy in str(told.value)
    assert (tmp_path / "run" / "latest").read_text() == f"{2 * BATCH:012d}"


def test_another_error_of_the_same_kind_stays_what_it_is(tmp_path: Path) -> None:
    task = GreedyTask(small_engine(alone(), tmp_path))
    task.ask = lambda: torch.zeros(2) + torch.zeros(3)
    with pytest.raises(RuntimeError, match="must match the size") as told:
        small_training(task, alone(), tmp_path / "run")
    assert not isinstance(told.value, ValueError)
