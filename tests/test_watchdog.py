"""Laws of the watchdog: a rank that hangs is named, all end with their stacks saved, a run that moves is let alone."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ldm.training.heartbeats import Phase, Place, last_of
from ldm.training.loop import LoopConfig, Progress
from ldm.training.watchdog import EXIT_HUNG
from ldm.training.world import World
from tests.ranks import exit_codes, run_ranks
from tests.small_task import (
    BATCH,
    STUCK_AT,
    TOTAL,
    SmallLoader,
    SmallRows,
    SmallTask,
    StuckLoader,
    small_engine,
    small_training,
)

LIMIT_SECONDS = 4.0


class StoppedTask(SmallTask):
    """A task whose process is stopped whole on one rank, its watchdog with it."""

    def step(self, batch: SmallRows, samples_seen: int, num_samples: int) -> dict[str, Any]:
        if batch.keys[0] == f"row-{STUCK_AT + 1}":
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().step(batch, samples_seen, num_samples)


def train_with(world: World, folder: Path, kind: str) -> None:
    """Train as one of two ranks; what it tells goes to a file of the rank's own."""

    def report(progress: Progress) -> None:
        if progress.is_alarm:
            (folder / f"told-{world.rank}").write_text(progress.notice)

    task_kind = StoppedTask if kind == "stopped" else SmallTask
    loader = StuckLoader(world) if kind == "stuck" else SmallLoader(world)
    task = task_kind(small_engine(world, folder))
    (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
    small_training(
        task, world, folder / "run", loader=loader, report=report, checkpoint_every=16, hang_minutes=LIMIT_SECONDS / 60
    )


def reports(folder: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "run").glob("hang-*.json")]
    return {report["rank"]: report for report in found}


def test_both_ranks_end_when_one_gets_no_data_naming_it_and_may_be_started_again(tmp_path: Path) -> None:
    assert exit_codes(2, train_with, tmp_path, "stuck") == [EXIT_HUNG, EXIT_HUNG]
    found = reports(tmp_path)
    assert {rank: (report["phase"], report["samples_seen"]) for rank, report in found.items()} == {
        0: (Phase.STEP, STUCK_AT),
        1: (Phase.DATA, STUCK_AT),
    }
    assert (tmp_path / "run" / f"hang-{STUCK_AT:012d}-rank1.json").is_file()
    assert any("wait_for_what_never_comes" in line for line in found[1]["stacks"])
    (told,) = tmp_path.glob("told-*")
    message = told.read_text()
    assert message.startswith("rank 1 (host ")
    assert f"has been waiting for data at sample {STUCK_AT} for" in message
    assert f"has been in the step at sample {STUCK_AT} for" in message.partition("rank 0")[2]
    assert str(tmp_path / "run") in message
    assert any(report["message"] == message for report in found.values())
    # and what starts them again goes on from the last checkpoint
    assert sorted(path.name for path in (tmp_path / "run").glob("0*"))[-1] == f"{STUCK_AT:012d}"
    assert exit_codes(2, train_with, tmp_path, "healthy") == [0, 0]
    assert (tmp_path / "run" / "latest").read_text() == f"{TOTAL:012d}"


@pytest.mark.slow
def test_a_rank_that_is_stopped_whole_is_named_by_the_other(tmp_path: Path) -> None:
    def end_the_stopped() -> None:
        while 0 not in reports(tmp_path):
            threading.Event().wait(0.1)
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)

    threading.Thread(target=end_the_stopped, daemon=True).start()
    assert exit_codes(2, train_with, tmp_path, "stopped") == [EXIT_HUNG, -signal.SIGKILL]
    message = (tmp_path / "told-0").read_text()
    assert message.startswith("rank 1 (host ")
    assert "no longer answers and was last " in message.partition("; rank 0 (host ")[0]


def train_longer_than_the_limit(world: World, folder: Path) -> None:
    begun = time.monotonic()
    state = small_training(
        SmallTask(small_engine(world, folder)),
        world,
        folder / "run",
        total_samples=1 << 40,
        checkpoint_every=64 * BATCH,
        hang_minutes=LIMIT_SECONDS / 60,
        should_stop=lambda: time.monotonic() - begun > 2 * LIMIT_SECONDS,
    )
    assert 0 < state.samples_seen < 1 << 40
    assert not list((folder / "run").glob("hang-*"))
    assert not [thread for thread in threading.enumerate() if thread.name in ("watchdog", "heartbeats")]


def test_a_run_that_moves_is_left_alone_however_long_it_takes(tmp_path: Path) -> None:
    run_ranks(2, train_longer_than_the_limit, tmp_path)


def place(rank: int, phase: Phase, samples_seen: int, **fields: Any) -> Place:
    return Place(rank=rank, host=f"node{rank}", phase=phase, samples_seen=samples_seen, **{"seconds": 90.0, **fields})


@pytest.mark.parametrize(
    "places, ranks",
    [
        ([place(0, Phase.STEP, 72), place(1, Phase.DATA, 72), place(2, Phase.STEP, 72)], [1]),
        ([place(0, Phase.CHECKPOINT, 72), place(1, Phase.DATA, 72)], [0]),
        ([place(0, Phase.DATA, 72), place(1, Phase.STEP, 64)], [1]),
        ([place(0, Phase.DATA, 64), place(1, Phase.STEP, 72, is_silent=True)], [1]),
        ([place(0, Phase.STEP, 64), place(1, Phase.STEP, 64)], []),
        ([place(0, Phase.DATA, 64)], [0]),
    ],
)
def test_the_rank_that_holds_up_the_others_is_the_least_far_or_the_one_that_is_silent(
    places: list[Place], ranks: list[int]
) -> None:
    assert [each.rank for each in last_of(places)] == ranks


def test_a_place_reads_as_a_sentence_and_comes_back_from_its_text() -> None:
    one = place(1, Phase.DATA, 6400, seconds=1860.0)
    assert one.sentence() == "rank 1 (host node1) has been waiting for data at sample 6,400 for 31.0 min"
    assert Place.from_json(one.to_json()) == one


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="loop.hang_minutes can't be negative, got -1"):
        LoopConfig(hang_minutes=-1.0)
