"""What a stage-2 training would do, need and make, told before any of its workers starts."""

from __future__ import annotations

import sys

import torch

from jobs.wiring.initial_model import initial_notice
from jobs.wiring.machine import free_share, trains_on_cpu
from jobs.wiring.memory_forecast import Denoising, table
from jobs.wiring.speed_forecast import dry_forecast
from jobs.wiring.train_ldm import TrainLdmConfig, checkpoint_store, denoising, num_parameters
from ldm.training.world import World
from pipeline.store.manifest import Manifest
from pipeline.store.schema import Split


def show_outlook(config: TrainLdmConfig, manifest: Manifest) -> None:
    """Print what a run would do, then what a few passes on this machine say of its speed."""
    print(describe(config, manifest))
    if line := speed(config, manifest):
        print(line)


def speed(config: TrainLdmConfig, manifest: Manifest) -> str:
    """Return the forecast of images a second; empty where nothing is left to train, or self-tests are left out."""
    here = World(rank=0, size=1, device=torch.device("cpu"))
    state = checkpoint_store(config, manifest, here).latest_state()
    samples_seen = state.samples_seen if state else 0
    if not config.self_tests or samples_seen >= config.loop.total_samples:
        return ""
    print("timing a few passes of one worker (--no-self-tests leaves it out)", file=sys.stderr)
    return dry_forecast(_training(config, manifest), config.launch, samples_seen, config.loop.total_samples)


def describe(config: TrainLdmConfig, manifest: Manifest) -> str:
    """Return what a run would do: rows, batches, workers, parameters."""
    num_rows, workers = manifest.num_rows(Split.TRAIN), config.launch.num_workers
    rows = config.batch_size // workers
    micro = config.engine.micro_batches(rows)
    steps = -(-config.loop.total_samples // config.batch_size)
    initial = config.initial_model
    return "\n".join(
        [
            f"train     {num_rows:,} rows of {config.latents} ({len(manifest.shards_of(Split.TRAIN))} shards), "
            f"{manifest.num_rows(Split.VALIDATION):,} held out",
            f"network   {num_parameters(config) / 1e6:,.1f} M parameters, {config.engine.precision}",
            *([f"start     {initial_notice(initial, manifest)}"] if initial else []),
            f"batch     {config.batch_size} = {workers} workers x "
            + (
                f"{rows} rows, in micro-batches that the start finds"
                if config.engine.finds_micro_batch
                else f"{len(micro)} micro-batches x {micro[0][1]} rows"
            ),
            f"length    {config.loop.total_samples:,} samples = {steps:,} steps = "
            f"{config.loop.total_samples / max(1, num_rows):.1f} epochs",
            f"workers   {workers} x ({config.launch.cpus_per_worker:g} CPU, {config.launch.gpus_per_worker:g} GPU), "
            f"engine {config.engine.kind}"
            + (f" ({config.engine.zero_config})" if config.engine.kind == "deepspeed" else ""),
            f"output    {config.root}",
            table(
                _training(config, manifest),
                free_share(config.launch),
            ),
        ]
    )


def _training(config: TrainLdmConfig, manifest: Manifest) -> Denoising:
    return denoising(config, manifest, config.launch.num_workers, is_on_cpu=trains_on_cpu(config.launch))
