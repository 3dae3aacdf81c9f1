"""Clipping, AdamW and the moving average as the engine has them against those of diffusers' training script, in turns.

python -m tests.benchmarks.optimizer [--device cuda] [--quick] [--save]

Both sides hold the same weights and the same gradients, which stay as they are: ours is what the local engine does
behind a backward pass, the other `clip_grad_norm_`, `torch.optim.AdamW` and `EMAModel` as that script calls them. After
the first updates weights and averages are compared. What share of a step it is stands on each run's own page.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ldm.training.ema import Ema, EmaConfig
from ldm.training.optim import OptimConfig, build_optimizer, leave_out
from ldm.unet import zoo
from ldm.unet.model import UNet, UNetConfig
from tests.benchmarks.network_pair import PairSettings, in_turns, line, run
from tests.benchmarks.unet_step import laptop

COMPARED_UPDATES = 3
TOLERANCE = 1e-5
HALF_LIFE = 6_931.0
"""In updates: that of a decay of 0.9999, the default of diffusers' script."""


@dataclass(frozen=True, slots=True)
class Work:
    """A network."""

    name: str
    config: UNetConfig


CPU_WORKS = (Work("emoji", zoo.emoji()), Work("64-128-256", laptop()))
GPU_WORKS = (Work("sd1", zoo.sd1()),)


def measured(work: Work, settings: PairSettings) -> dict[str, Any]:
    """Print and return the updates a second of both sides, and their ratio."""
    torch.manual_seed(0)
    network = UNet(work.config).to("cuda" if settings.is_gpu else "cpu")
    other = copy.deepcopy(network)
    for weight, twin in zip(network.parameters(), other.parameters(), strict=True):
        weight.grad = torch.randn_like(weight)
        twin.grad = weight.grad.clone()
    ours, average = engine_side(network)
    theirs, other_average = script_side(other)
    for _ in range(COMPARED_UPDATES):
        ours()
        theirs()
    check_same([weight.detach() for weight in network.parameters()], [weight.detach() for weight in other.parameters()])
    check_same(list(average.averages[round(HALF_LIFE)].values()), list(other_average.shadow_params))
    result = in_turns(ours, theirs, settings, repeats=20, images=1)
    middle = statistics.median(result["images_per_second"]["ours"])
    print(f"{line(work.name, result)}   {1000 / middle:.1f} ms an update")
    return {work.name: result | {"num_weights": sum(weight.numel() for weight in network.parameters())}}


def engine_side(network: nn.Module) -> tuple[Callable[[], None], Ema]:
    """Return an update as the local engine makes it, and its average."""
    config = OptimConfig()
    weights = dict(network.named_parameters())
    optimizer = build_optimizer(network.parameters(), config)
    # One sample an update, and far behind the ramp.
    average = Ema(weights, EmaConfig(half_life_samples=round(HALF_LIFE)))

    def update() -> None:
        norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad_norm)
        leave_out(optimizer, ~norm.isfinite())
        optimizer.step()
        average.update(weights, 10**9, 1)

    return update, average


def script_side(network: nn.Module) -> tuple[Callable[[], None], EMAModel]:
    """Return an update as diffusers' script makes it, and its average."""
    config = OptimConfig()
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    decay = 0.5 ** (1 / round(HALF_LIFE))
    average = EMAModel(network.parameters(), decay=decay, min_decay=decay)  # without a ramp, as ours is behind it
    average.step(network.parameters())  # the first only takes the weights over

    def update() -> None:
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad_norm)
        optimizer.step()
        average.step(network.parameters())

    return update, average


def check_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Refuse sides that do not make the same update."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


if __name__ == "__main__":
    run("optimizer", __doc__ or "", 2.5, CPU_WORKS, GPU_WORKS, measured, unit="updates/s")
