"""A tiny stage-2 training on the tiny latents, in this process: seconds, deterministic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from ldm.conditioning.text import TextEncoderConfig
from ldm.training.ema import EmaConfig
from ldm.training.local_launch import LaunchConfig, Outcome, Where
from ldm.training.loop import LoopConfig, Progress
from ldm.training.optim import OptimConfig
from ldm.training.tracking_config import TrackingConfig
from ldm.unet.model import UNetConfig
from tests.ranks import alone


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
