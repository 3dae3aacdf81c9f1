"""Laws of stage 1: resumed equals unbroken with every option, what the options do, what is measured and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.wiring.train_autoencoder import (
    LATENT_STATISTICS_FILE,
    TrainAutoencoderConfig,
    check_inputs,
    train_autoencoder_worker,
)
from ldm.autoencoder.codebook import CodebookConfig
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.autoencoder.quantizer import perplexity, usage
from ldm.evaluation.features import FeatureKind, feature_network
from ldm.evaluation.frechet import frechet_distance, statistics_of
from ldm.evaluation.scores import psnr
from ldm.first_stage import load_autoencoder
from ldm.interop.diffusers import save_autoencoder
from ldm.losses.autoencoder import AdversarialLoss, PixelLoss
from ldm.training.checkpoint import CheckpointStore
from ldm.training.guard import Guard, GuardConfig, GuardedSide, GuardMeasure
from ldm.training.loop import Progress, Surroundings, train
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.record import SilentTracker
from tests.ranks import alone
from tests.tiny_latents import write_dataset
from tests.tiny_stage1 import (
    EVERYTHING,
    GUARD,
    KL,
    LOSS,
    SIDE,
    VQ,
    DrawnImages,
    DrawnLoader,
    Rows,
    batch_at,
    stage1_config,
    stage1_task,
    state_of,
    train_steps,
)


def trained_in(folder: Path, loss: ReconstructionConfig, network: AutoencoderConfig, stops_after: int) -> dict:
    """Train with a checkpoint folder, as if Ctrl-C came after so many steps, and return the state."""
    config = stage1_config(folder, network, loss)
    task = stage1_task(config, alone())
    calls = iter(range(1, 1_000))
    around = Surroundings(
        world=alone(),
        batch_size=config.batch_size,
        checkpoints=CheckpointStore(str(folder), {}, 2, alone()),
        tracker=SilentTracker(),
        report=lambda _: None,
        should_stop=lambda: next(calls) >= stops_after,
    )
    train(task, DrawnLoader(alone()), config.loop, around)
    return state_of(task)


@pytest.mark.parametrize("network, loss", [(KL, LOSS), (VQ, replace(EVERYTHING, perceptual_rows=1))])
def test_a_stopped_training_goes_on_as_the_unbroken_one_bit_for_bit(
    tmp_path: Path, network: AutoencoderConfig, loss: ReconstructionConfig
) -> None:
    unbroken = trained_in(tmp_path / "unbroken", loss, network, 1_000)
    trained_in(tmp_path / "broken", loss, network, 3)
    resumed = trained_in(tmp_path / "broken", loss, network, 1_000)
    assert [name for name, value in unbroken.items() if not torch.equal(resumed[name], value)] == []


def test_the_options_do_something_and_revived_codes_and_the_guard_were_at_work() -> None:
    task = stage1_task(stage1_config("nowhere", VQ, EVERYTHING), alone())
    metrics = train_steps(task, alone(), range(5))
    assert max(step["codebook_revived"] for step in metrics) > 0
    assert {step["adversarial_share"] for step in metrics} == {0.0, 1.0}
    assert all(step["lecam"] > 0 and step["r1"] > 0 for step in metrics if "discriminator_loss" in step)


def test_vq_training_moves_every_weight_codes_included() -> None:
    task = stage1_task(stage1_config("nowhere", VQ, replace(LOSS, perceptual_rows=1)), alone())
    before = {name: weight.detach().clone() for name, weight in task.autoencoder.raw.named_parameters()}
    metrics = train_steps(task, alone(), range(1))[0]
    after = dict(task.autoencoder.raw.named_parameters())
    still = [name for name, weight in before.items() if torch.equal(weight, after[name])]
    assert [name for name in still if "to_k.bias" not in name] == []
    expected = metrics["pixel_loss"] + metrics["perceptual_loss"] * 0.5 + metrics["codebook_loss"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["codebook_loss"] == pytest.approx(1.25 * metrics["commitment"], rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"pixel_loss": PixelLoss.L2},
        {"adversarial_loss": AdversarialLoss.VANILLA},
        {"r1_weight": 1.0},
        {"lecam_weight": 1.0},
        {"guard": replace(GUARD, begins_above=-9.0, ends_below=-9.0)},
    ],
)
def test_each_option_changes_the_second_step(change: dict[str, object]) -> None:
    plain, changed = (
        train_steps(stage1_task(stage1_config("nowhere", KL, loss), alone()), alone(), range(2))[1]
        for loss in (replace(LOSS, perceptual_weight=0.0), replace(LOSS, perceptual_weight=0.0, **change))
    )
    assert {name for name in plain if plain[name] != changed.get(name)} - {"learning_rate"} != set()


def test_the_adversary_begins_with_the_sample_that_is_named() -> None:
    task = stage1_task(stage1_config("nowhere", KL, replace(LOSS, adversarial_start=8, perceptual_weight=0.0)), alone())
    before = {name: weight.clone() for name, weight in task.adversary.engine.raw.state_dict().items()}
    metrics = train_steps(task, alone(), range(2))
    assert all(torch.equal(value, before[name]) for name, value in task.adversary.engine.raw.state_dict().items())
    metrics += train_steps(task, alone(), [2])
    assert ["discriminator_loss" in step for step in metrics] == [False, False, True]


# --- guard


def guarded(**fields: object) -> tuple[Guard, list[str]]:
    said: list[str] = []
    config = GuardConfig(**({"measure": GuardMeasure.LOGIT_GAP, "half_life_samples": 4} | fields))
    return Guard(config, said.append), said


def test_a_guard_begins_above_its_bound_ends_below_the_other_and_says_so_once_each() -> None:
    guard, said = guarded(begins_above=4.0, ends_below=2.0, share=0.25, side=GuardedSide.GENERATOR)
    shares = []
    for step, gap in enumerate([0.0, 8.0, 8.0, 8.0, 2.0, 2.0, 0.0, 0.0, 0.0], start=1):
        guard.update(torch.tensor(gap), (4 * step, 4))
        shares.append(guard.share)
    # averages 0, 4, 6, 7, 4.5, 3.25, 1.625, ...
    assert shares == [1.0, 1.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0]
    assert said == [
        "the discriminator wins (logit gap 6.00) at 12 samples: the adversarial term counts 0.25 times",
        "the discriminator no longer wins (logit gap 1.62) at 28 samples: as before",
    ]


@pytest.mark.parametrize(
    "side, share, is_learning",
    [(GuardedSide.GENERATOR, 0.0, True), (GuardedSide.DISCRIMINATOR, 1.0, False), (GuardedSide.BOTH, 0.0, False)],
)
def test_a_guard_rests_the_side_that_is_named(side: GuardedSide, share: float, is_learning: bool) -> None:
    guard, said = guarded(side=side, begins_above=1.0, ends_below=1.0)
    assert (guard.share, guard.is_learning) == (1.0, True)
    guard.update(torch.tensor(9.0), (4, 4))
    assert (guard.share, guard.is_learning) == (share, is_learning)
    assert len(said) == 1


def test_a_discriminator_that_rests_keeps_its_weights_and_is_still_measured() -> None:
    guard = GuardConfig(
        measure=GuardMeasure.ACCURACY, begins_above=0.02, ends_below=0.01, side=GuardedSide.DISCRIMINATOR
    )
    notices: list[Progress] = []
    loss = replace(LOSS, perceptual_weight=0.0, guard=guard)
    task = stage1_task(stage1_config("nowhere", KL, loss), alone(), notices.append)
    judge = task.adversary.engine.raw
    train_steps(task, alone(), range(1))
    before = [weight.detach().clone() for weight in judge.parameters()]
    metrics = train_steps(task, alone(), [1])[0]
    assert all(torch.equal(weight, kept) for weight, kept in zip(judge.parameters(), before, strict=True))
    assert {"logit_gap", "discriminator_accuracy", "generator_loss"} <= set(metrics)
    assert metrics["adversarial_share"] == 1.0
    assert [notice.notice.split(" (")[0] for notice in notices] == ["the discriminator wins"]


# --- measured


def test_validation_takes_every_held_out_image_and_the_codes_of_all() -> None:
    loss = replace(LOSS, validation_features=FeatureKind.EFFNETLITE0)
    task = stage1_task(stage1_config("nowhere", VQ, loss), alone())
    network, images = task.autoencoder.raw, DrawnImages(9).rows(0, 9).images
    with torch.no_grad():
        latent, made = network.encode(images), network.reconstruct(images).clamp(-1, 1)
        codes = network.quantize.codes(latent)
        distance = task.perceptual(images, made).mean()
        features = feature_network(FeatureKind.EFFNETLITE0)
        frechet = frechet_distance(statistics_of(features(images)), statistics_of(features(made)))
    assert task.validate() == pytest.approx(
        {
            "validation_psnr_db": psnr(images, made).mean().item(),
            "validation_ssim": task.validate()["validation_ssim"],
            "validation_perceptual": distance.item(),
            "validation_codebook_usage": usage(codes, 24),
            "validation_codebook_perplexity": perplexity(codes, 24),
            "validation_fd_effnetlite0": frechet,
            "validation_fd_num_images": 9.0,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("network", [KL, VQ])
def test_latent_statistics_are_those_of_drawn_latents_over_the_whole_split(network: AutoencoderConfig) -> None:
    task = stage1_task(stage1_config("nowhere", network, replace(LOSS, validation_rows=2)), alone())
    found = task.latent_statistics()
    with torch.no_grad():
        moments = task.autoencoder.raw.encode(DrawnImages(9).rows(0, 9).images).double()
    drawn = moments
    if network is KL:
        mean, log_variance = moments.chunk(2, dim=1)
        noise = torch.randn(200, *mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = (mean + (0.5 * log_variance).exp() * noise).flatten(0, 1)
    assert found.num_images == 9
    assert found.mean == pytest.approx(drawn.mean(dim=(0, 2, 3)).tolist(), abs=2e-3)
    assert found.std == pytest.approx(drawn.std(dim=(0, 2, 3)).tolist(), rel=2e-3)
    assert found.scale_factor == pytest.approx(1 / drawn.std().item(), rel=2e-3)


def run_on(folder: Path, config: TrainAutoencoderConfig, report: Callable[[Progress], None] = lambda _: None) -> None:
    write_dataset(folder / "dataset", image_size=SIDE)
    train_autoencoder_worker(replace(config, dataset=str(folder / "dataset")), alone(), report, lambda: False)


def test_a_finished_vq_training_leaves_a_model_and_the_statistics_of_its_latents(tmp_path: Path) -> None:
    loss = replace(EVERYTHING, perceptual_rows=1)
    config = stage1_config(tmp_path / "run", VQ, loss, total_samples=8)
    run_on(tmp_path, config)
    model = load_autoencoder(config.model_folder)
    assert model.config == VQ
    statistics = json.loads((Path(config.model_folder) / LATENT_STATISTICS_FILE).read_text())
    report = json.loads((Path(config.model_folder) / "evaluation.json").read_text())
    assert statistics["digest"] == report["digest"]
    assert (statistics["num_images"], statistics["split"], len(statistics["std"])) == (4, "validation", 3)
    assert statistics["scale_factor"] > 0
    assert 0 < report["validation_codebook_usage"] <= 1


# --- refused


def test_a_batch_that_is_not_finite_is_refused_with_rows_and_step() -> None:
    task = stage1_task(stage1_config("nowhere"), alone())
    samples, images = batch_at(8, alone())
    images[2, 0, 3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="images are not finite at 8 samples, in the rows at positions 10:"):
        task.step(Rows(samples, images), 8, 4)


def test_a_term_that_is_not_finite_stops_the_run_with_its_name_and_step(tmp_path: Path) -> None:
    config = stage1_config(tmp_path, KL, replace(LOSS, perceptual_weight=0.0, adversarial_weight=0.0))
    config = replace(config, loop=replace(config.loop, log_every=16, checkpoint_every=16, max_lost_steps=2))
    task = stage1_task(config, alone())
    plain_step = task.step

    def step(batch, samples_seen, num_samples):
        if samples_seen == 8:
            with torch.no_grad():
                task.autoencoder.raw.decoder.conv_out.bias.fill_(float("inf"))
        return plain_step(batch, samples_seen, num_samples)

    task.step = step
    around = Surroundings(
        world=alone(),
        batch_size=4,
        checkpoints=CheckpointStore(str(tmp_path), {}, 2, alone()),
        tracker=SilentTracker(),
        report=lambda _: None,
        should_stop=lambda: False,
    )
    with pytest.raises(FloatingPointError, match="^2 steps in a row, from 8 to 16 samples, .*loss, pixel_loss"):
        train(task, DrawnLoader(alone()), config.loop, around)
    assert list(tmp_path.glob("0*")) == []


def test_images_whose_sides_are_no_multiples_of_the_factor_are_refused_before_any_worker_starts(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", image_size=18)
    config = stage1_config(tmp_path / "run", replace(KL, channel_mult=(1, 2, 2)))
    with pytest.raises(ValueError, match="images of 18 px are no multiple of the autoencoder's factor 4"):
        check_inputs(replace(config, dataset=str(tmp_path / "dataset")))


def test_training_starts_from_an_autoencoder_that_is_there(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = Autoencoder(KL)
    save_autoencoder(trained, str(tmp_path / "trained"))
    config = replace(stage1_config(tmp_path / "run"), initial=str(tmp_path / "trained"))
    task = stage1_task(config, alone())
    for name, weight in task.autoencoder.weights().items():
        torch.testing.assert_close(weight, trained.state_dict()[name], rtol=0, atol=0)
    manifest = write_dataset(tmp_path / "dataset")
    assert config.identity(manifest)["initial"] == config.initial
    assert "initial" not in stage1_config(tmp_path / "run").identity(manifest)


def test_training_from_an_autoencoder_of_another_shape_is_refused_before_any_worker_starts(tmp_path: Path) -> None:
    save_autoencoder(Autoencoder(replace(KL, base_channels=16)), str(tmp_path / "wider"))
    write_dataset(tmp_path / "dataset")
    config = replace(stage1_config(tmp_path / "run"), dataset=str(tmp_path / "dataset"))
    with pytest.raises(ValueError, match="another shape than autoencoder: base_channels 16 there, 8 here$"):
        check_inputs(replace(config, initial=str(tmp_path / "wider")))
    with pytest.raises(ValueError, match="there is no autoencoder at"):
        check_inputs(replace(config, initial=str(tmp_path / "nowhere")))


def test_a_codebooks_training_for_kl_is_refused() -> None:
    with pytest.raises(ValueError, match="loss.codebook belongs to vq"):
        stage1_config("nowhere", KL, replace(LOSS, codebook=CodebookConfig(beta=1.0)))


def test_averages_that_would_not_be_published_are_refused() -> None:
    config = stage1_config("nowhere")
    with pytest.raises(ValueError, match=r"ema.further_half_lives must be empty, got \(8,\)"):
        replace(config, ema=replace(config.ema, further_half_lives=(8,)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"begins_above": 1.0, "ends_below": 2.0}, "ends_below can't be above guard.begins_above, got 2.0 and 1.0"),
        ({"measure": GuardMeasure.ACCURACY}, "an accuracy lies between 0 and 1: .* got 6.0 and 8.0"),
        ({"share": 1.0}, r"guard.share in \[0, 1\), got 1000 and 1.0"),
        ({"half_life_samples": 0}, "half_life_samples must be at least 1"),
    ],
)
def test_an_impossible_guard_is_refused_with_its_numbers(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r1_weight": -1.0}, "loss.r1_weight can't be negative, got -1.0"),
        ({"adversarial_start": -1}, "loss.adversarial_start can't be negative, got -1"),
        ({"lecam_half_life_samples": 0}, "lecam_half_life_samples must be at least 1, got 0"),
        ({"validation_features": FeatureKind.EFFNETLITE0, "validation_rows": 1}, "needs at least 2"),
    ],
)
def test_an_impossible_loss_is_refused_with_its_numbers(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**fields)


def test_a_config_and_digest_from_before_the_options_stay_what_they_were() -> None:
    plain = ReconstructionConfig()
    named = set(plain.to_dict())
    assert named == {
        "type",
        "perceptual",
        "perceptual_weight",
        "perceptual_rows",
        "kl_weight",
        "adversarial_weight",
        "adversarial_start",
        "validation_rows",
        "discriminator_channels",
        "discriminator_layers",
    }
    assert ReconstructionConfig.from_yaml(EVERYTHING.to_yaml()) == EVERYTHING
