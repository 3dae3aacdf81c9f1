"""Laws of imported pipelines: they draw what diffusers draws of the folder, and go back into one that does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

from jobs import import_pipeline as job
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import ScheduleConfig, ScheduleKind, betas
from ldm.drawing import Drawing, Given, images_of
from ldm.interop.diffusers_scheduler import noising_of, scheduler_facts
from ldm.interop.imported_pipeline import import_pipeline
from ldm.interop.pipeline_folder import export_pipeline
from ldm.interop.weights import safetensors_files
from ldm.model_card import MODEL_FILE, load_card, model_digest, save_card
from ldm.samplers.grids import Grid
from ldm.samplers.sample import SamplerConfig
from ldm.samplers.steppers import StepperKind
from ldm.samplers.tasks import Start, sample_from
from ldm.text_to_image import TextToImage, load_text_to_image
from tests.hub_server import file_server
from tests.tiny_pipelines import (
    CHANNELS,
    FACTOR,
    GUIDANCE,
    LATENT_SIDE,
    NEGATIVE,
    PROMPTS,
    SIDE,
    STEPS,
    noise,
    ours,
    pictures,
    theirs,
    write_pipeline,
)

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
SCHEDULERS: dict[str, dict[str, Any]] = {
    "noise": {},
    "velocity": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "clean": {"prediction_type": "sample"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "timestep_spacing": "leading"},
}


def imported(folder: Path, target: Path) -> TextToImage:
    import_pipeline(str(folder), str(target))
    return load_text_to_image(str(target), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers, `pipeline`, and the model that it became, `model`."""
    made = tmp_path_factory.mktemp("import")
    write_pipeline(made / "pipeline")
    imported(made / "pipeline", made / "model")
    return made


@pytest.mark.parametrize("name", SCHEDULERS)
def test_imported_pipeline_draws_what_diffusers_draws(tmp_path: Path, name: str) -> None:
    made = write_pipeline(tmp_path / "pipeline", **SCHEDULERS[name])
    model = imported(tmp_path / "pipeline", tmp_path / "model")
    expected = theirs(made, latents=noise())
    assert abs(expected - theirs(made, guidance=1.0, latents=noise())).max() > 0.02, "guidance matters"
    assert abs(ours(model, prompts=["a dog", "red"]) - expected).max() > 0.02, "words matter"
    np.testing.assert_allclose(ours(model), expected, atol=1e-3)
    np.testing.assert_allclose(ours(model, guidance=1.0), theirs(made, guidance=1.0, latents=noise()), atol=1e-3)
    drawn = model.generate(
        PROMPTS,
        seeds=[3, 4],
        guidance=[GUIDANCE] * 2,
        negative_prompts=NEGATIVE,
        drawing=Drawing(sampler=replace(model.card.sampler, num_steps=STEPS)),
    )
    np.testing.assert_allclose(drawn / 255, expected, atol=1e-3 + 0.5 / 255)


def test_model_goes_back_into_a_folder_of_the_same_weights_that_draws_the_same(folder: Path, tmp_path: Path) -> None:
    export_pipeline(str(folder / "model"), str(tmp_path / "back"))
    for name in (UNET, VAE, "text_encoder/model.safetensors"):
        there, back = load_file(folder / "pipeline" / name), load_file(tmp_path / "back" / name)
        assert there.keys() == back.keys()
        assert all(torch.equal(there[each], back[each]) for each in there)
    assert json.loads((tmp_path / "back/vae/config.json").read_text())["scaling_factor"] == 0.18215
    first = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(theirs(again, latents=noise()), theirs(first, latents=noise()))


def test_model_with_a_scale_for_each_channel_comes_back_as_one_that_draws_the_same(
    folder: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(folder / "model", tmp_path / "own")
    card = replace(load_card(str(own)), latent_mean=(0.3, -1.0, 0.0, 2.0), latent_std=(1.0, 4.0, 2.5, 0.5))
    save_card(card, str(own))
    export_pipeline(str(own), str(tmp_path / "pipeline"))
    back = imported(tmp_path / "pipeline", tmp_path / "back")
    assert (back.card.latent_mean, back.card.latent_std) == ((0.0,) * 4, (1.0,) * 4)
    assert back.card.unet_digest == card.unet_digest
    np.testing.assert_allclose(ours(back), ours(load_text_to_image(str(own), CPU)), atol=1e-4)


def masked() -> Given:
    """Return two pictures with masks whose borders are those of latents: there both sides read masks alike."""
    dice = np.random.default_rng(0)
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, 4:12, 2:10] = masks[1, :6, 8:] = True
    return Given(pixels=dice.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8), masks=masks)


def test_inpainting_is_the_same_imported_and_exported(tmp_path: Path) -> None:
    made, given = write_pipeline(tmp_path / "pipeline", is_inpainting=True), masked()
    model = imported(tmp_path / "pipeline", tmp_path / "model")
    assert model.card.conditioning.has_masked_image
    assert export_pipeline(str(tmp_path / "model"), str(tmp_path / "back")) == "StableDiffusionInpaintPipeline"
    assert (tmp_path / "back" / UNET).read_bytes() == (tmp_path / "model" / UNET).read_bytes()
    back = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "back")
    assert given.pixels is not None
    assert given.masks is not None
    images = (images_of(given.pixels, CPU) + 1) / 2
    asked = {"image": images, "mask_image": torch.from_numpy(given.masks)[:, None].float(), "height": SIDE}
    drawn = [theirs(each, latents=noise(), width=SIDE, strength=1.0, **asked) for each in (made, back)]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-4)
    found = ours(model, given=given)
    np.testing.assert_allclose(found[given.masks], drawn[0][given.masks], atol=1e-3)
    elsewhere = Given(pixels=255 - given.pixels, masks=given.masks)
    assert abs(ours(model, given=elsewhere) - found)[given.masks].max() > 0.01, "what surrounds the hole matters"


@pytest.mark.parametrize("strength", [0.4, 0.8])
def test_image_to_image_is_the_same_where_step_counts_are(folder: Path, strength: float) -> None:
    """Theirs makes int(strength steps) of them, ours the nearest number; these are whole."""
    model = load_text_to_image(str(folder / "model"), CPU)
    pixels = masked().pixels
    assert pixels is not None
    made = StableDiffusionImg2ImgPipeline.from_pretrained(folder / "pipeline")
    drawn = theirs(
        made,
        image=(images_of(pixels, CPU) + 1) / 2,
        strength=strength,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    )
    shape = (CHANNELS, LATENT_SIDE, LATENT_SIDE)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    # The first draw is of the posterior, whose width is nothing here.
    noises = torch.stack([torch.randn(2, *shape, generator=each)[1] for each in generators])
    with torch.no_grad():
        clean = model.card.space.scaled_mode(model._autoencoder.encode(images_of(pixels, CPU)))
        denoise = model._denoiser(model.condition(PROMPTS), model.condition(NEGATIVE), [GUIDANCE] * 2, Drawing())
        sampler = SamplerConfig(num_steps=STEPS)
        latent = sample_from(
            denoise, Start(clean), noises, model._schedule, sampler, strength, lambda _: torch.zeros_like(noises)
        )
    np.testing.assert_allclose(pictures(model, latent), drawn, atol=1e-3)


def test_variant_in_several_files_is_read_as_float32(folder: Path, tmp_path: Path) -> None:
    made = StableDiffusionPipeline.from_pretrained(folder / "pipeline").to(torch.float16)
    made.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="100KB")
    assert len(list((tmp_path / "half" / "unet").glob("*-of-*"))) > 1
    model = imported(tmp_path / "half", tmp_path / "model")
    whole, half = (load_file(place / UNET) for place in (folder / "model", tmp_path / "model"))
    assert all(weight.dtype is torch.float32 for weight in half.values())
    assert all(torch.equal(half[name], whole[name].half().float()) for name in whole)
    np.testing.assert_allclose(ours(model), ours(load_text_to_image(str(folder / "model"), CPU)), atol=0.05)


def test_pipeline_at_the_hub_is_fetched_without_what_is_not_needed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(folder / "pipeline", tmp_path / "hub/someone/tiny/main")
    (place / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (place / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half of it")
    with file_server(tmp_path / "hub") as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        card = import_pipeline("hf://someone/tiny", str(tmp_path / "model")).card
        assert server.downloads("diffusion_pytorch_model.safetensors") == 2
        assert server.downloads("diffusion_pytorch_model.bin") == 0
        assert server.downloads("diffusion_pytorch_model.fp16.safetensors") == 0
        with pytest.raises(ValueError, match="no pipeline at someone/else: no such folder here, and the hub gave no"):
            import_pipeline("someone/else", str(tmp_path / "model"))
    assert card.unet_digest == load_card(str(folder / "model")).unet_digest


def changed(name: str, **facts: Any) -> Any:
    def change(place: Path) -> None:
        known = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**known, **facts}))

    return change


def pickled(place: Path) -> None:
    (place / UNET).rename(place / "unet/diffusion_pytorch_model.bin")


REFUSALS = [
    (changed("model_index.json", _class_name="StableDiffusionXLPipeline"), "got StableDiffusionXLPipeline"),
    (changed("model_index.json", unet=["diffusers", "UNet2DModel"]), "unet must be a UNet2DConditionModel, got UNet2D"),
    (
        changed("model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        "vae must be a AutoencoderKL, got AutoencoderT",
    ),
    (changed("model_index.json", controlnet=["diffusers", "ControlNetModel"]), "has not: controlnet"),
    (changed("unet/config.json", class_embed_type="timestep"), "class_embed_type must be None, got 'timestep'"),
    (changed("unet/config.json", attention_type="gated"), "attention_type must be 'default', got 'gated'"),
    (changed("vae/config.json", shift_factor=0.1), "shift_factor must be absent, .* got 0.1"),
    (changed("vae/config.json", scaling_factor=0), "scaling_factor must be a positive number, got 0"),
    (changed("scheduler/scheduler_config.json", prediction_type="flow_prediction"), "got 'flow_prediction'"),
    (changed("scheduler/scheduler_config.json", beta_schedule="sigmoid"), "beta_schedule must be .* got 'sigmoid'"),
    (changed("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"), "got 'FlowMatchEuler"),
    (changed("scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "'epsilon' goes without rescale_betas"),
    (changed("scheduler/scheduler_config.json", trained_betas=[0.1] * 1000), "start < end"),
    (changed("text_encoder/config.json", use_attention_mask=True), "use_attention_mask must be off"),
    (changed("unet/config.json", sample_size=None), "says no sample_size: give the pixels of a side"),
    (pickled, "has no weights as safetensors: expected diffusion_pytorch_model.safetensors, got .*bin"),
    (lambda place: (place / "vae/config.json").unlink(), "vae/config.json is missing"),
]


@pytest.mark.parametrize("change, message", REFUSALS)
def test_pipeline_that_we_can_not_be_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    place = shutil.copytree(folder / "pipeline", tmp_path / "other")
    change(place)
    with pytest.raises(ValueError, match=message):
        import_pipeline(str(place), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_unet_that_is_told_other_channels_is_refused_with_the_numbers(folder: Path, tmp_path: Path) -> None:
    made = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    made.unet.conv_in = torch.nn.Conv2d(8, 16, 3, padding=1)
    made.unet.register_to_config(in_channels=8)
    made.save_pretrained(tmp_path / "edits")
    with pytest.raises(ValueError, match="UNet of 4 input and 4 output channels, got 8 and 4"):
        import_pipeline(str(tmp_path / "edits"), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_import_refuses_the_pipelines_own_folder_a_remote_target_and_no_pipeline(folder: Path, tmp_path: Path) -> None:
    for where, target, message in (
        (folder / "pipeline", f"{folder}/pipeline/", "holds the pipeline itself"),
        (folder / "pipeline", "s3://bucket/model", "the target must be one, got s3://bucket/model"),
        (tmp_path, str(tmp_path / "model"), "it has no model_index.json"),
    ):
        with pytest.raises(ValueError, match=message):
            import_pipeline(str(where), target)


def test_the_pipelines_own_folder_is_known_by_any_of_its_names(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "link").symlink_to(folder / "pipeline")
    monkeypatch.chdir(folder)
    before = (folder / "pipeline" / "unet" / "config.json").read_bytes()
    for where, target in (("pipeline", f"{folder}/pipeline"), ("./pipeline/", str(tmp_path / "link"))):
        with pytest.raises(ValueError, match="holds the pipeline itself"):
            import_pipeline(where, target)
    assert (folder / "pipeline" / "unet" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors", ".."])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="names files that do not lie beside it"):
        safetensors_files(str(tmp_path), "x")


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order 3"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "final_sigmas_type": "sigma_min"}, "'sigma_min'"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "solver_type 'bh1'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}, "variance_type 'fixed_large'"),
        ({"_class_name": "PNDMScheduler", "set_alpha_to_one": True}, "Runge-Kutta"),
    ],
)
def test_a_sampler_of_another_kind_is_told(facts: dict[str, object], said: str) -> None:
    assert said in " ".join(noising_of(facts, "here").notices)
    plain = {"_class_name": facts["_class_name"], "skip_prk_steps": True, "set_alpha_to_one": True}
    assert noising_of(plain, "here").notices == ()


@pytest.mark.parametrize("wrong", [{"trained_betas": "x"}, {"num_train_timesteps": "1000"}, {"beta_start": None}])
def test_what_is_no_number_is_refused_with_whose_it_is(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="here: "):
        noising_of({"_class_name": "DDIMScheduler", **wrong}, "here")


def test_our_cosine_schedule_is_diffusers_capped_one() -> None:
    peer = DDIMScheduler(beta_schedule="squaredcos_cap_v2").betas.double()
    torch.testing.assert_close(betas(ScheduleConfig(kind=ScheduleKind.COSINE)), peer, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [ScheduleKind.SCALED_LINEAR, ScheduleKind.LINEAR, ScheduleKind.COSINE])
@pytest.mark.parametrize("grid", [Grid.TRAILING, Grid.LINSPACE, Grid.LEADING_TO_ONE])
def test_schedule_prediction_and_grid_come_back_from_a_scheduler(kind: ScheduleKind, grid: Grid) -> None:
    schedule = ScheduleConfig(kind=kind, num_timesteps=500)
    facts = {"_class_name": "DDIMScheduler", **scheduler_facts(schedule, Prediction.CLEAN, grid)}
    found = noising_of(json.loads(json.dumps(facts)), "here")
    assert (found.schedule, found.prediction, found.sampler.grid) == (schedule, Prediction.CLEAN, grid)
    assert bool(found.notices) == (grid is Grid.LINSPACE)


def test_variances_written_one_by_one_are_known_again() -> None:
    for name, kind in (("scaled_linear", ScheduleKind.SCALED_LINEAR), ("linear", ScheduleKind.LINEAR)):
        listed = DDIMScheduler(beta_schedule=name, beta_start=0.00085, beta_end=0.012).betas.tolist()
        found = noising_of({"_class_name": "DDIMScheduler", "trained_betas": listed}, "here").schedule
        assert (found.kind, found.start, found.end) == (kind, pytest.approx(0.00085), pytest.approx(0.012))
    listed[500] *= 1.001
    with pytest.raises(ValueError, match="trained_betas must be 1000 variances of a schedule"):
        noising_of({"_class_name": "DDIMScheduler", "trained_betas": listed}, "here")


def test_samplers_of_other_schedulers_are_taken_over_and_what_differs_is_told() -> None:
    stable_diffusion = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    found = noising_of({"_class_name": "PNDMScheduler", **stable_diffusion.config}, "here")
    assert found.sampler == SamplerConfig(stepper=StepperKind.PLMS, grid=Grid.LEADING_TO_ONE)
    assert found.notices == ("PNDMScheduler ends at the noise of timestep 0, our samplers at the clean latent",)
    karras = EulerDiscreteScheduler(use_karras_sigmas=True)
    found = noising_of({"_class_name": "EulerDiscreteScheduler", **karras.config}, "here")
    assert found.sampler == SamplerConfig(stepper=StepperKind.EULER, grid=Grid.KARRAS)


def test_job_writes_the_model_and_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    monkeypatch.setattr("sys.argv", ["import_pipeline", str(folder / "pipeline"), str(target), "--image-size", "32"])
    job.main()
    card = load_card(str(target))
    assert card.latent_size == (32 // FACTOR, 32 // FACTOR)
    assert card.text.path == f"{target}/text"
    said = capsys.readouterr().out
    assert f"model     {model_digest(card)} in {target}" in said
    assert f"--text.path {target}/text --text.max-tokens 16" in said
    (target / MODEL_FILE).unlink()
    monkeypatch.setattr("sys.argv", ["import_pipeline", str(tmp_path), str(target)])
    with pytest.raises(SystemExit, match="2"):
        job.main()
