"""The search for a micro-batch: the fastest that fits, the same on all ranks, and found once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.wiring import micro_batch, trials
from ldm.training.engine import EngineConfig
from ldm.training.loop import Progress
from ldm.training.micro_batch import NothingFitsError, find_micro_batch
from ldm.training.world import World
from tests.ranks import alone, run_ranks
from tests.tiny_latents import write_latents
from tests.tiny_training import longer, run, same_weights, series, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("micro-batch")
    write_latents(path)
    return path


@pytest.mark.parametrize(
    "seconds, best, tried",
    [
        # a GPU: launches are what small ones wait for
        ({12: 1.0, 6: 0.6, 4: 0.5, 3: 0.4, 2: 0.3, 1: 0.2}, 12, [12, 6, 4]),
        # a CPU: what fits into its caches is fastest
        ({12: 2.0, 6: 0.8, 4: 0.5, 3: 0.3, 2: 0.3, 1: 0.2}, 3, [12, 6, 4, 3, 2, 1]),
        # the largest two do not fit
        ({12: None, 6: None, 4: 0.5, 3: 0.4, 2: 0.3}, 4, [12, 6, 4, 3, 2]),
        # a percent is noise: the larger one
        ({12: 1.2, 6: 0.594, 4: 0.5, 3: 0.5}, 12, [12, 6, 4, 3]),
    ],
)
def test_the_fastest_is_found_and_no_more_tried_than_needed(
    seconds: dict[int, float | None], best: int, tried: list[int]
) -> None:
    rows, trials = find_micro_batch(alone(), 12, lambda _: True, seconds.__getitem__)
    assert rows == best
    assert [trial.rows for trial in trials] == tried


def test_what_is_forecast_not_to_fit_is_not_tried() -> None:
    tried: list[int] = []

    def seconds_of(rows: int) -> float:
        tried.append(rows)
        return rows / 10

    rows, trials = find_micro_batch(alone(), 8, lambda rows: rows <= 2, seconds_of)
    assert rows == 2
    assert tried == [2, 1]
    assert [trial.rows_per_second for trial in trials] == [0, 0, 10, 10]
    with pytest.raises(NothingFitsError, match="not even a micro-batch of one row"):
        find_micro_batch(alone(), 8, lambda _: False, seconds_of)


def test_ranks_agree_on_what_the_slowest_of_them_makes_of_it() -> None:
    run_ranks(2, agree)


def agree(world: World) -> None:
    # Rank 1 has no room for 4 rows, and is slow with 2.
    seconds: dict[int, float | None] = {4: 0.1, 2: 0.1, 1: 0.06} if world.is_main else {4: None, 2: 0.5, 1: 0.07}
    rows, trials = find_micro_batch(world, 4, lambda _: True, seconds.__getitem__)
    assert rows == 1
    assert [trial.rows_per_second for trial in trials] == pytest.approx([0, 4, 1 / 0.07])


def test_a_training_finds_it_once_and_is_the_one_with_that_micro_batch_bit_for_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest = {8: 1.0, 4: 0.4, 2: 0.5, 1: 0.5}
    measured: list[int] = []

    def seconds(trial: trials.Trials, rows: int) -> float:
        assert (real(trial, rows) or 0) > 0
        measured.append(rows)
        return fastest[rows]

    real = trials.Trials.seconds
    monkeypatch.setattr(trials.Trials, "seconds", seconds)
    notices: list[str] = []

    def report(progress: Progress) -> None:
        notices.append(progress.notice)

    config = tiny_config(folder, "found", total_samples=24)
    config = replace(config, engine=EngineConfig(finds_micro_batch=True, peak_tflops=0.001))
    run(config, report)
    assert measured == [8, 4, 2, 1]
    assert any("micro-batches of 4 of a worker's 8 rows: 10.0 img/s" in notice for notice in notices), notices
    assert any(notice.startswith("forecast 10.0 images a second") for notice in notices), notices
    again = replace(config, loop=replace(config.loop, total_samples=32))
    run(again)
    assert measured == [8, 4, 2, 1, 4], "a start after the first takes what was found, and times that alone"
    stated = replace(again, root=str(folder / "stated"), record=str(folder / "stated-record"))
    run(replace(stated, engine=EngineConfig(micro_batch_size=4)))
    assert same_weights(folder, "found", "stated")
    # What it says of its speed goes into the record, and adds up.
    rates, shares = series(folder, "found", "tflops_per_second"), series(folder, "found", "mfu")
    assert set(rates) == set(shares) == {8, 16, 24, 32}
    assert [shares[at] * 0.001 for at in shares] == pytest.approx([rates[at] for at in shares])


def test_other_devices_are_searched_anew_and_what_was_found_on_each_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials.Trials, "seconds", lambda _, rows: float(rows))
    config = replace(tiny_config(folder, "moved", total_samples=8), engine=EngineConfig(finds_micro_batch=True))
    run(config)
    path = folder / "moved" / micro_batch.FILE
    (found,) = json.loads(path.read_text())
    other = {**found, "made_for": {**found["made_for"], "num_ranks": 2}}
    path.write_text(json.dumps([other]))
    run(longer(config, 16))
    assert json.loads(path.read_text()) == [other, found]
    for total, spoilt in enumerate(("[{", "[1]", "{}"), start=3):
        path.write_text(spoilt)
        run(longer(config, 8 * total))
        assert json.loads(path.read_text()) == [found]


def test_a_micro_batch_is_either_stated_or_found() -> None:
    with pytest.raises(ValueError, match="finds_micro_batch decides micro_batch_size, which is 4"):
        EngineConfig(finds_micro_batch=True, micro_batch_size=4)


@pytest.mark.parametrize("fails", ["build_denoiser", "denoiser_loss"])
def test_without_memory_for_any_trial_the_training_goes_on_with_one_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trials, fails, fail)
    config = tiny_config(folder, fails, total_samples=8)
    run(replace(config, engine=EngineConfig(finds_micro_batch=True)))
    run(replace(tiny_config(folder, f"{fails}-one", total_samples=8), engine=EngineConfig(micro_batch_size=1)))
    assert same_weights(folder, fails, f"{fails}-one")
    assert not (folder / fails / micro_batch.FILE).exists()
