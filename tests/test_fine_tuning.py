"""Laws of trainings that begin with a finished model: they begin where it stands, and in its own scale of latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.wiring.initial_model import first_network, initial_model
from jobs.wiring.outlook import describe
from jobs.wiring.train_ldm import TrainLdmConfig, check_inputs, is_done, row_conditions, train_ldm_worker
from jobs.wiring.training import inputs_of
from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.text import TextEncoderKind
from ldm.denoiser import load_denoiser
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.evaluation.denoising import Denoising
from ldm.interop.imported_pipeline import import_pipeline
from ldm.model_card import load_card, model_digest, save_card
from ldm.text_to_image import load_text_to_image
from ldm.training.diffusion_task import ObjectiveConfig
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.loop import Progress
from ldm.training.world import World
from pipeline.latent_plan import plan_latents
from pipeline.latent_summary import latent_space
from pipeline.loader import LatentLoader
from pipeline.store.manifest import load_manifest
from pipeline.store.schema import Split
from tests.ranks import run_ranks
from tests.tiny_latents import carry_out, latents_config, write_autoencoder, write_dataset, write_latents
from tests.tiny_pipelines import write_pipeline
from tests.tiny_text import encoder_config
from tests.tiny_training import longer, run, same_weights, series, stopping_after, tiny_config

FIRST_SAMPLES = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents, a model in `first` that was trained on others of its autoencoder, and what a training begins with."""
    home = tmp_path_factory.mktemp("fine")
    write_latents(home)
    config = tiny_config(home, "first", FIRST_SAMPLES)
    loop = replace(config.loop, log_every=0, validate_every=0, checkpoint_every=0)
    run(replace(config, loop=loop, self_tests=False))
    card = load_card(config.model_folder)
    # As of a model that was trained on other pictures: latents at another scale than this cache's.
    moved = replace(card, latent_mean=(0.05, -0.1), latent_std=tuple(1.25 * std for std in card.latent_std))
    save_card(moved, config.model_folder)
    return home


def further(folder: Path, name: str, total_samples: int = 64, **changes: Any) -> TrainLdmConfig:
    """Return a training that begins with the first model."""
    config = replace(tiny_config(folder, name, total_samples), self_tests=False)
    return replace(config, initial=str(folder / "first" / "model"), **changes)


def loss_of(model: str, config: TrainLdmConfig) -> float:
    """Return a model's own loss on a cache's held-out rows, measured without any training."""
    manifest, card = load_manifest(config.latents), load_card(model)
    batch = LatentLoader(manifest, config.loader(Split.VALIDATION)).rows(0, 4)
    measure = Denoising(schedule=Schedule(card.schedule), prediction=card.prediction, space=card.space, num_rows=4)
    network = load_denoiser(model, card.conditioning).eval()
    condition = replace(row_conditions(config, manifest), space=card.space).whole(batch)
    return float(measure.losses(network, batch, condition).mean())


def test_training_begins_with_the_models_own_loss_and_goes_down_from_there(folder: Path) -> None:
    config = further(folder, "further", 192)
    check_inputs(config)
    run(config)
    run(tiny_config(folder, "drawn", 32))
    losses = series(folder, "further", "validation_loss")
    assert losses[0] == pytest.approx(loss_of(config.initial, config), rel=1e-5)
    assert losses[0] < 0.5 * series(folder, "drawn", "validation_loss")[0]
    assert losses[192] < 0.7 * losses[0]
    assert series(folder, "drawn", "validation_loss")[0] == pytest.approx(1.0, abs=0.2)


def test_training_keeps_the_models_scale_of_latents_and_says_so(folder: Path) -> None:
    notices: list[str] = []

    def report(progress: Progress) -> None:
        notices.append(progress.notice)

    config = further(folder, "scale", 16)
    manifest, first = load_manifest(config.latents), load_card(config.initial)
    run(config, report)
    card = load_card(config.model_folder)
    assert card.space == first.space != latent_space(manifest)
    assert row_conditions(config, manifest).space == first.space
    (said,) = (notice for notice in notices if "begins with the weights of model" in notice)
    assert model_digest(first)[:12] in said
    assert "by its mean (0.05, -0.1) and deviation" in said
    assert "are not used" in said
    assert "start     begins with the weights of model" in describe(config, manifest)
    assert card.lineage["initial_digest"] == model_digest(first)
    given = inputs_of(manifest, config.latents, config.initial_model)
    assert ("initial model", model_digest(first)) in [(each.name, each.digest) for each in given]
    assert is_done(config, manifest)
    assert not is_done(replace(config, initial=""), manifest)


def test_interrupted_training_goes_on_bit_for_bit_and_from_no_other_model(folder: Path) -> None:
    run(further(folder, "whole"))
    stopping_after(further(folder, "broken"), 3)
    run(further(folder, "broken"))
    assert same_weights(folder, "whole", "broken")
    for other in ("", str(folder / "broken" / "model")):
        with pytest.raises(ValueError, match=r"checkpoint of another run:\n  initial"):
            run(replace(longer(further(folder, "whole"), 128), initial=other))


def train_further(world: World, folder: Path, name: str, stage: int | None) -> None:
    config = further(folder, name, 32)
    config = replace(config, batch_size=8, engine=EngineConfig())
    if stage is not None:
        path = folder / f"stage{stage}.json"
        if world.is_main:
            own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
            partition = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
            path.write_text(json.dumps({**own, "zero_optimization": partition}))
        world.barrier()
        config = replace(config, engine=EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path)))
    train_ldm_worker(config, world, lambda _: None, lambda: False)


@pytest.mark.parametrize("stage", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_two_ranks_begin_with_the_model_and_train_as_one_process_does(folder: Path, stage: int | None) -> None:
    if not (folder / "one" / "model").exists():
        run(further(folder, "one", 32))
    run_ranks(2, train_further, folder, f"two-{stage}", stage)
    first = [series(folder, name, "validation_loss")[0] for name in ("one", f"two-{stage}")]
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    config = further(folder, "one", 32)
    models = [str(folder / name / "model") for name in ("one", f"two-{stage}")]
    one, two = (load_denoiser(model, config.conditioning).state_dict() for model in models)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-5, msg=name)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"objective": ObjectiveConfig(prediction=Prediction.VELOCITY)},
        "objective.prediction 'noise' there, 'velocity' here",
    ),
    ({"objective": ObjectiveConfig(schedule=ScheduleConfig(end=0.012))}, "objective.schedule.end 0.0195 there, 0.012"),
]


@pytest.mark.parametrize("changes, message", REFUSALS)
def test_training_of_another_objective_is_refused_with_both_values(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(further(folder, "refused", **changes))


def wider(config: TrainLdmConfig) -> TrainLdmConfig:
    return replace(config, unet=replace(config.unet, base_channels=24))


def onto_itself(config: TrainLdmConfig) -> TrainLdmConfig:
    return replace(config, initial=config.model_folder + "/")


def nowhere(config: TrainLdmConfig) -> TrainLdmConfig:
    return replace(config, initial=config.initial + "-gone")


@pytest.mark.parametrize(
    "change, message",
    [
        (wider, "unet.base_channels 16 there, 24 here"),
        (onto_itself, "where this training's own model will lie"),
        (nowhere, "holds no model: it has no model.json"),
    ],
)
def test_training_that_the_model_does_not_fit_is_refused(
    folder: Path, change: Callable[[TrainLdmConfig], TrainLdmConfig], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(change(further(folder, "refused")))


def test_latents_of_another_autoencoder_are_refused_with_both_digests(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset")
    write_autoencoder(tmp_path / "autoencoder", seed=1)
    carry_out(plan_latents(latents_config(tmp_path)))
    config = replace(tiny_config(tmp_path), initial=str(folder / "first" / "model"))
    digests = load_card(config.initial).autoencoder_digest, load_manifest(config.latents).identity["autoencoder"]
    with pytest.raises(ValueError, match=f"autoencoder '{digests[0]}' there, '{digests[1]}' here"):
        check_inputs(config)


def test_weights_that_the_model_does_not_name_are_refused(folder: Path, tmp_path: Path) -> None:
    config = further(folder, "first-again")
    card = replace(load_card(config.initial), unet_digest="0" * 64)
    for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((Path(config.initial) / name).read_bytes())
    save_card(card, str(tmp_path))
    config = replace(config, initial=str(tmp_path))
    with pytest.raises(ValueError, match="names weights .*0000.* but what is there has the digests"):
        first_network(initial_model(config), config.unet, config.conditioning)


def test_shares_of_dropped_conditions_may_change(folder: Path) -> None:
    check_inputs(further(folder, "dropout", conditioning=ConditioningConfig(class_dropout=0.5), caption_dropout=0.3))


def test_imported_pipeline_is_trained_on_and_draws(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline")
    card = import_pipeline(str(tmp_path / "pipeline"), str(tmp_path / "imported")).card
    model = load_text_to_image(str(tmp_path / "imported"), torch.device("cpu"))
    write_dataset(tmp_path / "dataset")
    text = encoder_config(TextEncoderKind.CLIP, tmp_path / "imported" / "text")
    where = str(tmp_path / "imported")
    manifest = carry_out(plan_latents(latents_config(tmp_path, autoencoder=where, text=text)))
    config = replace(
        tiny_config(tmp_path, "tuned", 32),
        autoencoder=where,
        text=text,
        self_tests=False,
        unet=replace(model._unet.config, checkpoint_activations=True),  # type: ignore[union-attr]
        objective=ObjectiveConfig(schedule=card.schedule, prediction=card.prediction),
        initial=where,
    )
    check_inputs(config)
    run(config)
    assert series(tmp_path, "tuned", "validation_loss")[0] == pytest.approx(loss_of(where, config), rel=1e-5)
    tuned = load_text_to_image(config.model_folder, torch.device("cpu"))
    assert tuned.card.space == card.space != latent_space(manifest)
    assert tuned.generate(["a red heart"], seeds=[0]).shape == (1, 16, 16, 3)
