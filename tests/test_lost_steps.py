"""Laws of lost steps: what is not finite changes nothing, is counted, and ends the run when it does not pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.training.autoencoder_task import AutoencoderTask
from ldm.training.checkpoint import CheckpointStore
from ldm.training.loop import Progress, Surroundings, train
from ldm.training.record import SilentTracker
from ldm.training.state import TrainState
from ldm.training.window import Window
from tests.ranks import alone
from tests.tiny_stage1 import (
    BATCH,
    EVERYTHING,
    KL,
    LOSS,
    VQ,
    DrawnLoader,
    stage1_config,
    stage1_task,
    state_of,
    train_steps,
)

SIMPLE = replace(LOSS, perceptual_weight=0.0, adversarial_weight=0.0)


class Poisoned:
    """A tiny stage-1 training whose loss is not a number at some samples."""

    def __init__(self, folder: Path, lost: Collection[int], network=KL, loss=SIMPLE, **loop: int) -> None:
        config = stage1_config(folder, network, loss, total_samples=48)
        self.config = replace(config, loop=replace(config.loop, **loop))
        self.notices: list[str] = []
        self.task = stage1_task(self.config, alone())
        self.folder = folder
        poison(self.task, lost)

    def run(self, stops: Callable[[], bool] = lambda: False) -> TrainState:
        around = Surroundings(
            world=alone(),
            batch_size=BATCH,
            checkpoints=CheckpointStore(str(self.folder), {}, 2, alone()),
            tracker=SilentTracker(),
            report=self._note,
            should_stop=stops,
        )
        return train(self.task, DrawnLoader(alone()), self.config.loop, around)

    def _note(self, progress: Progress) -> None:
        self.notices += [progress.notice] if progress.notice else []

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("0*"))


def poison(task: AutoencoderTask, lost: Collection[int]) -> None:
    """Have the loss, and so every gradient, be no number in the steps that begin at these samples."""
    plain, now = task.step, [0]
    plain_term = task._regularization

    def step(batch, samples_seen, num_samples):
        now[0] = samples_seen
        return plain(batch, samples_seen, num_samples)

    def term(made, pixel_values, terms):
        value = plain_term(made, pixel_values, terms)
        if now[0] in lost:
            made.image.register_hook(lambda gradient: gradient * float("nan"))
            value = value + made.moments.sum() * float("nan")
        return value

    task.step, task._regularization = step, term


@pytest.mark.parametrize("network, loss", [(KL, SIMPLE), (VQ, replace(EVERYTHING, perceptual_rows=1))])
def test_a_lost_step_changes_no_weight_and_no_memory(tmp_path: Path, network, loss) -> None:
    task = stage1_task(stage1_config(tmp_path, network, loss), alone())
    poison(task, {12})
    train_steps(task, alone(), range(3))
    before, optimizer = state_of(task), optimizer_of(task, tmp_path / "before")
    (terms,) = train_steps(task, alone(), [3])
    assert math.isnan(terms["grad_norm"])
    after = state_of(task)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name for name in changed if not name.startswith("average.")] == []
    assert torch.equal(optimizer, optimizer_of(task, tmp_path / "after"))
    train_steps(task, alone(), [4])
    name = "autoencoder.decoder.conv_out.bias"
    assert not torch.equal(before[name], state_of(task)[name])


def optimizer_of(task: AutoencoderTask, folder: Path) -> Tensor:
    """Return all numbers of the autoencoder's optimizer, its steps too, as it is saved."""
    task.autoencoder.save(folder)
    state = torch.load(folder / "local.pt", weights_only=True)["optimizer"]["state"]
    return torch.cat([value.flatten() for numbers in state.values() for value in numbers.values()])


def test_a_run_with_lost_steps_ends_well_and_says_how_many_there_were(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {8, 20, 24}, log_every=16, checkpoint_every=16, max_lost_steps=3)
    assert run.run().samples_seen == 48
    assert all(value.isfinite().all() for value in state_of(run.task).values())
    assert [notice.partition(":")[0] for notice in run.notices] == [
        "1 steps up to 16 samples were left out",
        "2 steps up to 32 samples were left out",
    ]
    assert "loss" in run.notices[0]
    assert run.checkpoints() == ["000000000032", "000000000048"]


def test_too_many_lost_steps_in_a_row_end_the_run_with_the_keys_of_their_rows(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {8, *range(20, 48)}, log_every=16, checkpoint_every=16, max_lost_steps=3)
    with pytest.raises(FloatingPointError, match=r"(?s)loss.*in the last 3 steps, from 20 samples on.*lost-0*20.json"):
        run.run()
    assert run.checkpoints() == ["000000000016"]
    told = json.loads((tmp_path / "lost-000000000020.json").read_text())
    assert told["samples"] == [20, 32]
    assert told["keys"] == [[f"drawn-{row}" for row in range(start, start + BATCH)] for start in (20, 24, 28)]
    mended = Poisoned(tmp_path, {8}, log_every=16, checkpoint_every=16)
    assert mended.run().samples_seen == 48
    never = Poisoned(tmp_path / "never", {8}, log_every=16, checkpoint_every=16)
    never.run()
    expected = state_of(never.task)
    assert [name for name, value in state_of(mended.task).items() if not torch.equal(value, expected[name])] == []


def test_no_checkpoint_is_made_of_a_lost_step_and_no_run_ends_with_one(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {12, 44}, log_every=16, checkpoint_every=16)
    with pytest.raises(FloatingPointError, match="in the last 1 steps, from 44 samples on"):
        run.run()
    assert run.checkpoints() == ["000000000032"]
    assert any(notice.startswith("no checkpoint at 16 samples") for notice in run.notices)


def test_window_means_leave_out_lost_steps() -> None:
    window = Window(0.0, 2)
    window.add({"loss": torch.tensor(1.0), "rate": 0.5}, 4)
    window.add({"loss": torch.tensor(float("nan")), "rate": 0.25}, 8)
    window.add({"loss": torch.tensor(4.0), "extra": torch.tensor(2.0), "rate": 0.0}, 12)
    means = window.means(torch.device("cpu"))
    assert {name: float(value) for name, value in means.items()} == {"loss": 2.5, "extra": 2.0, "rate": 0.25}
    assert window.lost() == (1, ["loss"])
    assert window.lost_in_a_row() == window.ended_at() == 0
    window.add({"loss": torch.tensor(float("inf"))}, 16)
    window.clear(0.0)
    window.add({"loss": torch.tensor(1.0), "rate": float("nan")}, 20)
    window.add({"loss": torch.tensor(1.0)}, 24)
    assert window.ended_at() == 20
    assert window.lost()[0] == 1
