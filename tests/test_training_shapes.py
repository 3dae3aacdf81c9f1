"""A training reads what a cache can hold: pictures in buckets, one of several sizes, captions embedded on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.wiring.train_ldm import check_inputs
from ldm.interop.weights import load_weights
from ldm.text_to_image import load_text_to_image
from pipeline.ingest.picture import ResizeMode
from pipeline.latent_config import CropConfig, CropShape, TextStorage
from tests.tiny_training import run, stopping_after, tiny_config
from tests.varied_pictures import cache, dataset_in

WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents in buckets, at two sizes, with token ids only."""
    path = tmp_path_factory.mktemp("shapes")
    dataset_in(path, ResizeMode.SHORT_SIDE)
    crop = CropConfig(shape=CropShape.BUCKETS, bucket_step=8, more_sizes=(16,))
    cache(path, path, crop=crop, text_storage=TextStorage.ONLINE)
    return path


def test_training_on_buckets_and_token_ids_resumed_is_the_unbroken_one(folder: Path) -> None:
    config = replace(tiny_config(folder, "unbroken"), image_size=32)
    assert run(config)["is_finished"]
    resumed = replace(tiny_config(folder, "resumed"), image_size=32)
    stopping_after(resumed, 3)
    run(resumed)
    one, other = (load_weights(str(folder / name / WEIGHTS)) for name in ("unbroken", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_text_to_image(config.model_folder, torch.device("cpu")).card.latent_size == (16, 16)


def test_training_must_say_which_of_several_sizes_and_reads_that_one(folder: Path) -> None:
    config = tiny_config(folder, "small")
    with pytest.raises(ValueError, match="made at 16, 32 px, several: name one with image_size"):
        check_inputs(config)
    run(replace(config, image_size=16))
    assert load_text_to_image(config.model_folder, torch.device("cpu")).card.latent_size == (8, 8)
