"""Laws of rollbacks: weights that are lost come back, a kill changes nothing, and there are only so many."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.training.checkpoint import STATE_FILE, CheckpointStore
from ldm.training.loop import LoopConfig, Progress, Surroundings, train
from ldm.training.record import RECORD_FILE, Record, SilentTracker
from ldm.training.state import TrainState
from ldm.training.task import NotFiniteError
from ldm.training.world import World
from tests import tiny_stage1
from tests.ranks import alone, exit_codes, run_ranks
from tests.small_task import BATCH, TOTAL, SmallTask, small_engine, small_training
from tests.tiny_stage1 import EVERYTHING, VQ, DrawnLoader, stage1_config, stage1_task, state_of

ROLLBACK = {"max_lost_steps": 3, "max_rollbacks": 2}


class KilledError(Exception):
    """Ends a run at once, as a kill does: nothing is saved."""


class Notes:
    """What a run told, which may end it right after a rollback."""

    def __init__(self, is_killed: bool = False) -> None:
        self.notices: list[str] = []
        self._is_killed = is_killed

    def __call__(self, progress: Progress) -> None:
        self.notices += [progress.notice] if progress.notice else []
        if self._is_killed and "Rollback" in progress.notice:
            raise KilledError

    @property
    def rollbacks(self) -> list[str]:
        return [notice for notice in self.notices if "Rollback" in notice]


def names(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("0*"))


def test_weights_that_are_lost_come_back_and_the_rows_that_lost_them_are_passed_over(tmp_path: Path) -> None:
    notes, folder = Notes(), tmp_path / "run"
    task = SmallTask(small_engine(alone(), tmp_path), poisoned={32})
    tracker = Record(str(tmp_path / "record"), None, lambda _: None)
    state = small_training(task, alone(), folder, report=notes, tracker=tracker, **ROLLBACK)
    assert (state.samples_seen, state.rollbacks, state.passed_over) == (TOTAL, 1, [[32, 64]])
    assert all(value.isfinite().all() for value in task.state(tmp_path / "end").values())
    assert len(notes.rollbacks) == 1
    assert re.search(
        r"3 steps in a row, from 40 to 64 samples, .*lost-0*40.json. Rollback 1 of 2: the weights of sample 32 go on "
        "from sample 64, and the rows between are passed over",
        notes.rollbacks[0],
    )
    lost = json.loads((folder / "lost-000000000040.json").read_text())
    assert lost["samples"] == [40, 64]
    assert lost["keys"] == [[f"row-{row}" for row in range(first, first + BATCH)] for first in (40, 48, 56)]
    passed_over = json.loads((folder / "passed-over-000000000032-000000000064.json").read_text())
    assert passed_over["keys"] == [[f"row-{row}" for row in range(32, 40)], *lost["keys"]]
    entries = [json.loads(line) for line in (tmp_path / "record" / RECORD_FILE).read_text().splitlines()]
    assert [(e["metrics"]["rollbacks"], e["samples_seen"]) for e in entries if "rollbacks" in e["metrics"]] == [(1, 64)]


def test_what_follows_a_rollback_is_a_run_from_these_weights_at_that_clock(tmp_path: Path) -> None:
    """The law of the clock: learning rate, averages and data after it know nothing of the way there."""
    task = SmallTask(small_engine(alone(), tmp_path), poisoned={32})
    small_training(task, alone(), tmp_path / "run", **ROLLBACK)
    other = SmallTask(small_engine(alone(), tmp_path))
    small_training(other, alone(), tmp_path / "other", total_samples=32)
    moved = tmp_path / "other" / f"{64:012d}"
    (tmp_path / "other" / f"{32:012d}").rename(moved)
    content = json.loads((moved / STATE_FILE).read_text())
    content["state"]["samples_seen"] = 64
    (moved / STATE_FILE).write_text(json.dumps(content))
    again = SmallTask(small_engine(alone(), tmp_path))
    small_training(again, alone(), tmp_path / "other", **ROLLBACK)
    same(task.state(tmp_path / "left"), again.state(tmp_path / "right"))


@pytest.mark.parametrize("keep_every", [0, 16])
def test_a_checkpoint_that_holds_the_lost_weights_is_passed_by_at_the_second_rollback(
    tmp_path: Path, keep_every: int
) -> None:
    notes, folder = Notes(), tmp_path / "run"
    task = SmallTask(small_engine(alone(), tmp_path), poisoned={24})  # saved at 32, before a loss shows it
    state = small_training(task, alone(), folder, report=notes, **ROLLBACK, keep_every=keep_every)
    assert state.passed_over == [[32, 56], [16, 80]]
    assert all(value.isfinite().all() for value in task.state(tmp_path / "end").values())
    assert keep_every or names(folder) == [TOTAL - 16, TOTAL]


def test_the_new_checkpoint_takes_the_place_of_the_latest_so_that_an_older_one_stays(tmp_path: Path) -> None:
    task, folder = SmallTask(small_engine(alone(), tmp_path), poisoned={32}), tmp_path / "run"
    with pytest.raises(KilledError):
        small_training(task, alone(), folder, report=Notes(is_killed=True), **ROLLBACK)
    assert names(folder) == [16, 64]


@pytest.mark.parametrize("max_rollbacks", [0, 1])
def test_a_run_without_a_rollback_left_ends_with_the_keys(tmp_path: Path, max_rollbacks: int) -> None:
    poisoned = {32, 96} if max_rollbacks else {32}
    first = 104 if max_rollbacks else 40
    task = SmallTask(small_engine(alone(), tmp_path), poisoned)
    with pytest.raises(NotFiniteError, match=rf"^3 steps in a row, from {first} .*--loop.max-rollbacks"):
        small_training(task, alone(), tmp_path / "run", max_lost_steps=3, max_rollbacks=max_rollbacks)
    assert (tmp_path / "run" / f"lost-{first:012d}.json").is_file()


def test_a_run_without_a_checkpoint_to_go_back_to_ends(tmp_path: Path) -> None:
    task = SmallTask(small_engine(alone(), tmp_path), poisoned={0})
    with pytest.raises(NotFiniteError, match="^3 steps in a row, from 8 to 32 samples"):
        small_training(task, alone(), tmp_path / "run", checkpoint_every=64, **ROLLBACK)


def test_a_rollback_at_the_last_step_is_measured_and_saved_once(tmp_path: Path) -> None:
    task, folder = SmallTask(small_engine(alone(), tmp_path), poisoned={TOTAL - 32}), tmp_path / "run"
    state = small_training(task, alone(), folder, **ROLLBACK)
    assert state.passed_over == [[TOTAL - 32, TOTAL]]
    saved = json.loads((folder / f"{TOTAL:012d}" / STATE_FILE).read_text())["state"]
    assert TrainState(**saved) == state
    assert all(value.isfinite().all() for value in task.state(tmp_path / "end").values())


def test_a_checkpoint_from_before_there_were_rollbacks_is_gone_on_from(tmp_path: Path) -> None:
    task, folder = SmallTask(small_engine(alone(), tmp_path)), tmp_path / "run"
    small_training(task, alone(), folder, total_samples=32)
    path = folder / f"{32:012d}" / STATE_FILE
    content = json.loads(path.read_text())
    for name in ("rollbacks", "passed_over"):
        del content["state"][name]
    path.write_text(json.dumps(content))
    resumed = SmallTask(small_engine(alone(), tmp_path))
    assert small_training(resumed, alone(), folder).rollbacks == 0
    unbroken = SmallTask(small_engine(alone(), tmp_path))
    small_training(unbroken, alone(), tmp_path / "unbroken")
    same(unbroken.state(tmp_path / "left"), resumed.state(tmp_path / "right"))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def roll_back_on_every_engine(world: World, stages: list[int | None], folder: Path) -> None:
    for stage in stages:
        place = folder / f"stage-{stage}"
        unbroken = SmallTask(small_engine(world, place, stage), poisoned={32})
        small_training(unbroken, world, place / "unbroken", **ROLLBACK)
        killed = SmallTask(small_engine(world, place, stage), poisoned={32})
        with pytest.raises(KilledError):
            small_training(killed, world, place / "killed", report=Notes(is_killed=True), **ROLLBACK)
        again = SmallTask(small_engine(world, place, stage), poisoned={32})
        state = small_training(again, world, place / "killed", **ROLLBACK)
        assert state.passed_over == [[32, 64]], stage
        same(unbroken.weights(world), again.weights(world))
        assert all(value.isfinite().all() for value in unbroken.engine.weights().values()), stage


def test_a_run_killed_right_after_a_rollback_goes_on_bit_for_bit_on_every_engine(tmp_path: Path) -> None:
    run_ranks(2, roll_back_on_every_engine, [None, 2, 3], tmp_path)


def roll_back_and_die(world: World, folder: Path) -> None:
    def report(progress: Progress) -> None:
        if "Rollback" in progress.notice:
            os.kill(os.getpid(), signal.SIGKILL)

    task = SmallTask(small_engine(world, folder), poisoned={32})
    small_training(task, world, folder / "killed", report=report, **ROLLBACK)


def go_on_and_compare(world: World, folder: Path) -> None:
    again, unbroken = (SmallTask(small_engine(world, folder), poisoned={32}) for _ in range(2))
    assert small_training(again, world, folder / "killed", **ROLLBACK).passed_over == [[32, 64]]
    small_training(unbroken, world, folder / "unbroken", **ROLLBACK)
    if world.is_main:
        same(unbroken.state(folder / "left"), again.state(folder / "right"))


@pytest.mark.slow  # the one before stops in the same place, without a kill
def test_a_process_killed_right_after_a_rollback_loses_nothing_of_it(tmp_path: Path) -> None:
    assert exit_codes(2, roll_back_and_die, tmp_path) == [-signal.SIGKILL] * 2
    run_ranks(2, go_on_and_compare, tmp_path)


def stage1_rolled_back(folder: Path, notes: Notes) -> tuple[TrainState, dict[str, Tensor]]:
    """Train stage 1 with everything that remembers; its weights become infinite after the step at sample 20."""
    config = stage1_config(folder, VQ, replace(EVERYTHING, perceptual_rows=1), total_samples=48)
    task = stage1_task(config, alone())
    plain = task.step

    def step(batch, samples_seen, num_samples):
        terms = plain(batch, samples_seen, num_samples)
        if samples_seen == 20:
            task.autoencoder.raw.last_layer.data.fill_(float("inf"))
        return terms

    task.step = step
    around = Surroundings(
        world=alone(),
        batch_size=tiny_stage1.BATCH,
        checkpoints=CheckpointStore(str(folder), {}, 2, alone()),
        tracker=SilentTracker(),
        report=notes,
        should_stop=lambda: False,
    )
    loop = LoopConfig(total_samples=48, log_every=4, validate_every=0, checkpoint_every=8, **ROLLBACK)
    state = train(task, DrawnLoader(alone()), loop, around)
    return state, state_of(task)


def test_stage_1_comes_back_with_its_discriminator_codebook_and_guard(tmp_path: Path) -> None:
    state, unbroken = stage1_rolled_back(tmp_path / "unbroken", Notes())
    assert state.rollbacks >= 1
    assert all(value.isfinite().all() for value in unbroken.values())
    with pytest.raises(KilledError):
        stage1_rolled_back(tmp_path / "killed", Notes(is_killed=True))
    _, again = stage1_rolled_back(tmp_path / "killed", Notes())
    same(unbroken, again)
