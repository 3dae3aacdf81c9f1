"""Trains the conditional denoiser on cached latents (stage 2) and registers the finished model.

python -m jobs.train_ldm [RECIPE] [--home DIR] [--dry-run] [--any.field value ...]
torchrun --nproc-per-node N -m jobs.train_ldm RECIPE --launch.where here
"""

from __future__ import annotations

import torch

from jobs.command_line import from_command_line, report_errors
from jobs.recipes import TRAIN_LDM
from jobs.session import is_main_process, prepare
from jobs.wiring.first_stage import settled
from jobs.wiring.outlook import show_outlook
from jobs.wiring.registering import register_model
from jobs.wiring.repeating import announce_repetition
from jobs.wiring.train_ldm import check_inputs, checkpoint_store, is_done, num_parameters, train_ldm_worker
from jobs.wiring.training import inputs_of, run_training
from ldm.training.world import World


@report_errors()
def main() -> None:
    """Train to the end, from where an earlier call stopped, and register the model."""
    prepare()
    config, dry_run = settled((asked := from_command_line("train_ldm", TRAIN_LDM)).config), asked.dry_run
    manifest = check_inputs(config)
    announce_repetition(asked.page, config.root, inputs_of(manifest, config.latents, config.initial_model))
    checkpoint_store(config, manifest, World(rank=0, size=1, device=torch.device("cpu"))).check_identity()
    if dry_run:
        show_outlook(config, manifest)
        return
    if is_done(config, manifest):
        print(f"model already there: {config.model_folder}")
    else:
        outcome = run_training(
            config,
            train_ldm_worker,
            title="ldm",
            num_parameters=num_parameters(config),
            data=manifest,
            data_uri=config.latents,
            repeats=asked.page.run_id if asked.page else "",
            initial=config.initial_model,
        )
        first, last = (outcome[name] for name in ("first_validation", "last_validation"))
        if is_main_process():
            print(
                f"model     {outcome['samples_seen']:,} samples, validation loss {first['validation_loss']:.4f} -> "
                f"{last['validation_loss']:.4f}: {config.model_folder}"
            )
            for half_life in config.ema.further_half_lives:
                loss = last[f"validation_loss_half_life_{half_life}"]
                print(f"          averaged with half-life {half_life:,}: {loss:.4f}: {config.model_folders[half_life]}")
    if is_main_process() and (registered := register_model(config)):
        print(f"registered {registered.uri} at {config.tracking.uri}; in Python, after mlflow.set_tracking_uri(that):")
        print(f'           mlflow.pyfunc.load_model("{registered.uri}").predict(["a red heart"])')


if __name__ == "__main__":
    main()
