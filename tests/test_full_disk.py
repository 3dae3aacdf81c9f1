"""Laws of a disk that fills up amid a checkpoint: nothing of it is left, and the last one is gone on from."""

from __future__ import annotations

import errno
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ldm.training.full_disk import OtherRankError
from ldm.training.saved_state import Resumable
from ldm.training.snapshot import Snapshot
from ldm.training.world import World
from tests.ranks import alone, run_ranks
from tests.small_task import TOTAL, SmallTask, small_engine, small_training

TOO_MUCH = 60_000_000
"""Bytes; the small disk has 40 MB."""


class Swelling:
    """A part of a run whose state has grown since the last checkpoint, so that the room of that is not enough."""

    def __init__(self, name: str, sizes: Mapping[int, int]) -> None:
        self._name = name
        self._sizes = sizes
        self._num_saves = 0

    def snapshot(self) -> Snapshot:
        self._num_saves += 1
        content = torch.zeros(self._sizes.get(self._num_saves, 0), dtype=torch.uint8)
        return Snapshot(files={f"{self._name}.pt": content})

    def load(self, folder: Path) -> None:
        torch.load(folder / f"{self._name}.pt", weights_only=True)


class SwellingTask(SmallTask):
    """A task with such a part."""

    part: Swelling

    @property
    def engines(self) -> Mapping[str, Resumable]:
        return {"network": self.engine, "part": self.part}


def swelling_task(world: World, folder: Path, sizes: Mapping[int, int]) -> SwellingTask:
    task = SwellingTask(small_engine(world, folder))
    task.part = Swelling(f"part-{world.rank}", sizes)
    return task


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_fills_up_in_the_middle_leaves_the_last_checkpoint_which_is_gone_on_from(
    tmp_path: Path, small_disk: Path, in_background: bool
) -> None:
    root = small_disk / "run"
    with pytest.raises(
        ValueError,
        match=rf"{root} took no more while the checkpoint of sample 48 was written \(rank 0: .*MB were free\): make "
        "room and start the same command again; it goes on from sample 32",
    ):
        task = swelling_task(alone(), tmp_path, {3: TOO_MUCH})
        small_training(task, alone(), root, saves_in_background=in_background)
    assert contents(root) == ["000000000016", "000000000032", "latest"]
    again = swelling_task(alone(), tmp_path, {})
    assert small_training(again, alone(), root).samples_seen == TOTAL
    unbroken = swelling_task(alone(), tmp_path, {})
    small_training(unbroken, alone(), tmp_path / "unbroken")
    left, right = unbroken.state(tmp_path / "left"), again.state(tmp_path / "right")
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def fill_up_on_one_rank(world: World, folder: Path) -> None:
    if world.rank:  # a quota on the size of files stands in for its disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    for in_background in (False, True):
        root = folder / f"run-{in_background}"
        task = swelling_task(world, folder, {2: 1_000_000 * world.rank})
        with pytest.raises(ValueError, match=r"checkpoint of sample 32 was written \(rank 1: .*goes on from sample 16"):
            small_training(task, world, root, saves_in_background=in_background)
        world.barrier()
        assert contents(root) == ["000000000016", "latest"]


class Unwritable:
    """What can't be written, as if the disk below it were gone."""

    def __reduce__(self) -> tuple[object, ...]:
        raise OSError(errno.EIO, "the disk is gone")


class Vanishing(Swelling):
    """A part of a run whose disk is gone at the second save."""

    def snapshot(self) -> Snapshot:
        swollen = super().snapshot()
        return Snapshot(files=dict.fromkeys(swollen.files, Unwritable())) if self._num_saves == 2 else swollen


def lose_the_disk_on_one_rank(world: World, folder: Path) -> None:
    for in_background in (False, True):
        root = folder / f"lost-{in_background}"
        task = swelling_task(world, folder, {})
        if world.rank:
            task.part = Vanishing("part-1", {})
        kind, said = (OSError, "the disk is gone") if world.rank else (OtherRankError, "^rank 1: OSError .*is gone")
        with pytest.raises(kind, match=said):
            small_training(task, world, root, saves_in_background=in_background)
        world.barrier()
        assert (root / "latest").read_text() == "000000000016"


def lack_a_disk_on_one_rank(world: World, folder: Path) -> None:
    fill_up_on_one_rank(world, folder)
    lose_the_disk_on_one_rank(world, folder)


def test_all_ranks_end_with_the_words_of_the_one_whose_disk_is_full_or_gone(tmp_path: Path) -> None:
    run_ranks(2, lack_a_disk_on_one_rank, tmp_path)


def test_what_a_killed_writer_left_is_taken_away(tmp_path: Path) -> None:
    small_training(SmallTask(small_engine(alone(), tmp_path)), alone(), tmp_path / "run", total_samples=32)
    left_over = tmp_path / "run" / ".000000000048.partial"
    left_over.mkdir()
    (left_over / "fragments-00000.pt").write_bytes(bytes(100))
    small_training(SmallTask(small_engine(alone(), tmp_path)), alone(), tmp_path / "run", total_samples=40)
    assert not left_over.exists()
