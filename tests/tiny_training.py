"""A tiny stage-2 training on the tiny latents, in this process: seconds, deterministic."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from ldm.conditioning.text import TextEncoderConfig
from ldm.interop.weights import load_weights
from ldm.training.ema import EmaConfig
from ldm.training.local_launch import LaunchConfig, Outcome, Where
from ldm.training.loop import LoopConfig, Progress
from ldm.training.optim import OptimConfig
from ldm.training.tracking_config import TrackingConfig
from ldm.unet.model import UNetConfig
from tests.ranks import alone

WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


def tiny_config(folder: Path, run: str = "run", total_samples: int = 64) -> TrainLdmConfig:
    """Return a training on the latents that `write_latents(folder)` made."""
    return TrainLdmConfig(
        root=str(folder / run),
        record=str(folder / f"{run}-record"),
        latents=str(folder / "latents"),
        autoencoder=str(folder / "autoencoder"),
        text=TextEncoderConfig(max_tokens=16),
        unet=UNetConfig(
            in_channels=2,
            out_channels=2,
            base_channels=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_factors=(2,),
            num_heads=2,
            context_width=384,
            norm_groups=8,
        ),
        optim=OptimConfig(lr=1e-3),
        ema=EmaConfig(half_life_samples=32, rampup_share=0.5),
        loop=LoopConfig(
            total_samples=total_samples, log_every=8, validate_every=32, picture_every=0, checkpoint_every=16
        ),
        launch=LaunchConfig(where=Where.HERE),
        tracking=TrackingConfig(uri=""),
        batch_size=8,
        num_streams=2,
    )


def run(
    config: TrainLdmConfig,
    report: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train in this process."""
    return train_ldm_worker(config, alone(), report, should_stop)


def stopping_after(config: TrainLdmConfig, num_steps: int) -> Outcome:
    """Train as if Ctrl-C came during step `num_steps`."""
    calls = iter(range(1_000_000))
    return run(config, should_stop=lambda: next(calls) + 1 >= num_steps)


def longer(config: TrainLdmConfig, total_samples: int) -> TrainLdmConfig:
    """Return the same training to another length."""
    return replace(config, loop=replace(config.loop, total_samples=total_samples))


def record_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a run's own record."""
    lines = (folder / f"{name}-record" / "record.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def series(folder: Path, name: str, metric: str) -> dict[int, float]:
    """Return a metric by samples seen; a repeated time must repeat its value."""
    found: dict[int, float] = {}
    for entry in record_of(folder, name):
        if metric in entry.get("metrics", {}):
            value = entry["metrics"][metric]
            assert found.setdefault(entry["samples_seen"], value) == value
    return found


def same_weights(folder: Path, left: str, right: str) -> bool:
    """Say whether two runs ended with the same UNet, bit for bit."""
    one, other = (load_weights(str(folder / name / WEIGHTS)) for name in (left, right))
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
