"""A training step of the UNet against diffusers' `UNet2DConditionModel`, AdamW and `EMAModel`, in turns, same weights.

python -m tests.benchmarks.unet_step [--device cuda] [--quick] [--save]

One step is forward, mean squared error, backward, optimizer, moving average of the weights: ours with the project's
optimizer and average, the other as diffusers' training script has them. Both start from the same weights and see the
same tensors; their losses are compared over the first steps. The share of the machine's peak is that of a large float32
matrix product on the same threads. On a GPU: Stable Diffusion 2's UNet in bf16.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.interop.diffusers import load_unet, save_unet
from ldm.training.ema import Ema, EmaConfig
from ldm.training.optim import OptimConfig, build_optimizer
from ldm.types import Condition
from ldm.unet import zoo
from ldm.unet.model import UNet, UNetConfig
from pipeline.latent_config import Device
from tests.benchmarks.network_pair import PairSettings, in_turns, line, run

COMPARED_STEPS = 3
TOLERANCE = {Device.CPU: 1e-4, Device.CUDA: 2e-2}
PEAK_SIDE = {Device.CPU: 2048, Device.CUDA: 8192}


@dataclass(frozen=True, slots=True)
class Work:
    """A network, rows and columns of its latents, rows of a batch, and tokens a row."""

    name: str
    config: UNetConfig
    latent_size: int
    batch_size: int
    tokens: int


def laptop() -> UNetConfig:
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


CPU_WORKS = (Work("emoji", zoo.emoji(), 16, 32, 24), Work("64-128-256", laptop(), 32, 8, 24))
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


def measured(work: Work, settings: PairSettings) -> dict[str, Any]:
    """Print and return rates and ratio of one network, and our share of the machine's matrix product."""
    peak = matmul_flops(settings)
    ours, theirs = sides(work, "cuda" if settings.is_gpu else "cpu")
    for number in range(COMPARED_STEPS):
        mine, other = float(ours.step()), float(theirs.step())
        apart = abs(mine - other) / other
        assert apart < TOLERANCE[settings.device], f"{work.name}: losses {mine} and {other} of step {number}"
    repeats = 10 if settings.is_gpu else 2
    result = in_turns(ours.step, theirs.step, settings, repeats=repeats, images=work.batch_size)
    share = statistics.median(result["images_per_second"]["ours"]) * step_flops(work) / peak
    print(f"{line(work.name, result)}   {share:.0%} of {peak / 1e9:,.0f} GFLOP/s")
    return {work.name: result | {"matmul_gflops": peak / 1e9, "share_of_matmul": share}}


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


@cache
def matmul_flops(settings: PairSettings) -> float:
    """Return the FLOPs a second of a large square matrix product, in float32 on a CPU and in bf16 on a GPU."""
    side, repeats = PEAK_SIDE[settings.device], 10 if settings.is_gpu else 1
    dtype = torch.bfloat16 if settings.is_gpu else torch.float32
    left = torch.randn(side, side, device="cuda" if settings.is_gpu else "cpu", dtype=dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            left @ left
        settings.wait()
        best = max(best, repeats * 2.0 * side**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    run("unet_step", __doc__ or "", 1.3, CPU_WORKS, GPU_WORKS, measured)
