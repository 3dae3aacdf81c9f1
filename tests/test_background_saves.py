"""Laws of saving in the background: the same bytes while training goes on, and nothing that a kill spoils."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm import storage
from ldm.training.checkpoint import LATEST_FILE, STATE_FILE
from ldm.training.record import RECORD_FILE, Record
from ldm.training.saved_state import Resumable, SavedState
from ldm.training.snapshot import HostMemory, Snapshot
from ldm.training.world import World
from tests.ranks import alone, exit_codes, run_ranks
from tests.small_task import BATCH, TOTAL, SmallRows, SmallTask, collect, small_engine, small_training
from tests.tiny_stage1 import EVERYTHING, VQ, stage1_config, stage1_task

WAIT_SECONDS = 60.0


class Sluggish:
    """Something to save that does something while it is written."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def __reduce__(self) -> tuple[Any, ...]:
        self._act()
        return int, (0,)


class SluggishPart:
    """A part of a run which acts while it is written, at the saves of some numbers."""

    def __init__(self, name: str, acts: Mapping[int, Callable[[], object]]) -> None:
        self._name = name
        self._acts = acts
        self._num_saves = 0

    def snapshot(self) -> Snapshot:
        self._num_saves += 1
        return Snapshot(files={self._name: Sluggish(self._acts.get(self._num_saves, lambda: None))})

    def load(self, folder: Path) -> None:
        assert (folder / self._name).is_file()


class SluggishTask(SmallTask):
    """A task with such a part, which tells when a step begins."""

    part: SluggishPart
    begins: Callable[[int], object] = staticmethod(lambda _: None)

    @property
    def engines(self) -> Mapping[str, Resumable]:
        return {"network": self.engine, "part": self.part}

    def step(self, batch: SmallRows, samples_seen: int, num_samples: int) -> dict[str, Tensor | float]:
        self.begins(samples_seen)
        return super().step(batch, samples_seen, num_samples)


def sluggish_task(world: World, folder: Path, acts: Mapping[int, Callable[[], object]]) -> SluggishTask:
    task = SluggishTask(small_engine(world, folder))
    task.part = SluggishPart(f"part-{world.rank}", acts)
    return task


def published(folder: Path) -> dict[int, dict[str, Any]]:
    """Return what each checkpoint's `state.json` holds, by its samples, without the seconds that training took."""
    found = {int(path.name): json.loads((path / STATE_FILE).read_text()) for path in sorted(folder.glob("0*"))}
    for content in found.values():
        del content["state"]["train_seconds"]
    return found


def digests(snapshots: Mapping[str, Snapshot], folder: Path) -> dict[str, str]:
    for part, snapshot in snapshots.items():
        snapshot.write(folder / part)
    return {path: storage.sha256_of(str(folder / path)) for path in storage.list_files(str(folder))}


def pieces() -> Snapshot:
    """Return tensors in every relation that a state has them in."""
    whole = torch.randn(4, 6)
    plain = {"some": whole[1:3], "rest": whole[3:], "turned": whole.T, "empty": torch.empty(0), "flag": torch.tensor(1)}
    return Snapshot(files={"pieces.pt": {**plain, "listed": [whole, (3, "three")], "half": torch.randn(3).half()}})


def test_a_copy_is_saved_as_the_same_bytes_whatever_becomes_of_the_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = stage1_task(stage1_config(tmp_path, VQ, replace(EVERYTHING, perceptual_rows=1)), alone())
    small = SmallTask(small_engine(alone(), tmp_path))
    small_training(small, alone(), tmp_path / "run", total_samples=16)
    norm = nn.BatchNorm1d(3)
    parts = {**task.engines, **small.engines, "norm": SavedState(norm, alone())}
    live = {name: part.snapshot() for name, part in parts.items()} | {"pieces": pieces()}
    memory = HostMemory()
    copies = memory.copied(live)
    before = digests(live, tmp_path / "live")
    assert len(before) == len(parts) + 1
    for weight in small.engine.raw.parameters():
        weight.data.fill_(0.0)
    norm.running_mean.fill_(7.0)
    assert digests(copies, tmp_path / "copy") == before
    changed = digests(live, tmp_path / "live")
    assert {path for path in before if before[path] != changed[path]} == {"network/fragments-00000.pt", "norm/state.pt"}
    again = memory.copied(live)
    assert place_of(again["pieces"]) == place_of(copies["pieces"])  # the memory of the first copy, not more of it
    assert digests(again, tmp_path / "again") == changed


def place_of(snapshot: Snapshot) -> int:
    place: int = snapshot.files["pieces.pt"]["some"].data_ptr()
    return place


def test_training_goes_on_while_it_is_saved_and_what_was_begun_counts_when_it_is_written(tmp_path: Path) -> None:
    go_on, root = threading.Event(), tmp_path / "run"
    seen: dict[int, list[int]] = {}

    def begins(samples_seen: int) -> None:
        seen[samples_seen] = sorted(published(root))
        if samples_seen == 24:
            go_on.set()  # had the save of sample 16 been waited for, nobody would come here

    task = sluggish_task(alone(), tmp_path, {1: lambda: go_on.wait(WAIT_SECONDS)})
    task.begins = begins
    record = Record(str(tmp_path / "record"), None, lambda _: None)
    small_training(task, alone(), root, tracker=record, saves_in_background=True, keep_checkpoints=100)
    assert go_on.is_set()
    assert seen[16] == seen[24] == []
    assert 16 in seen[40]  # at the latest when the next is begun
    assert sorted(published(root)) == list(range(16, TOTAL + 1, 16))
    assert (root / LATEST_FILE).read_text() == f"{TOTAL:012d}"
    entries = [json.loads(line) for line in (tmp_path / "record" / RECORD_FILE).read_text().splitlines()]
    told = {e["samples_seen"]: e["metrics"] for e in entries if "checkpoint_seconds" in e["metrics"]}
    assert sorted(told) == sorted(published(root))
    assert all(metrics["checkpoint_background_seconds"] > 0 for metrics in told.values())


def train_both_ways(world: World, stages: list[int | None], folder: Path) -> None:
    for stage in stages:
        found = []
        for in_background in (False, True):
            task = SmallTask(small_engine(world, folder / f"{stage}", stage), poisoned={24})
            root = folder / f"{stage}-{in_background}"
            loop = {"max_lost_steps": 3, "max_rollbacks": 2, "keep_checkpoints": 100}
            state = small_training(task, world, root, saves_in_background=in_background, **loop)
            assert state.rollbacks > 0, stage
            live = {f"rank-{world.rank}": task.engine.snapshot()}
            copies = HostMemory().copied(live)
            assert digests(live, root / "live" / f"{world.rank}") == digests(copies, root / "copy" / f"{world.rank}")
            world.barrier()
            found.append((published(root), tensors_of(root), task.weights(world)))
        left, right = found
        assert [c["state"] for c in left[0].values()] == [c["state"] for c in right[0].values()]
        if stage != 3:  # what fills up the last slices is memory as it was found
            assert left[0] == right[0], stage  # with the digests of all files
        assert len(left[0]) > 3
        for one, other in zip(left[1:], right[1:], strict=True):
            assert one.keys() == other.keys()
            assert [name for name in one if not torch.equal(one[name], other[name])] == [], stage


def tensors_of(root: Path) -> dict[str, Tensor]:
    """Return all tensors of all checkpoints."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(root.glob("0*/*/*.pt")):
        collect(str(path.relative_to(root)), torch.load(path, weights_only=True), tensors)
    assert tensors
    return tensors


def test_checkpoints_and_the_end_are_the_same_with_rollbacks_too(tmp_path: Path) -> None:
    train_both_ways(alone(), [None], tmp_path)


def test_on_two_ranks_they_are_the_same_under_every_engine(tmp_path: Path) -> None:
    run_ranks(2, train_both_ways, [None, 0, 1, 2, 3], tmp_path)


def test_a_stop_waits_for_what_is_being_written_and_saves_where_it_stands(tmp_path: Path) -> None:
    go_on, root = threading.Event(), tmp_path / "run"
    task = sluggish_task(alone(), tmp_path, {1: lambda: go_on.wait(WAIT_SECONDS)})
    calls = iter(range(1, 1000))

    def should_stop() -> bool:
        if next(calls) == 3:
            go_on.set()
        return go_on.is_set()

    state = small_training(task, alone(), root, should_stop=should_stop, saves_in_background=True)
    assert state.samples_seen == 24
    assert sorted(published(root)) == [16, 24]
    assert (root / LATEST_FILE).read_text() == f"{24:012d}"


def train_and_be_killed_while_writing(world: World, folder: Path) -> None:
    """Train, but the last rank's process is killed amid the third save, while all are already in later steps."""
    is_later = threading.Event()

    def be_killed() -> None:
        assert is_later.wait(WAIT_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    is_last = world.rank == world.size - 1
    task = sluggish_task(world, folder, {3: be_killed} if is_last else {})
    task.begins = lambda samples_seen: is_later.set() if samples_seen == 56 else None
    small_training(task, world, folder / "killed", saves_in_background=True)


def go_on_and_compare(world: World, folder: Path) -> None:
    again, unbroken = (sluggish_task(world, folder, {}) for _ in range(2))
    small_training(again, world, folder / "killed", saves_in_background=True)
    small_training(unbroken, world, folder / "unbroken")
    world.barrier()
    assert published(folder / "killed") == published(folder / "unbroken")
    left, right = again.weights(world), unbroken.weights(world)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_writes_loses_that_checkpoint_only(size: int, tmp_path: Path) -> None:
    assert exit_codes(size, train_and_be_killed_while_writing, tmp_path)[-1] == -signal.SIGKILL
    assert sorted(published(tmp_path / "killed")) == [16, 32]
    assert (tmp_path / "killed" / LATEST_FILE).read_text() == f"{32:012d}"
    assert (tmp_path / "killed" / f".{48:012d}.partial").is_dir()
    if size == 1:
        go_on_and_compare(alone(), tmp_path)
    else:
        run_ranks(size, go_on_and_compare, tmp_path)
    assert not list((tmp_path / "killed").glob(".*"))


def test_a_run_that_fails_leaves_no_thread_that_writes(tmp_path: Path) -> None:
    writing = threading.Event()

    def write() -> None:
        time.sleep(0.3)
        writing.set()

    task = sluggish_task(alone(), tmp_path, {1: write})

    def begins(samples_seen: int) -> None:
        if samples_seen == 16:
            raise KeyError(samples_seen)

    task.begins = begins
    with pytest.raises(KeyError):
        small_training(task, alone(), tmp_path / "run", checkpoint_every=2 * BATCH, saves_in_background=True)
    assert writing.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    assert sorted(published(tmp_path / "run")) == []
