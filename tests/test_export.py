"""Laws of the folder that diffusers loads: its pipelines draw what we draw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from ldm.autoencoder.regularizer import LatentKind
from ldm.conditioning.text import TextEncoderKind
from ldm.denoiser import denoiser_digests, load_denoiser, save_denoiser
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import ScheduleConfig, ScheduleKind
from ldm.drawing import Drawing, Given, images_of
from ldm.interop.pipeline_folder import INDEX_FILE, check_exportable, export_pipeline, folded
from ldm.latents import LatentSpace
from ldm.model_card import load_card, save_card
from ldm.samplers.grids import Grid
from ldm.samplers.sample import SamplerConfig, initial_noise
from ldm.samplers.steppers import StepperKind
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.training.diffusion_task import ObjectiveConfig
from tests.tiny_latents import write_autoencoder, write_latents
from tests.tiny_text import CLIP_WIDTH, encoder_config, write_clip
from tests.tiny_training import run, tiny_config

CPU = torch.device("cpu")
PROMPTS, NEGATIVE, SEEDS, GUIDANCE, STEPS = ["a red heart", "dog"], ["cat", "cat"], [3, 4], 4.0, 5
"""Steps that divide the schedule's 1,000: else diffusers' DDIM steps to times beside those of its next calls."""


def trained(folder: Path, name: str, objective: ObjectiveConfig) -> str:
    """Return the folder of a tiny CLIP-conditioned model, its denoiser moved to where words matter."""
    text = encoder_config(TextEncoderKind.CLIP, folder / "clip")
    config = tiny_config(folder, name, total_samples=16)
    unet = replace(config.unet, context_width=CLIP_WIDTH)
    config = replace(config, text=text, unet=unet, objective=objective)
    run(config)
    card = load_card(config.model_folder)
    denoiser = load_denoiser(config.model_folder, card.conditioning)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    save_denoiser(unet, card.conditioning, denoiser.state_dict(), config.model_folder)
    digest, _ = denoiser_digests(unet, card.conditioning, denoiser.state_dict())
    save_card(replace(card, unet_digest=digest), config.model_folder)
    return config.model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export")
    write_clip(made / "clip")
    write_latents(made, text=encoder_config(TextEncoderKind.CLIP, made / "clip"))
    return made


OBJECTIVES = {
    "noise": ObjectiveConfig(),
    "velocity": ObjectiveConfig(prediction=Prediction.VELOCITY, schedule=ScheduleConfig(has_zero_terminal_snr=True)),
    "cosine": ObjectiveConfig(schedule=ScheduleConfig(kind=ScheduleKind.COSINE)),
}


@pytest.fixture(scope="module", params=OBJECTIVES)
def model(request: pytest.FixtureRequest, folder: Path) -> tuple[TextToImage, str]:
    """A trained model, and the folder that it was exported to."""
    place = trained(folder, request.param, OBJECTIVES[request.param])
    target = str(folder / f"{request.param}-pipeline")
    export_pipeline(place, target)
    return load_text_to_image(place, CPU), target


def ours(model: TextToImage, sampler: SamplerConfig, prompts: list[str] = PROMPTS) -> np.ndarray:
    """Return what we draw, floats in [0, 1]."""
    with torch.no_grad():
        denoise = model._denoiser(
            model.condition(prompts), model.condition(NEGATIVE), [GUIDANCE] * 2, Drawing(sampler=sampler)
        )
        latent = model._sampled(denoise, SEEDS, (16, 16), Drawing(sampler=sampler), Given(), None)
        return (model._decoded(latent) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def theirs(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(0, SEEDS, (2, 8, 8))
    drawn = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVE,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
    )
    return np.asarray(drawn.images)


def test_diffusers_draws_the_same_images_from_the_exported_folder(model: tuple[TextToImage, str]) -> None:
    own, target = model
    pipeline = StableDiffusionPipeline.from_pretrained(target)
    expected = ours(own, SamplerConfig(num_steps=STEPS))
    other = ours(own, SamplerConfig(num_steps=STEPS), ["a dog", "red"])
    assert abs(other - expected).max(axis=(1, 2, 3)).min() > 0.05, "words matter"
    np.testing.assert_allclose(theirs(pipeline), expected, atol=1e-3)


@pytest.mark.parametrize(
    "stepper, scheduler",
    [(StepperKind.DPM_SOLVER_PP_2M, DPMSolverMultistepScheduler), (StepperKind.EULER, EulerDiscreteScheduler)],
)
def test_other_schedulers_of_diffusers_take_the_exported_facts(
    folder: Path, stepper: StepperKind, scheduler: type
) -> None:
    place = trained(folder, f"noise-{stepper}", ObjectiveConfig())
    export_pipeline(place, str(folder / f"{stepper}-pipeline"))
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder / f"{stepper}-pipeline"))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, final_sigmas_type="zero")
    expected = ours(load_text_to_image(place, CPU), SamplerConfig(stepper=stepper, num_steps=STEPS))
    np.testing.assert_allclose(theirs(pipeline), expected, atol=2e-3)


def test_image_to_image_takes_the_same_folder(model: tuple[TextToImage, str]) -> None:
    own, target = model
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(target)
    pipeline.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    image = images_of(pixels, CPU)
    with torch.no_grad():
        clean = own.card.space.scaled_mode(own._autoencoder.encode(image))
        encoded = pipeline.vae.encode(image).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(encoded, clean, rtol=1e-4, atol=1e-4)
    drawn = pipeline("dog", image=(image + 1) / 2, strength=0.5, num_inference_steps=4, output_type="np").images
    assert drawn.shape == (1, 16, 16, 3)
    assert np.isfinite(drawn).all()


def test_a_folded_autoencoder_has_our_scaled_latents_as_its_raw_ones(tmp_path: Path) -> None:
    network = write_autoencoder(tmp_path)
    space = LatentSpace(mean=(0.7, -2.0), std=(3.0, 0.25))
    made = folded(network, space)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        moments = network.encode(image)
        mean, log_variance = made.encode(image).chunk(2, dim=1)
        torch.testing.assert_close(mean, space.scaled_mode(moments), rtol=1e-4, atol=1e-4)
        spread = torch.tensor(space.std).reshape(1, 2, 1, 1)
        expected = moments.chunk(2, dim=1)[1] - 2 * spread.log()
        torch.testing.assert_close(log_variance, expected, rtol=1e-4, atol=1e-4)
        scaled = torch.randn(2, 2, 8, 8)
        torch.testing.assert_close(made.decode(scaled), network.decode(space.unscaled(scaled)), rtol=1e-4, atol=1e-4)


def test_a_model_that_those_pipelines_can_not_be_is_refused_by_what_it_is(model: tuple[TextToImage, str]) -> None:
    card = model[0].card
    check_exportable(card)
    for wrong, message in (
        (replace(card, text=replace(card.text, kind=TextEncoderKind.MINILM, path="")), "not CLIP's text tower"),
        (replace(card, latent_kind=LatentKind.VQ_LATENTS), "latents are a codebook's"),
        (replace(card, prediction=Prediction.FLOW), "it predicts flow"),
        (replace(card, schedule=ScheduleConfig(kind=ScheduleKind.FLOW)), "its schedule is flow"),
        (replace(card, conditioning=replace(card.conditioning, num_classes=3)), "told more than a frozen text"),
        (replace(card, text=replace(card.text, layer=-2)), "read at layer -2"),
    ):
        with pytest.raises(ValueError, match=message):
            check_exportable(wrong)


def test_export_refuses_the_models_own_folder_and_parts_that_are_not_the_trained_ones(
    model: tuple[TextToImage, str], folder: Path, tmp_path: Path
) -> None:
    place = trained(folder, "refused", ObjectiveConfig())
    with pytest.raises(ValueError, match="holds the model itself"):
        export_pipeline(place, place + "/")
    write_autoencoder(Path(place) / "vae", seed=5)
    with pytest.raises(ValueError, match="names autoencoder .* but what is there has digest"):
        export_pipeline(place, str(tmp_path))
    assert not (tmp_path / INDEX_FILE).exists()


def test_a_grid_that_diffusers_does_not_know_becomes_trailing(folder: Path, tmp_path: Path) -> None:
    place = trained(folder, "karras", ObjectiveConfig())
    card = load_card(place)
    (Path(place) / "model.json").write_text(
        json.dumps(replace(card, sampler=replace(card.sampler, grid=Grid.KARRAS)).to_dict())
    )
    export_pipeline(place, str(tmp_path))
    facts = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert facts["timestep_spacing"] == "trailing"
    assert json.loads((tmp_path / INDEX_FILE).read_text())["_class_name"] == "StableDiffusionPipeline"
