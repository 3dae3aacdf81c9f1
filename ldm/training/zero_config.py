"""A DeepSpeed file: what it owns (stage, offload, buckets), and what it must leave to our own configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.precision import Precision
from ldm.training.engine import FIRST_LOSS_SCALE, LOSS_SCALE_STEPS, EngineConfig
from ldm.training.optim import OptimConfig

OURS = {
    "train_batch_size": "batch size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "engine.micro_batch_size",
    "gradient_clipping": "optim.clip_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
}

SINGLE_RANK_OVERRIDES = {"contiguous_gradients": False, "overlap_comm": False}
"""What one process does without: a buffer in which gradients would lie to be sent, and a stream beside for sending."""


def read_zero_file(path: str) -> dict[str, Any]:
    """Return a file's settings; it lies where the path says, or beside the project that this code belongs to."""
    beside = Path(__file__).resolve().parents[2] / path
    there = path if storage.exists(path) or not beside.is_file() else str(beside)
    settings: dict[str, Any] = json.loads(storage.read_text(there))
    return settings


def stage_of(settings: dict[str, Any]) -> int:
    """Return the stage of ZeRO; 0 where none is said, as DeepSpeed has it."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def is_on_host(offload: dict[str, Any] | None) -> bool:
    """Say whether what a file says of an offload takes it off the device."""
    return offload is not None and offload.get("device", "none") != "none"


def zero_settings(config: EngineConfig, optim: OptimConfig, rows: int, world_size: int) -> dict[str, Any]:
    """Return the whole DeepSpeed configuration: the file's settings and ours.

    Args:
        config: the engine's settings.
        optim: for the clipping norm.
        rows: rows of a batch on one process.
        world_size: number of processes.

    Raises:
        ValueError: if the file sets what our own configuration decides, naming both values, or asks for what is not
            supported.
    """
    settings = read_zero_file(config.zero_config)
    stage = stage_of(settings)
    if stage == 0 and config.precision is Precision.FP16:
        raise ValueError(f"{config.zero_config} is stage 0, which has no fp16: take stage 1, or engine.kind local")
    for name in ("offload_optimizer", "offload_param"):
        offload = settings.get("zero_optimization", {}).get(name) or {}
        if offload.get("device") == "nvme" or offload.get("ratio", 1.0) != 1.0:
            raise ValueError(f"{config.zero_config}: {name} must be all on the cpu, where checkpoints read it")
    micro_batches = config.micro_batches(rows)
    ours = {
        "train_batch_size": rows * world_size,
        "train_micro_batch_size_per_gpu": micro_batches[0][1],
        "gradient_accumulation_steps": len(micro_batches),
        "gradient_clipping": optim.clip_grad_norm,
        "bf16": {"enabled": config.precision is Precision.BF16 and stage > 0},
        "fp16": {
            "enabled": config.precision is Precision.FP16,
            "initial_scale_power": int(math.log2(FIRST_LOSS_SCALE)),
            "loss_scale_window": LOSS_SCALE_STEPS,
            "hysteresis": 1,
        },
    }
    for name, home in OURS.items():
        if name in settings:
            raise ValueError(
                f"{config.zero_config} sets {name!r} to {settings[name]!r}, but {home} decides it "
                f"(now {ours.get(name, 'unset')!r}); take it out of the file"
            )
    if world_size == 1 and stage in (1, 2) and not is_on_host(settings["zero_optimization"].get("offload_optimizer")):
        settings["zero_optimization"] |= SINGLE_RANK_OVERRIDES
    return {**settings, **ours, "steps_per_print": 1 << 62}
