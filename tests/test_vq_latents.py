"""A VQ autoencoder through the whole system: its latents are cached as they are, judged, loaded and trained on."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.wiring.train_ldm import check_inputs
from ldm.autoencoder.regularizer import LatentKind
from ldm.drawing import Drawing
from ldm.evaluation.scores import psnr
from ldm.model_card import load_card
from ldm.text_to_image import load_text_to_image
from pipeline.images import decode_pixels, image_of_pixels
from pipeline.latent_plan import plan_latents
from pipeline.latent_report import write_latent_report
from pipeline.latent_shard import MOMENTS
from pipeline.latent_summary import latent_space
from pipeline.latent_verification import verify_latents
from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.moment_statistics import MomentStatistics, merged, statistics_of
from pipeline.store.manifest import Manifest, load_manifest
from pipeline.store.shards import read_rows
from tests.tiny_latents import (
    carry_out,
    latents_config,
    write_autoencoder,
    write_dataset,
    write_latents,
    write_vq_autoencoder,
)
from tests.tiny_training import run, tiny_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vq")
    write_dataset(folder / "dataset")
    write_vq_autoencoder(folder / "autoencoder")
    carry_out(plan_latents(latents_config(folder, flip=True)))
    return folder


@pytest.fixture(scope="module")
def manifest(made: Path) -> Manifest:
    return load_manifest(str(made / "latents"))


def stored(root: Path, name: str = MOMENTS) -> np.ndarray:
    return np.stack(
        [np.load(io.BytesIO(row[name])) for tar in sorted(root.rglob("*.tar")) for row in read_rows(str(tar))]
    )


def images_of(made: Path) -> torch.Tensor:
    tars = sorted((made / "dataset").rglob("*.tar"))
    return image_of_pixels([decode_pixels(row["png"]) for tar in tars for row in read_rows(str(tar))])


def test_cache_of_vq_holds_latents_before_quantisation_and_says_so(made: Path, manifest: Manifest) -> None:
    model, images = write_vq_autoencoder(made / "again").eval(), images_of(made)
    with torch.no_grad():
        np.testing.assert_allclose(stored(made / "latents"), model.encode(images).numpy(), atol=1e-3)
        mirrored = model.encode(images.flip(-1)).numpy()
    np.testing.assert_allclose(stored(made / "latents", "moments_flipped.npy"), mirrored, atol=1e-3)
    assert manifest.identity["latent_kind"] == "vq_latents"
    assert [shape["moment_shape"] for shape in manifest.summary["shapes"]] == [[3, 8, 8]]


def test_statistics_of_vq_latents_have_no_posterior_variance(made: Path, manifest: Manifest) -> None:
    latents = stored(made / "latents").astype(np.float64)
    np.testing.assert_allclose(manifest.summary["mean"], latents.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.summary["std"], latents.std(axis=(0, 2, 3)), rtol=1e-12)
    for shard in manifest.shards:
        assert [part["statistics"]["variances"] for part in shard.details["parts"]] == [[0.0, 0.0, 0.0]]


def test_statistics_of_vq_latents_merge_from_any_parts() -> None:
    latents = np.random.default_rng(0).normal(2.0, 3.0, (70, 3, 4, 4)).astype(np.float16)
    kind = LatentKind.VQ_LATENTS
    parts = merged([statistics_of(part, kind) for part in np.split(latents, [7, 30])])
    np.testing.assert_allclose(parts.std, latents.astype(np.float64).std(axis=(0, 2, 3)), rtol=1e-12)
    assert MomentStatistics.from_dict(parts.to_dict()).to_dict() == parts.to_dict()


def test_gate_of_vq_judges_what_the_quantising_decoder_makes_of_the_stored_latents(
    made: Path, manifest: Manifest
) -> None:
    model = write_vq_autoencoder(made / "again").eval()
    gate = manifest.shards[0].details["gate"]
    rows = [row for _, row in gate["rows"]]
    latents = torch.from_numpy(stored(made / "latents")[rows]).float()
    with torch.no_grad():
        quantising = psnr(model.decode(latents).clamp(-1, 1), images_of(made)[rows])
        plain = psnr(model.decode(latents, is_quantized=True).clamp(-1, 1), images_of(made)[rows])
    assert gate["psnr"] == pytest.approx(quantising.tolist(), abs=1e-3)
    assert gate["psnr"] != pytest.approx(plain.tolist(), abs=1e-3)


def test_loader_and_space_take_the_kind_from_the_manifest(made: Path, manifest: Manifest) -> None:
    loader = LatentLoader(manifest, LoaderConfig(root=str(made / "latents"), batch_size=8, num_streams=2))
    batch = next(loader.batches())
    assert batch.moments.shape == (8, 3, 8, 8)
    space = latent_space(manifest)
    assert (space.kind, space.num_channels) == (LatentKind.VQ_LATENTS, 3)
    rows = loader.rows(0, loader.num_rows).moments
    white = space.scaled(rows, None)
    assert white.mean().abs() < 0.2
    assert white.std() == pytest.approx(1.0, abs=0.2)


def test_manifest_of_a_kind_that_nobody_knows_is_refused(manifest: Manifest) -> None:
    other = replace(manifest, identity={**manifest.identity, "latent_kind": "gumbel"})
    with pytest.raises(ValueError, match="of kind 'gumbel', this code knows kl_moments, vq_latents"):
        latent_space(other)


def test_kl_cache_still_says_kl_moments(tmp_path: Path) -> None:
    manifest = write_latents(tmp_path)
    assert manifest.identity["latent_kind"] == "kl_moments"
    assert latent_space(manifest).kind is LatentKind.KL_MOMENTS


def test_verification_and_report_of_a_vq_cache(made: Path) -> None:
    found = verify_latents(latents_config(made, flip=True), 1.0)
    assert (found.problems, found.num_encoded) == ((), 22)
    assert Path(write_latent_report(latents_config(made, flip=True))).stat().st_size > 1000


def test_training_on_vq_latents_ends_in_a_model_that_draws(made: Path) -> None:
    config = tiny_config(made, total_samples=16)
    config = replace(config, unet=replace(config.unet, in_channels=3, out_channels=3))
    check_inputs(config)
    outcome = run(config)
    assert outcome["is_finished"]
    assert np.isfinite(outcome["last_validation"]["validation_loss"])
    card = load_card(config.model_folder)
    assert card.latent_kind is LatentKind.VQ_LATENTS
    assert card.space == latent_space(load_manifest(config.latents))
    assert json.loads((Path(config.model_folder) / "vae" / "config.json").read_text())["_class_name"] == "VQModel"
    model = load_text_to_image(config.model_folder, torch.device("cpu"))
    pixels = model.generate(["a red square"], seeds=[1], drawing=Drawing(sampler=replace(card.sampler, num_steps=2)))
    assert pixels.shape == (1, 16, 16, 3)


def test_card_of_a_kl_model_is_what_it_was_before_there_was_vq(tmp_path: Path) -> None:
    write_latents(tmp_path)
    config = tiny_config(tmp_path, total_samples=8)
    run(config)
    written = json.loads((Path(config.model_folder) / "model.json").read_text())
    assert "latent_kind" not in written
    assert load_card(config.model_folder).space.kind is LatentKind.KL_MOMENTS


def test_autoencoder_of_another_kind_does_not_fit_the_cache(made: Path, tmp_path: Path) -> None:
    write_autoencoder(tmp_path / "kl")
    with pytest.raises(ValueError, match="were made with autoencoder"):
        check_inputs(replace(tiny_config(made), autoencoder=str(tmp_path / "kl")))
    with pytest.raises(ValueError, match="latents of 3 channels with 0 beside them ask for a UNet of 3 input"):
        check_inputs(tiny_config(made))
