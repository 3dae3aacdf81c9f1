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
from ldm.training.fragments import MOMENTS
from ldm.training.loop import Progress, Surroundings, train
from ldm.training.record import SilentTracker
from ldm.training.state import TrainState
from ldm.training.task import NotFiniteError
from ldm.training.window import Window
from ldm.training.world import World
from tests.ranks import alone, run_ranks
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

    def __init__(
        self, folder: Path, lost: Collection[int], network=KL, loss=SIMPLE, world: World | None = None, **loop: int
    ) -> None:
        self.world = world or alone()
        config = stage1_config(folder, network, loss, total_samples=48)
        self.config = replace(config, loop=replace(config.loop, **loop))
        self.notices: list[str] = []
        self.task = stage1_task(self.config, self.world)
        self.folder = folder
        poison(self.task, lost)

    def run(self, stops: Callable[[], bool] = lambda: False) -> TrainState:
        around = Surroundings(
            world=self.world,
            batch_size=BATCH,
            checkpoints=CheckpointStore(str(self.folder), {}, 2, self.world),
            tracker=SilentTracker(),
            report=self._note,
            should_stop=stops,
        )
        return train(self.task, DrawnLoader(self.world), self.config.loop, around)

    def _note(self, progress: Progress) -> None:
        self.notices += [progress.notice] if progress.notice else []

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("0*"))


def poison(task: AutoencoderTask, lost: Collection[int], *, is_adversary: bool = False) -> None:
    """Have a gradient be no number in the steps that begin at these samples: the autoencoder's or the adversary's."""
    plain, now = task.step, [0]
    plain_term, plain_loss = task._regularization, task.adversary._loss

    def step(batch, samples_seen, num_samples):
        now[0] = samples_seen
        return plain(batch, samples_seen, num_samples)

    def term(made, pixel_values, terms):
        value = plain_term(made, pixel_values, terms)
        return value + made.moments.sum() * float("nan") if now[0] in lost else value

    def adversary_loss(images, made, clock, terms):
        images = images * float("nan") if now[0] in lost else images
        return plain_loss(images, made, clock, terms)

    task.step = step
    if is_adversary:
        task.adversary._loss = adversary_loss
    else:
        task._regularization = term


LEARNING = replace(LOSS, perceptual_weight=0.0, lecam_weight=0.01, lecam_half_life_samples=8)


@pytest.mark.parametrize("network, loss", [(KL, SIMPLE), (KL, LEARNING), (VQ, replace(EVERYTHING, perceptual_rows=1))])
def test_a_lost_step_changes_no_weight_of_either_network_and_no_memory(tmp_path: Path, network, loss) -> None:
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
    moved = {name for name, value in state_of(task).items() if not torch.equal(before[name], value)}
    assert "autoencoder.decoder.conv_out.bias" in moved
    assert loss is not LEARNING or {"discriminator.stages.0.weight", "adversary.anchors.real"} <= moved


def test_a_lost_step_of_the_discriminator_leaves_it_and_its_memory_and_is_counted(tmp_path: Path) -> None:
    task = stage1_task(stage1_config(tmp_path, KL, LEARNING), alone())
    poison(task, {12}, is_adversary=True)
    train_steps(task, alone(), range(3))
    before = state_of(task)
    (terms,) = train_steps(task, alone(), [3])
    assert math.isnan(terms["discriminator_loss"])
    after = state_of(task)
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"autoencoder", "average"}
    train_steps(task, alone(), [4])
    assert all(value.isfinite().all() for value in state_of(task).values())


def optimizer_of(task: AutoencoderTask, folder: Path) -> Tensor:
    """Return all numbers of the autoencoder's optimizer, its steps too, as it is saved."""
    task.autoencoder.save(folder)
    held = torch.load(folder / "fragments-00000.pt", weights_only=True)["held"]
    moments = [piece["parts"][moment] for piece in held.values() for moment in MOMENTS if moment in piece["parts"]]
    return torch.cat([*moments, torch.tensor([piece["steps"] for piece in held.values()])])


def test_a_run_with_lost_steps_ends_well_and_says_how_many_there_were(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {8, 20, 24}, log_every=16, checkpoint_every=16, max_lost_steps=3)
    assert run.run().samples_seen == 48
    assert all(value.isfinite().all() for value in state_of(run.task).values())
    assert [notice.partition(":")[0] for notice in run.notices] == [
        "1 steps up to 16 samples were lost",
        "2 steps up to 32 samples were lost",
    ]
    assert "loss" in run.notices[0]
    assert run.checkpoints() == ["000000000032", "000000000048"]


def test_too_many_lost_steps_in_a_row_end_the_run_with_the_keys_of_their_rows(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {8, 20, 24, 28}, log_every=40, checkpoint_every=16, max_lost_steps=3)
    with pytest.raises(
        NotFiniteError, match=r"^3 steps in a row, from 20 to 32 samples, .*loss.*lost-0*20.json"
    ) as told:
        run.run()
    assert "--loop.max-lost-steps" in str(told.value)
    assert run.checkpoints() == ["000000000016"]
    content = json.loads((tmp_path / "lost-000000000020.json").read_text())
    assert content["samples"] == [20, 32]
    assert content["keys"] == [[f"drawn-{row}" for row in range(start, start + BATCH)] for start in (20, 24, 28)]
    allowed = Poisoned(tmp_path, {8, 20, 24, 28}, log_every=40, checkpoint_every=16, max_lost_steps=4)
    assert allowed.run().samples_seen == 48
    unbroken = Poisoned(tmp_path / "unbroken", {8, 20, 24, 28}, log_every=40, checkpoint_every=16, max_lost_steps=4)
    unbroken.run()
    expected = state_of(unbroken.task)
    assert [name for name, value in state_of(allowed.task).items() if not torch.equal(value, expected[name])] == []


def test_a_row_of_lost_steps_that_ended_before_it_was_looked_for_ends_the_run_too(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {8, 12, 16}, log_every=40, checkpoint_every=40, max_lost_steps=3)
    with pytest.raises(NotFiniteError, match=r"^3 steps in a row, from 8 to 20 samples"):
        run.run()
    assert len(json.loads((tmp_path / "lost-000000000008.json").read_text())["keys"]) == 3


def test_no_checkpoint_is_made_of_a_lost_step_and_a_stop_waits_for_a_good_one(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {12, 20, 24, 44}, log_every=16, checkpoint_every=16)
    calls = iter(range(1_000))
    assert run.run(stops=lambda: next(calls) >= 5).samples_seen == 32
    assert any(notice.startswith("no checkpoint at 16 samples") for notice in run.notices)
    assert any(notice.startswith("no checkpoint at 24 samples") for notice in run.notices)
    assert run.checkpoints() == ["000000000032"]
    assert Poisoned(tmp_path, {44}, log_every=16, checkpoint_every=16).run().samples_seen == 48
    assert run.checkpoints() == ["000000000032", "000000000048"]


def test_a_network_that_gives_no_numbers_on_held_out_rows_is_not_published(tmp_path: Path) -> None:
    run = Poisoned(tmp_path, {44}, log_every=16, checkpoint_every=16)
    run.task.validate = lambda: {"validation_psnr_db": float("nan")}
    with pytest.raises(NotFiniteError, match="validation_psnr_db is not finite: nothing is published"):
        run.run()
    assert run.checkpoints() == ["000000000016", "000000000032"]


def test_ranks_agree_on_the_end_and_the_keys_of_all_are_saved(tmp_path: Path) -> None:
    run_ranks(2, lose_steps_on_one_rank, tmp_path)
    content = json.loads((tmp_path / "lost-000000000004.json").read_text())
    assert sorted(content["keys"][0]) == [f"drawn-{row}" for row in range(4, 8)]
    assert content["samples"] == [4, 12]


def lose_steps_on_one_rank(world: World, folder: Path) -> None:
    run = Poisoned(folder, range(4, 48) if world.rank else (), world=world, log_every=16, max_lost_steps=2)
    with pytest.raises(NotFiniteError, match="2 steps in a row, from 4 to 12 samples"):
        run.run()


def test_window_means_leave_out_lost_steps() -> None:
    window = Window(0.0, 2)
    window.add({"loss": torch.tensor(1.0), "rate": 0.5}, (), 4)
    window.add({"loss": torch.tensor(float("nan")), "rate": 0.25}, (), 8)
    window.add({"loss": torch.tensor(4.0), "extra": torch.tensor(2.0), "rate": 0.0}, (), 12)
    means = window.means(torch.device("cpu"))
    assert {name: float(value) for name, value in means.items()} == {"loss": 2.5, "extra": 2.0, "rate": 0.25}
    assert window.lost() == (1, ["loss"])
    assert window.lost_in_a_row() == window.ended_at() == 0
    window.add({"loss": torch.tensor(float("inf"))}, (), 16)
    window.clear(0.0)
    window.add({"loss": torch.tensor(1.0), "rate": float("nan")}, (), 20)
    window.add({"loss": torch.tensor(1.0)}, (), 24)
    assert window.ended_at() == 20
    assert window.lost()[0] == 1
