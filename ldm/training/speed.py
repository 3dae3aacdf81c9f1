"""How fast a training is, and what its time goes into: the metrics of a record beside the task's own.

    images_per_second       rows of all processes; it, its forecast and the share of it are `ldm.training.pace`'s
    tflops_per_second       of a process: FLOPs of forward and backward, nothing counted twice that is computed twice
    mfu                     that over the device's dense peak in the training's format (Chowdhery et al. 2022, app. B)
    step_share/NAME         of a step: the wait for data, the phases of the updates, and the rest (draws, metrics)
    checkpoint_share        of the time of steps and checkpoints since the last record, that of checkpoints

Shares and FLOPs are means over the processes, so that a slow one shows in what the others wait for. The wait for data
is the host's: a GPU that still computes meanwhile loses nothing by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from ldm.precision import Precision
from ldm.training.engine import EngineConfig
from ldm.training.stopwatch import StepPhase, Timed
from ldm.training.world import World

PEAKS: dict[str, tuple[float, float]] = {
    "GB200": (2500e12, 80e12),
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200 NVL": (836e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, 31.5e12),
    "A10": (125e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "T4": (65e12, 8.1e12),
    "V100": (125e12, 15.7e12),
}
"""FLOP a second of GPUs by words of their name, the more particular first, without sparsity: (16-bit tensor cores that
add up in float32, float32 outside tensor cores), from the makers' data sheets."""


def peak_flops(device: torch.device, config: EngineConfig) -> float:
    """Return the FLOP a second that a training's device makes at most; 0 where nobody says."""
    if config.peak_tflops or device.type != "cuda":
        return config.peak_tflops * 1e12
    return peak_of(torch.cuda.get_device_name(device), config.precision)


def peak_of(name: str, precision: Precision) -> float:
    """Return the FLOP a second of a GPU by its name, 0 for one that is not known, or for a part of one (MIG)."""
    known = [peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name) and "MIG" not in name]
    half, single = known[0] if known else (0.0, 0.0)
    return single if precision is Precision.FP32 else half


def speed_metrics(
    engines: Iterable[object],
    world: World,
    *,
    seconds: float,
    wait_seconds: float,
    checkpoint_seconds: float,
    flops: float,
    peak: float,
) -> dict[str, float]:
    """Return what a record says of the time since the last one; all processes call it together.

    Args:
        engines: of the task; those that measure themselves are asked.
        world: the group of processes.
        seconds: that the steps since the last record took.
        wait_seconds: of these, those of waits for data.
        checkpoint_seconds: that checkpoints took beside them.
        flops: of this process's passes in these steps.
        peak: FLOP a second of its device; 0 where that is not known.
    """
    seconds = max(seconds, 1e-9)
    shares = {"data_wait": wait_seconds / seconds, **dict.fromkeys(map(str, StepPhase), 0.0)}
    for engine in engines:
        if isinstance(engine, Timed):
            for phase, spent in engine.stopwatch.take().items():
                shares[phase.value] += spent / seconds
    shares["rest"] = max(0.0, 1.0 - sum(shares.values()))
    own = {
        **{f"step_share/{name}": share for name, share in shares.items()},
        "checkpoint_share": checkpoint_seconds / (seconds + checkpoint_seconds),
        "tflops_per_second": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else 0.0,
    }
    means = world.mean(torch.tensor(list(own.values()), dtype=torch.float64, device=world.device)).tolist()
    has_all = {"tflops_per_second": flops > 0, "mfu": flops > 0 and peak > 0}
    return {name: mean for name, mean in zip(own, means, strict=True) if has_all.get(name, True)}
