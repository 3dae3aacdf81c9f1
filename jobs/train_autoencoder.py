"""Trains the autoencoder that images are compressed with (stage 1).

python -m jobs.train_autoencoder [RECIPE] [--home DIR] [--dry-run] [--any.field value ...]
"""

from __future__ import annotations

import torch

from jobs.command_line import from_command_line, report_errors
from jobs.recipes import TRAIN_AUTOENCODER
from jobs.session import is_main_process, prepare
from jobs.wiring.repeating import announce_repetition
from jobs.wiring.train_autoencoder import (
    check_inputs,
    checkpoint_store,
    describe,
    is_done,
    num_parameters,
    train_autoencoder_worker,
)
from jobs.wiring.training import inputs_of, run_training
from ldm.training.world import World


@report_errors()
def main() -> None:
    """Train to the end, from where an earlier call stopped."""
    prepare()
    config, dry_run = (asked := from_command_line("train_autoencoder", TRAIN_AUTOENCODER)).config, asked.dry_run
    manifest = check_inputs(config)
    announce_repetition(asked.page, config.root, inputs_of(manifest, config.dataset))
    checkpoint_store(config, manifest, World(rank=0, size=1, device=torch.device("cpu"))).check_identity()
    if dry_run:
        print(describe(config, manifest))
        return
    if is_done(config, manifest):
        print(f"autoencoder already there: {config.model_folder}")
        return
    outcome = run_training(
        config,
        train_autoencoder_worker,
        title="autoencoder",
        num_parameters=num_parameters(config),
        data=manifest,
        data_uri=config.dataset,
        repeats=asked.page.run_id if asked.page else "",
    )
    scores = "  ".join(
        f"{name.removeprefix('validation_')} {value:.3f}" for name, value in outcome["last_validation"].items()
    )
    if is_main_process():
        print(f"autoencoder {outcome['samples_seen']:,} samples, held out: {scores}: {config.model_folder}")
        print(f"encode with it by --autoencoder {config.model_folder} (precompute_latents and train_ldm)")


if __name__ == "__main__":
    main()
