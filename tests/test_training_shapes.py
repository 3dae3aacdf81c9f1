"""A training reads what a cache can hold: pictures in buckets, one of several sizes, captions embedded on the way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.wiring.train_ldm import check_inputs
from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.rows import RowConditions
from ldm.conditioning.text import TextEncoderConfig
from ldm.interop.weights import load_weights
from ldm.text_to_image import load_text_to_image
from ldm.training.diffusion_task import DiffusionTask, ObjectiveConfig
from ldm.training.optim import OptimConfig
from ldm.training.world import World
from pipeline.ingest.picture import ResizeMode
from pipeline.latent_config import CropConfig, CropShape, TextStorage
from pipeline.latent_plan import token_reader
from pipeline.latent_summary import latent_space
from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.store.manifest import load_manifest
from pipeline.store.schema import Split
from tests.tiny_training import run, stopping_after, tiny_config
from tests.varied_pictures import cache, dataset_in

WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


class OneOfSeveral(World):
    """A rank whose fellows are not there: mean and total are its own value."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values


class CountingNetwork:
    """An engine whose network says nothing, and counts how often it is asked."""

    def __init__(self) -> None:
        self.num_forwards = 0
        self.raw = torch.nn.Linear(1, 1)

    def averaged(self, half_life: int = 0) -> AbstractContextManager[None]:
        return nullcontext()

    def wrapped(self, noisy: torch.Tensor, *_: object) -> torch.Tensor:
        self.num_forwards += 1
        return torch.zeros_like(noisy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents in buckets, at two sizes, with token ids only."""
    path = tmp_path_factory.mktemp("shapes")
    dataset_in(path, ResizeMode.SHORT_SIDE)
    crop = CropConfig(shape=CropShape.BUCKETS, bucket_step=4, more_sizes=(16,))
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


@pytest.mark.parametrize("world", [2, 3, 4])
def test_validation_on_several_shapes_is_as_many_forwards_on_every_rank(folder: Path, world: int) -> None:
    """Under ZeRO-3 a forward is one of all ranks: one that makes fewer leaves the others waiting."""
    manifest = load_manifest(str(folder / "latents"))
    config = LoaderConfig(root=str(folder / "latents"), split=Split.VALIDATION, image_size=32)
    read = token_reader(manifest, TextEncoderConfig(max_tokens=16), TextUse.FROZEN, torch.device("cpu"))
    found = []
    for rank in range(world):
        network = CountingNetwork()
        ranks = OneOfSeveral(rank=rank, size=world, device=torch.device("cpu"))
        task = DiffusionTask(
            engine=network,  # type: ignore[arg-type]
            objective=ObjectiveConfig(),
            optim=OptimConfig(),
            conditions=RowConditions(config=ConditioningConfig(), space=latent_space(manifest), factor=2, seed=0),
            held_out=LatentLoader(manifest, config, read_tokens=read),
            world=ranks,
            micro_batches=lambda rows: [(0, rows)],
            total_samples=1,
            seed=0,
            preview=None,
        )
        found.append((network.num_forwards, task.validate()))
    assert len({forwards for forwards, _ in found}) == 1
    whole = {name: sum(measured[name] for _, measured in found) for name in found[0][1]}
    assert whole["validation_loss"] == pytest.approx(1.0, abs=0.2)  # a network that says nothing: the noise's square
    assert set(whole) == {"validation_loss", *(f"validation_loss_band_{band}" for band in range(4))}
    assert all(value == pytest.approx(1.0, abs=0.4) for value in whole.values())  # of every band, whose rank it was
