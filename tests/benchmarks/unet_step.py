"""A training step of the UNet against diffusers' `UNet2DConditionModel`, AdamW and `EMAModel`, in turns, same weights.

python -m tests.benchmarks.unet_step [--device cuda] [--quick] [--save]

One step is forward, mean squared error, backward, optimizer, moving average of the weights: ours with the project's
optimizer and average, the other as diffusers' training script has them. Both start from the same weights and see the
same tensors; their losses are compared over the first steps. The share of the machine's peak is that of a large float32
matrix product on the same threads. On a GPU: Stable Diffusion 2's UNet in bf16.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import Config
from ldm.interop.diffusers import load_unet, save_unet
from ldm.training.ema import Ema, EmaConfig
from ldm.training.optim import OptimConfig, build_optimizer
from ldm.types import Condition
from ldm.unet import zoo
from ldm.unet.model import UNet, UNetConfig
from tests.benchmarks.neighbours import TRIES_PER_TURN, Clock, quiet_turns

RESULTS = Path(__file__).parent / "results"
GOAL = 1.3
COMPARED_STEPS = 3
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class UnetStepBenchmark(Config):
    """Images a second of a training step, against diffusers."""

    device: str = "cpu"
    """cpu or cuda."""
    rounds: int = 5
    """Turns of each side."""
    threads: int = 2
    """CPU threads."""
    quick: bool = False
    """Under a minute: two turns of the first network, however busy the machine is."""
    save: bool = False
    """Write the result beside the other results."""


@dataclass(frozen=True, slots=True)
class Work:
    """A network, rows and columns of its latents, rows of a batch, and tokens a row."""

    name: str
    config: UNetConfig
    latent_size: int
    batch_size: int
    tokens: int


def _laptop() -> UNetConfig:
    """Return 18 M parameters of three levels, as one would train on two cores."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=64,
        channel_mult=(1, 2, 4),
        num_res_blocks=2,
        attention_factors=(1, 2, 4),
        head_channels=32,
        context_width=384,
    )


CPU_WORKS = (Work("emoji", zoo.emoji(), 16, 32, 24), Work("64-128-256", _laptop(), 32, 8, 24))
GPU_WORKS = (Work("sd2, 32x32", zoo.sd2(), 32, 64, 77), Work("sd2, 64x64", zoo.sd2(), 64, 32, 77))


class Side:
    """A network with its optimizer and average, and one step of them."""

    def __init__(
        self,
        predict: Callable[[], Tensor],
        target: Tensor,
        optimizer: torch.optim.Optimizer,
        average: Callable[[], None],
    ) -> None:
        self._predict, self._target, self._optimizer, self._average = predict, target, optimizer, average

    def step(self) -> Tensor:
        """Return the loss before the step."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self._target.is_cuda):
            loss = nn.functional.mse_loss(self._predict().float(), self._target)
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._average()
        return loss.detach()


def main() -> None:
    """Run both sides in turns and print the table."""
    settings = tyro.cli(UnetStepBenchmark, description=__doc__)
    torch.set_num_threads(settings.threads)
    is_gpu = settings.device == "cuda"
    machine = torch.cuda.get_device_name() if is_gpu else platform.processor()
    record: dict[str, Any] = {"settings": settings.to_dict(), "machine": machine or platform.machine()}
    record |= {"num_cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "works": {}}
    peak = matmul_flops(settings.device)
    record["matmul_gflops"] = peak / 1e9
    print(f"{record['machine']}, {settings.threads} threads of {record['num_cores']} cores, torch {torch.__version__}")
    print(f"matrix product: {peak / 1e9:,.0f} GFLOP/s")
    print(f"{'':14}{'ours':>8}{'theirs':>8}  images/s{'ratio':>8}{'min':>7}{'max':>7}{'of the product':>16}")
    works = GPU_WORKS if is_gpu else CPU_WORKS
    for work in works[:1] if settings.quick else works:
        record["works"][work.name] = measured(work, settings, peak)
    record["ratio"] = min(work["ratio"] for work in record["works"].values())
    if settings.save:
        path = RESULTS / ("unet_step-cuda.json" if is_gpu else "unet_step.json")
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"unet_step ratio {record['ratio']:.2f} (the least) goal {GOAL}")


def measured(work: Work, settings: UnetStepBenchmark, peak: float) -> dict[str, Any]:
    """Return rates and ratios of one network."""
    ours, theirs = sides(work, settings.device)
    for number in range(COMPARED_STEPS):
        mine, other = float(ours.step()), float(theirs.step())
        apart = abs(mine - other) / other
        assert apart < TOLERANCE[settings.device], f"{work.name}: losses {mine} and {other} of step {number}"
    turns = quiet_turns(
        lambda: (_clock(ours, settings.device), _clock(theirs, settings.device)),
        2 if settings.quick else settings.rounds,
        1 if settings.quick else TRIES_PER_TURN,
    )
    rates = [[work.batch_size * _steps(settings.device) / side.wall for side in turn.result] for turn in turns]
    ratios = [mine / other for mine, other in rates]
    middle = [statistics.median(side) for side in zip(*rates, strict=True)]
    share = middle[0] * step_flops(work) / peak
    print(
        f"{work.name:14}{middle[0]:8.1f}{middle[1]:8.1f}  {'':8}{statistics.median(ratios):8.2f}"
        f"{min(ratios):7.2f}{max(ratios):7.2f}{share:16.0%}"
    )
    return {
        "images_per_second": {"ours": [mine for mine, _ in rates], "theirs": [other for _, other in rates]},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "share_of_matmul": share,
        "neighbours": [turn.neighbours for turn in turns],
    }


def sides(work: Work, device: str) -> tuple[Side, Side]:
    """Return both sides with the same weights, inputs and targets."""
    torch.manual_seed(0)
    fresh = UNet(work.config)
    for name, weight in fresh.named_parameters():  # zero-initialised outputs would leave nothing to compare
        if not weight.any() and name.endswith("weight"):
            nn.init.normal_(weight, std=0.02)
    with tempfile.TemporaryDirectory(prefix="unet-benchmark-") as folder:
        save_unet(work.config, fresh.state_dict(), folder)
        network = load_unet(folder).to(device)
        other = UNet2DConditionModel.from_pretrained(folder).to(device).train()
    shape = (work.batch_size, work.config.in_channels, work.latent_size, work.latent_size)
    noisy, target = torch.randn(shape, device=device), torch.randn(shape, device=device)
    states = torch.randn(work.batch_size, work.tokens, work.config.context_width or 0, device=device)
    time_of_row = torch.linspace(0, 999, work.batch_size, device=device).floor()
    config = OptimConfig()
    weights = dict(network.named_parameters())
    ema = Ema(weights, EmaConfig(half_life_samples=10_000))
    plain = torch.optim.AdamW(
        other.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    theirs = EMAModel(other.parameters(), decay=0.9999, model_cls=UNet2DConditionModel, model_config=other.config)
    condition = Condition(states=states)
    return (
        Side(
            lambda: network(noisy, time_of_row, condition),
            target,
            build_optimizer(network.parameters(), config),
            lambda: ema.update(weights, 10**6, work.batch_size),
        ),
        Side(lambda: other(noisy, time_of_row, states).sample, target, plain, lambda: theirs.step(other.parameters())),
    )


def step_flops(work: Work) -> float:
    """Return the FLOPs of a row's training step: three times its forward, counted on the meta device."""
    with torch.device("meta"):
        network = copy.deepcopy(UNet(work.config))
        states = torch.empty(1, work.tokens, work.config.context_width or 0)
        noisy = torch.empty(1, work.config.in_channels, work.latent_size, work.latent_size)
        timestep = torch.empty(1)
    with FlopCounterMode(display=False) as counter:
        network(noisy, timestep, Condition(states=states))
    return 3.0 * counter.get_total_flops()


def matmul_flops(device: str) -> float:
    """Return the FLOPs a second of a large square matrix product, in float32 on a CPU and in bf16 on a GPU."""
    side = PEAK_SIDE[device]
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10 if device == "cuda" else 1):
            left @ left
        _wait(device)
        rate = (10 if device == "cuda" else 1) * 2.0 * side**3 / (time.perf_counter() - start)
        best = max(best, rate)
    return best


def _steps(device: str) -> int:
    return 10 if device == "cuda" else 2


def _clock(side: Side, device: str) -> Clock:
    start = Clock.now()
    for _ in range(_steps(device)):
        side.step()
    _wait(device)
    return Clock.now() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
