"""The forecast of images a second: passes alone, of the slowest rank, timed without a trace in the run."""

from __future__ import annotations

import gc
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.wiring import micro_batch, speed_forecast, trials
from jobs.wiring.memory_forecast import Denoising, needed
from jobs.wiring.outlook import show_outlook, speed
from jobs.wiring.speed_forecast import forecast_rate
from jobs.wiring.train_ldm import TrainLdmConfig, check_inputs, denoising
from jobs.wiring.trials import trial_memory, trials_of
from ldm.precision import Precision
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.local_launch import LaunchConfig
from ldm.training.self_tests import Machine
from ldm.training.world import World
from tests.ranks import alone, run_ranks
from tests.tiny_latents import write_latents
from tests.tiny_training import record_of, run, same_weights, series, stopping_after, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed-forecast")
    write_latents(path)
    return path


def training_of(config: TrainLdmConfig, num_ranks: int = 1) -> Denoising:
    return denoising(config, check_inputs(config), num_ranks, is_on_cpu=True)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let each trial really be made, and say that a row of it took 50 ms; return the rows of the trials."""
    measured: list[int] = []
    real = trials.Trials.seconds

    def seconds(trial: trials.Trials, rows: int) -> float:
        assert (real(trial, rows) or 0) > 0
        measured.append(rows)
        return rows / 20

    monkeypatch.setattr(trials.Trials, "seconds", seconds)
    return measured


def test_a_run_with_the_forecast_is_bit_for_bit_the_one_without(folder: Path, timed: list[int]) -> None:
    said: list[str] = []
    forecast, plain = tiny_config(folder, "forecast"), replace(tiny_config(folder, "plain"), self_tests=False)
    stopping_after(forecast, 3)
    run(forecast, lambda progress: said.append(progress.notice))
    run(plain)
    assert timed == [8, 8], "each attempt times its micro-batch once, and none without self-tests"
    assert same_weights(folder, "forecast", "plain")
    for metric in ("loss", "validation_loss"):
        assert series(folder, "forecast", metric) == series(folder, "plain", metric)
    sentence = "forecast 20.0 images a second on 1 worker, forward and back alone: the 40 samples that are left in 2 s"
    assert said.index("resumed at 24 samples") < said.index(sentence)


def test_each_record_says_which_share_of_the_forecast_it_makes(folder: Path, timed: list[int]) -> None:
    said: list[str] = []
    config = tiny_config(folder, "shares", total_samples=24)
    run(config, lambda progress: said.append(progress.notice))
    run(replace(config, root=str(folder / "none"), record=str(folder / "none-record"), self_tests=False))
    assert "forecast 20.0 images a second on 1 worker, forward and back alone: 24 samples in 1 s" in said
    rates, shares = series(folder, "shares", "images_per_second"), series(folder, "shares", "forecast_share")
    assert set(rates) == {8, 16, 24}
    assert shares == {at: rate / 20 for at, rate in rates.items()}
    assert series(folder, "shares", "images_per_second_forecast") == dict.fromkeys(rates, 20.0)
    assert set(series(folder, "none", "images_per_second")) == set(rates)
    assert "forecast" not in str(record_of(folder, "none"))


def test_the_slowest_rank_counts_as_often_as_there_are_ranks(folder: Path) -> None:
    run_ranks(2, forecast_together, training_of(tiny_config(folder), num_ranks=2))


def forecast_together(world: World, training: Denoising) -> None:
    def take(seconds: tuple[float | None, float | None]) -> None:
        trials.Trials.seconds = lambda *_: seconds[world.rank]  # type: ignore[method-assign]

    assert training.num_rows == 4
    take((0.1, 0.5))
    assert forecast_rate(training, world) == 2 * 4 / 0.5
    take((0.1, None))
    assert forecast_rate(training, world) == 0.0, "one rank has no room: no forecast, on any of them"
    assert forecast_rate(training, world, searched=7.0) == 14.0


def test_what_a_search_measured_is_not_measured_again(folder: Path, timed: list[int]) -> None:
    training = training_of(replace(tiny_config(folder), engine=EngineConfig(micro_batch_size=2)))
    assert forecast_rate(training, alone(), searched=3.0) == 3.0
    assert timed == []
    assert forecast_rate(training, alone()) == 20.0
    assert timed == [2], "micro-batches are timed as they are configured"


def test_without_room_for_a_trial_there_is_no_forecast_and_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(trials, "build_denoiser", fail)
        run(tiny_config(folder, "full", total_samples=8), lambda progress: said.append(progress.notice))
    assert any(notice.startswith("self-tests passed") for notice in said)
    assert not [notice for notice in said if "forecast " in notice and "images" in notice]
    assert set(series(folder, "full", "images_per_second")) == {8}
    assert series(folder, "full", "forecast_share") == {}


def test_a_trial_that_is_forecast_not_to_fit_is_not_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Linux would not say that memory ran out: it would end the process.
    training = training_of(tiny_config(folder))
    size = trial_memory(training, 8).total
    for free, expected in ((size, 0.0), (2 * size, 16.0)):
        machine = Machine(name="", device="cpu", free_device_bytes=free, free_host_bytes=free)
        monkeypatch.setattr(speed_forecast, "look_around", lambda _, found=machine: found)
        monkeypatch.setattr(trials.Trials, "seconds", lambda *_: 0.5)
        assert forecast_rate(training, alone()) == expected


def test_a_trial_needs_less_than_the_training_on_one_process(folder: Path) -> None:
    training = training_of(tiny_config(folder))
    numel = training.step(training.configured).passed.num_weights
    assert 2 * 4 * numel < trial_memory(training, 8).total < needed(training).total


@pytest.mark.parametrize(
    "file, precision, dtype",
    [
        ("zero2", Precision.FP32, torch.float32),
        ("zero2", Precision.BF16, torch.bfloat16),
        ("zero0", Precision.BF16, torch.float32),
        (None, Precision.BF16, torch.float32),
    ],
)
def test_a_trial_passes_through_weights_like_those_that_are_trained(
    folder: Path, file: str | None, precision: Precision, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    real = trials.denoiser_loss

    def loss(network: nn.Module, *arguments: object) -> torch.Tensor:
        found.append({weight.dtype for weight in network.parameters()})
        return real(network, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trials, "denoiser_loss", loss)
    engine = EngineConfig(precision=precision)
    if file:
        engine = replace(engine, kind=EngineKind.DEEPSPEED, zero_config=f"infra/deepspeed/{file}.json")
    training = training_of(replace(tiny_config(folder), engine=engine))
    with trials_of(training, alone()) as seconds_of:
        assert (seconds_of(2) or 0) > 0
    assert found == [{dtype}] * 3
    num_weights = training.step(training.configured).passed.num_weights
    assert trial_memory(training, 2).weights == num_weights * dtype.itemsize


def test_a_trial_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[weakref.ref[nn.Module]] = []
    real = trials.build_denoiser

    def build(*arguments: object) -> nn.Module:
        network = real(*arguments)  # type: ignore[arg-type]
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(trials, "build_denoiser", build)
    state = torch.get_rng_state()
    with trials_of(training_of(tiny_config(folder)), alone()) as seconds_of:
        assert (seconds_of(8) or 0) > 0
        assert not torch.equal(torch.get_rng_state(), state), "the network's weights were drawn"
    assert torch.equal(torch.get_rng_state(), state)
    gc.collect()
    assert [network() for network in networks] == [None]


def test_a_trial_is_timed_behind_its_first_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, passes = [0.0], iter([100.0, 2.0, 4.0])
    real = trials.denoiser_loss

    def loss(network: nn.Module, training: Denoising, rows: int) -> Tensor:
        now[0] += next(passes)
        return real(network, training, rows)

    monkeypatch.setattr(trials, "denoiser_loss", loss)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with trials_of(training_of(tiny_config(folder)), alone()) as seconds_of:
        assert seconds_of(8) == 3.0


Said = Callable[[TrainLdmConfig], str]


@pytest.fixture
def said() -> Said:
    """Return what says the line of a dry run, which leaves the number of threads as it was."""

    def say(config: TrainLdmConfig) -> str:
        before = torch.get_num_threads()
        line = speed(config, check_inputs(config))
        assert torch.get_num_threads() == before
        return line

    return say


def on_ray(folder: Path, name: str, **fields: float) -> TrainLdmConfig:
    launch = LaunchConfig(num_workers=2, **fields)  # type: ignore[arg-type]
    return replace(tiny_config(folder, name), launch=launch)


def test_a_dry_run_measures_one_worker_with_its_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads: list[int] = []

    def seconds(_: object, rows: int) -> float:
        threads.append(torch.get_num_threads())
        return rows / 20

    monkeypatch.setattr(trials.Trials, "seconds", seconds)
    before = torch.get_num_threads()
    config = on_ray(folder, "dry", cpus_per_worker=before + 1)
    show_outlook(config, check_inputs(config))
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == (
        "forecast  about 40.0 images a second on 2 workers, forward and back alone: 64 samples in 2 s"
    )
    assert "--no-self-tests leaves it out" in printed.err
    assert threads == [before + 1]
    assert torch.get_num_threads() == before
    assert not (folder / "dry").exists()


def test_a_dry_run_of_a_search_forecasts_with_what_it_would_find(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.setattr(trials.Trials, "seconds", lambda _, rows: {4: 1.0, 2: 0.2, 1: 0.5}[rows])
    line = said(replace(on_ray(folder, "search"), engine=EngineConfig(finds_micro_batch=True)))
    assert line.startswith("forecast  about 20.0 images a second on 2 workers")


def test_where_a_search_finds_no_room_one_row_is_forecast_as_it_would_be_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, timed: list[int], said: Said
) -> None:
    machine = Machine(name="", device="cpu", free_device_bytes=0, free_host_bytes=0)
    monkeypatch.setattr(micro_batch, "look_around", lambda _: machine)
    line = said(replace(on_ray(folder, "one-row"), engine=EngineConfig(finds_micro_batch=True)))
    assert line.startswith("forecast  about 40.0 images a second on 2 workers")
    assert timed == [1]


def test_a_dry_run_tells_what_is_left(folder: Path, timed: list[int], said: Said) -> None:
    config = tiny_config(folder, "left")
    stopping_after(config, 3)
    assert said(config).endswith("the 40 samples that are left in 2 s")
    assert said(replace(config, self_tests=False)) == ""
    run(config)
    assert said(config) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_dry_run_for_gpus_says_that_it_needs_one(folder: Path, timed: list[int], said: Said) -> None:
    line = said(on_ray(folder, "gpus", gpus_per_worker=1))
    assert line == "forecast  of images a second: needs a GPU like the workers', and this machine has none"
    assert timed == []


def test_a_dry_run_without_room_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setattr(trials.Trials, "seconds", lambda *_: None)
    for engine in (EngineConfig(), EngineConfig(finds_micro_batch=True)):
        line = said(replace(on_ray(folder, "no-room"), engine=engine))
        assert re.fullmatch(r"forecast  of images a second: the passes of one rank have no room on .* now", line)
