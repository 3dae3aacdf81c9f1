"""What a training says of its speed: FLOPs of the real network, and where the time of a step goes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from jobs.session import TrainingBar
from jobs.wiring.autoencoder_memory import Reconstructing, row_flops
from jobs.wiring.memory_forecast import Told, denoiser_flops
from ldm.autoencoder import zoo as autoencoders
from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.rows import RowConditions
from ldm.latents import LatentSpace
from ldm.precision import Precision
from ldm.training.diffusion_task import DiffusionTask, ObjectiveConfig
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, LocalEngine
from ldm.training.flops import counted_flops
from ldm.training.loop import Progress
from ldm.training.optim import OptimConfig
from ldm.training.pace import duration_in_words, pace_in_words, pace_metrics, rate_in_words
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.speed import peak_flops, peak_of, speed_metrics
from ldm.training.stopwatch import MAX_MEASURED, StepPhase, Stopwatch
from ldm.training.window import Window
from ldm.training.world import World
from ldm.types import Condition, LatentBatch
from ldm.unet import zoo
from ldm.unet.model import UNet
from tests.ranks import alone

CPU = torch.device("cpu")
STABLE_DIFFUSION = Told(size=(64, 64), pixels=(512, 512), max_tokens=77, text_width=768, pooled_width=None)
PUBLISHED_FORWARD = 803.3e9
"""Of Stable Diffusion 1's UNet at 512 px, counted on another implementation, which convolves what it has doubled; ours
convolves before it doubles, with two thirds of the products."""


def test_a_linear_layer_has_the_flops_of_its_products() -> None:
    # forward and the weight's gradient; the input needs none
    flops = counted_flops(lambda: nn.Linear(5, 7), lambda network: network(torch.empty(3, 5)).sum())
    assert flops == 2 * 2 * 3 * 5 * 7


def test_stable_diffusion_has_the_flops_that_are_known_of_it() -> None:
    flops = denoiser_flops(zoo.sd1(), ConditioningConfig(), STABLE_DIFFUSION)
    assert 0.97 * 3 * PUBLISHED_FORWARD < flops < 3 * PUBLISHED_FORWARD


def test_checkpointing_adds_no_flops_and_fewer_pixels_take_some_away() -> None:
    unet = zoo.emoji()
    told = Told(size=(16, 16), pixels=(64, 64), max_tokens=24, text_width=unet.context_width, pooled_width=None)
    flops = denoiser_flops(unet, ConditioningConfig(), told)
    assert denoiser_flops(replace(unet, checkpoint_activations=True), ConditioningConfig(), told) == flops
    quarter = denoiser_flops(unet, ConditioningConfig(), replace(told, size=(8, 8), pixels=(32, 32)))
    assert 0.2 * flops < quarter < 0.35 * flops  # the text stays as long as it was


@pytest.mark.parametrize("name", ["small_f4", "vq_f4"])
def test_an_autoencoder_has_more_flops_once_it_is_judged(name: str) -> None:
    training = Reconstructing(
        autoencoder=getattr(autoencoders, name)(),
        loss=ReconstructionConfig(),
        side=32,
        has_averages=True,
        is_bf16=False,
        num_ranks=1,
        num_rows=4,
    )
    state = torch.get_rng_state()
    penalised = replace(training, loss=replace(training.loss, r1_weight=1.0))
    assert row_flops(penalised, True) > row_flops(training, True)
    alone_flops, judged_flops = row_flops(training, False), row_flops(training, True)
    assert 0 < alone_flops < judged_flops
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn, which the training would have drawn"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what lets time go by."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_a_stopwatch_tells_the_seconds_of_each_phase(clock: Callable[[float], None]) -> None:
    watch = Stopwatch(CPU)
    exchange = watch.around(partial(clock, 2.0), StepPhase.COMMUNICATION)
    for _ in range(3):
        exchange()  # outside an update: of a validation
        watch.begin()
        clock(3.0)
        watch.enter(StepPhase.BACKWARD)
        clock(4.0)
        exchange()
        clock(1.0)
        watch.enter(StepPhase.OPTIMIZER)
        clock(0.5)
        watch.end()
        clock(100.0)
    assert watch.take() == {
        StepPhase.FORWARD: 9.0,
        StepPhase.BACKWARD: 15.0,
        StepPhase.COMMUNICATION: 6.0,
        StepPhase.OPTIMIZER: 1.5,
    }
    assert watch.take() == {}


def test_the_wait_for_what_a_collective_began_is_communication_too(clock: Callable[[float], None]) -> None:
    class Handle:
        name = "handle"

        def wait(self) -> None:
            clock(7.0)

    watch = Stopwatch(CPU)
    begin = watch.around(Handle, StepPhase.COMMUNICATION)
    watch.begin()
    handle = begin()
    clock(1.0)
    handle.wait()
    watch.end()
    assert handle.name == "handle"
    assert watch.take() == {StepPhase.FORWARD: 1.0, StepPhase.COMMUNICATION: 7.0}


def test_of_many_updates_the_first_stand_for_all(clock: Callable[[float], None]) -> None:
    watch = Stopwatch(CPU)
    for number in range(3 * MAX_MEASURED):
        watch.begin()
        clock(1.0 if number < MAX_MEASURED else 50.0)
        watch.end()
    assert watch.take() == {StepPhase.FORWARD: 3.0 * MAX_MEASURED}


def test_the_peak_is_the_data_sheets_unless_it_is_stated() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", Precision.BF16) == 989e12
    assert peak_of("NVIDIA H100 PCIe", Precision.FP16) == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", Precision.FP32) == 19.5e12
    assert peak_of("NVIDIA L40S", Precision.BF16) == 362e12
    assert peak_of("NVIDIA L40", Precision.BF16) == 181e12
    for name in ("Riva TNT2", "NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_of(name, Precision.BF16) == 0.0, name
    assert peak_flops(CPU, EngineConfig()) == 0.0
    assert peak_flops(CPU, EngineConfig(peak_tflops=0.5)) == 0.5e12


@pytest.fixture
def engine() -> LocalEngine:
    """Return an engine that has made two updates."""
    engine = LocalEngine(nn.Linear(4, 2), OptimConfig(), EmaConfig(), EngineConfig(), alone())

    def loss() -> Tensor:
        value: Tensor = engine.wrapped(torch.ones(3, 4)).square().mean()
        return value

    for step in range(2):
        engine.update([loss], 1e-3, (step + 1, 1))
    return engine


def test_a_record_tells_shares_that_make_a_whole(engine: LocalEngine) -> None:
    metrics = speed_metrics(
        [engine, "what measures nothing"],
        alone(),
        seconds=8.0,
        wait_seconds=2.0,
        checkpoint_seconds=2.0,
        flops=24e12,
        peak=6e12,
    )
    shares = {name: value for name, value in metrics.items() if name.startswith("step_share/")}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["step_share/data_wait"] == 0.25
    assert shares["step_share/communication"] == 0.0, "one process exchanges nothing"
    for phase in ("forward", "backward", "optimizer", "averages"):
        assert 0 < shares[f"step_share/{phase}"] < 0.1, phase
    assert metrics["checkpoint_share"] == 0.2
    assert metrics["tflops_per_second"] == 3.0
    assert metrics["mfu"] == 0.5


def test_nothing_is_said_of_what_is_not_known(engine: LocalEngine) -> None:
    given = {"seconds": 1.0, "wait_seconds": 0.0, "checkpoint_seconds": 0.0}
    assert not {"mfu", "tflops_per_second"} & set(speed_metrics([engine], alone(), **given, flops=0.0, peak=1e12))  # type: ignore[arg-type]
    assert "mfu" not in speed_metrics([engine], alone(), **given, flops=1e9, peak=0.0)  # type: ignore[arg-type]


def test_the_pace_is_told_beside_its_forecast_and_alone_without_one() -> None:
    assert pace_metrics(48, 2.0, 32.0) == {
        "images_per_second": 24.0,
        "images_per_second_forecast": 32.0,
        "forecast_share": 0.75,
    }
    assert pace_metrics(48, 2.0, 0.0) == {"images_per_second": 24.0}


def test_a_forecast_in_words_says_how_long_what_is_left_takes() -> None:
    assert pace_in_words(24.0, 2, 0, 96_000) == (
        "24.0 images a second on 2 workers, forward and back alone: 96,000 samples in 1 h 7 min"
    )
    assert pace_in_words(24.0, 1, 48_000, 96_000) == (
        "24.0 images a second on 1 worker, forward and back alone: the 48,000 samples that are left in 33 min"
    )
    assert [rate_in_words(rate) for rate in (1234.5, 24.06, 0.0419)] == ["1,234.5", "24.1", "0.042"]
    seconds = (45, 119, 120, 3599, 3960, 86_400 * 3 + 3600 * 4)
    words = ["45 s", "119 s", "2 min", "1 h 0 min", "1 h 6 min", "3 d 4 h"]
    assert [duration_in_words(each) for each in seconds] == words


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_without_a_wait_within_an_update() -> None:
    watch = Stopwatch(torch.device("cuda"))
    left = torch.randn(2048, 2048, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.begin()
        for _ in range(20):
            left @ left
        watch.enter(StepPhase.BACKWARD)
        watch.end()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = watch.take()
    assert seconds[StepPhase.FORWARD] > seconds[StepPhase.BACKWARD] >= 0


def test_a_step_reads_nothing_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # The meta device has no numbers: what asks for one there raises, as it would wait on a GPU.
    device = torch.device("meta")
    monkeypatch.setattr("ldm.training.engine.build_optimizer", lambda weights, _: torch.optim.AdamW(weights))
    monkeypatch.setattr("ldm.training.engine.leave_out", lambda *_: None)  # the fused form is not for this device
    config = EngineConfig(micro_batch_size=2)
    world = World(rank=0, size=1, device=device)
    unet = zoo.emoji()
    task = DiffusionTask(
        engine=LocalEngine(UNet(unet), OptimConfig(), EmaConfig(), config, world),
        objective=ObjectiveConfig(offset_noise=0.1),
        optim=OptimConfig(),
        conditions=RowConditions(
            config=ConditioningConfig(),
            space=LatentSpace(mean=(0.0,) * unet.in_channels, std=(1.0,) * unet.in_channels),
            factor=4,
            seed=0,
        ),
        held_out=NoRows(),
        world=world,
        micro_batches=config.micro_batches,
        total_samples=100,
        seed=0,
        preview=None,
    )
    batch = LatentBatch(
        keys=tuple("abcd"),
        samples=torch.arange(4),
        moments=torch.zeros(4, 2 * unet.in_channels, 16, 16, dtype=torch.float16),
        condition=Condition(states=torch.zeros(4, 24, unet.context_width), mask=torch.ones(4, 24, dtype=torch.bool)),
    )
    window = Window(0.0, 8)
    for step in range(2):
        metrics = task.step(batch, 4 * step, 4)
        window.add(metrics, batch.keys, 4 * step + 4)
    assert isinstance(metrics["loss"], Tensor)
    assert metrics["loss"].device == device
    with pytest.raises(RuntimeError, match="meta"):
        window.lost_in_a_row()


class NoRows:
    """No rows to validate on."""

    num_rows = 0

    def rows(self, start: int, stop: int) -> LatentBatch:
        raise ValueError(f"there are no rows {start} to {stop}")

    def spans(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
        return iter(())


def test_a_training_ends_with_where_its_time_went() -> None:
    shown = io.StringIO()
    told = {"step_share/forward": 0.25, "step_share/data_wait": 0.005, "tflops_per_second": 1.234, "mfu": 0.3}
    with TrainingBar("denoiser", Console(file=shown, width=200)) as bar:
        bar(Progress(done=8, total=8, metrics=told))
    assert shown.getvalue().splitlines()[-1] == (
        "denoiser: a step was forward 25.0%, data wait 0.5%; 1.23 TFLOP/s a worker, MFU 30.0%"
    )
    shown = io.StringIO()
    with TrainingBar("denoiser", Console(file=shown, width=200)) as bar:
        bar(Progress(done=8, total=8, metrics={**told, **pace_metrics(48, 2.0, 25.6)}))
    assert shown.getvalue().splitlines()[-1].endswith("a worker, MFU 30.0%, 94% of the forecast 25.6 img/s")
    shown = io.StringIO()
    with TrainingBar("sampling", Console(file=shown, width=200)) as bar:
        bar(Progress(done=0, total=0, notice="the prompt 'a [/red] [bold]heart' is too long"))
    assert "sampling: the prompt 'a [/red] [bold]heart' is too long" in shown.getvalue(), "no markup of ours"
    silent = io.StringIO()
    with TrainingBar("sampling", Console(file=silent, width=200)) as bar:
        bar(Progress(done=8, total=8))
    assert "a step was" not in silent.getvalue()
