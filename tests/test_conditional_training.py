"""Every condition, from the dataset's row to a trained network: it is learned, and the wrong one is worse.

Pictures show one bright square of one of three colours on black: its class is the colour, its layout is where it lies,
its semantic map says which pixels are its own, its caption names colour and side.
"""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.wiring.train_ldm import (
    PreviewConfig,
    TrainLdmConfig,
    check_inputs,
    num_parameters,
    row_conditions,
    train_ldm_worker,
)
from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.layout import LayoutForm
from ldm.conditioning.text import TextEncoderConfig, TextEncoderKind
from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.denoiser import build_denoiser, denoiser_digests, load_denoiser, save_denoiser, unet_config
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.denoising import Denoising
from ldm.interop.diffusers import save_autoencoder
from ldm.interop.weights import load_weights
from ldm.model_card import load_card
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import load_text_to_image
from ldm.training.diffusion_task import ObjectiveConfig
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.world import World
from ldm.types import Condition
from ldm.unet.model import UNetConfig
from pipeline.latent_config import ColumnsConfig, TextStorage
from pipeline.latent_plan import plan_latents, token_reader
from pipeline.loader import LatentLoader
from pipeline.store.manifest import ShardRecord, claim_root, commit_shard, load_manifest, publish_manifest
from pipeline.store.schema import Row, Split, key_of
from pipeline.store.shards import write_shard
from tests.ranks import alone, run_ranks
from tests.tiny_latents import carry_out, latents_config, write_autoencoder
from tests.tiny_text import BIG_WIDTH, CLIP_WIDTH, PROJECTED_WIDTH, encoder_config, write_sdxl
from tests.tiny_training import run, stopping_after, tiny_config

SIDE = 16
COLOURS = {"red": (255, 40, 40), "green": (40, 255, 40), "blue": (60, 60, 255)}
NUM_ROWS = {Split.TRAIN: 96, Split.VALIDATION: 64}
COLUMNS = ColumnsConfig(
    class_attribute="colour",
    classes=tuple(COLOURS),
    boxes_attribute="layout",
    box_classes=tuple(COLOURS),
    map_member="map.png",
    low_res_factor=2,
    num_masks=2,
)
SMALL = TokenTransformerConfig(vocab_size=30_522, max_tokens=16, depth=1, num_heads=2, head_channels=16)
LAYOUT = TokenTransformerConfig(vocab_size=300, max_tokens=8, depth=1, num_heads=2, head_channels=16)
NO_TEXT = ConditioningConfig(text=TextUse.NONE)
TOLD = {
    "class": replace(NO_TEXT, num_classes=3),
    "layout": replace(NO_TEXT, has_layout=True, layout_transformer=LAYOUT),
    "boxes": replace(
        NO_TEXT, has_layout=True, layout_transformer=LAYOUT, layout_form=LayoutForm.BOXES, layout_classes=3
    ),
    "trained text": ConditioningConfig(text=TextUse.TRAINED, text_transformer=SMALL),
    "map": replace(NO_TEXT, map_classes=2, map_channels=2),
    "small image": replace(NO_TEXT, has_low_res=True),
    "noisy small image": replace(NO_TEXT, has_low_res=True, noise_levels=20),
    "masked image": replace(NO_TEXT, has_masked_image=True),
    "sizes and vector": ConditioningConfig(has_sizes=True),
    "told": replace(NO_TEXT, num_classes=3, has_layout=True, layout_transformer=LAYOUT, map_classes=2, map_channels=1),
    "hybrid": ConditioningConfig(num_classes=3, map_classes=2, map_channels=1, has_masked_image=True, map_dropout=0.1),
}

JOINED = {"hybrid", "noisy small image"}
"""What is told these is told others too, part by part."""


def square(number: int) -> Row:
    """Return a row with everything that can be told of it."""
    dice = np.random.default_rng(number)
    colour = tuple(COLOURS)[number % 3]
    side = int(dice.integers(5, 10))
    left, top = (int(place) for place in dice.integers(0, SIDE - side + 1, 2))
    inside = np.zeros((SIDE, SIDE), np.uint8)
    inside[top : top + side, left : left + side] = 1
    pixels = inside[..., None] * np.array(COLOURS[colour], np.uint8)
    captions = [f"a {colour} square on the {'left' if left + side / 2 < SIDE / 2 else 'right'}"]
    layout = [[left, top, left + side, top + side, colour]]
    facts = {
        "captions": captions,
        "width": SIDE,
        "height": SIDE,
        "original_width": SIDE,
        "original_height": SIDE,
        "attributes": {"colour": colour, "layout": layout},
    }
    return {
        "__key__": key_of(f"square {number}"),
        "png": png(pixels),
        "map.png": png(inside),
        "txt": captions[0].encode(),
        "json": json.dumps(facts).encode(),
    }


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of squares and two caches of it: with everything, and with token ids."""
    home = tmp_path_factory.mktemp("conditions")
    root, identity = str(home / "dataset"), {"picture": {"image_size": SIDE, "image_format": "png"}}
    claim_root(root, "dataset", identity)
    first = 0
    for split, count in NUM_ROWS.items():
        files = write_shard(root, split, "000000", [square(first + number) for number in range(count)])
        commit_shard(root, ShardRecord(name="000000", split=split, num_rows=count, files=files, counts={"ok": count}))
        first += count
    publish_manifest(root, identity, "dataset", {})
    autoencoder = write_autoencoder(home / "autoencoder")
    with torch.no_grad():  # a posterior of almost no width, or its noise would hide the picture
        autoencoder.quant_conv.weight[2:] = 0.0
        autoencoder.quant_conv.bias[2:] = -12.0  # type: ignore[index]
    save_autoencoder(autoencoder, str(home / "autoencoder"))
    carry_out(plan_latents(latents_config(home, columns=COLUMNS, image_size=SIDE)))
    online = latents_config(home, root=str(home / "tokens"), text_storage=TextStorage.ONLINE, image_size=SIDE)
    carry_out(plan_latents(online))
    write_sdxl(home / "sdxl")
    both = latents_config(home, root=str(home / "vectors"), text=towers(home), image_size=SIDE)
    carry_out(plan_latents(both))
    return home


def towers(home: Path) -> TextEncoderConfig:
    return encoder_config(TextEncoderKind.SDXL, home / "sdxl")


def training(folder: Path, name: str, total_samples: int) -> TrainLdmConfig:
    """Return a training that is told one thing."""
    told = TOLD[name]
    tiny = tiny_config(folder, name.replace(" ", "-"), total_samples)
    beside = told.spatial_channels(latent_channels=2)
    unet = replace(tiny.unet, in_channels=2 + beside, num_levels=told.noise_levels)
    if told.has_sizes:
        width = CLIP_WIDTH + BIG_WIDTH
        return replace(
            training(folder, "hybrid", total_samples),
            root=str(folder / "sizes"),
            latents=str(folder / "vectors"),
            text=towers(folder),
            unet=replace(unet, context_width=width, pooled_width=PROJECTED_WIDTH, size_width=16),
            conditioning=told,
        )
    context_width = 384 if told.text is TextUse.FROZEN else 32
    return replace(
        tiny,
        latents=str(folder / ("tokens" if told.text is TextUse.TRAINED else "latents")),
        unet=replace(unet, context_width=context_width if told.has_states else None),
        conditioning=told,
        objective=ObjectiveConfig(prediction=Prediction.CLEAN),  # under much noise only what is told can say it
        optim=replace(tiny.optim, lr=4e-3),
        loop=replace(tiny.loop, log_every=0, validate_every=0, checkpoint_every=0),
    )


def loss(config: TrainLdmConfig, rolled: int) -> float:
    """Return the loss of the finished model on held-out rows told what belongs to others, `rolled` places away."""
    manifest, card = load_manifest(config.latents), load_card(config.model_folder)
    read_tokens = token_reader(manifest, config.text, config.conditioning.text, torch.device("cpu"))
    batch = LatentLoader(manifest, config.loader(Split.VALIDATION), read_tokens=read_tokens).rows(0, 64)
    condition = row_conditions(config, manifest).whole(batch)
    measure = Denoising(schedule=Schedule(card.schedule), prediction=card.prediction, space=card.space, num_rows=64)
    network = load_denoiser(config.model_folder, card.conditioning).eval()
    return float(measure.losses(network, batch, condition.rolled(rolled)).mean())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in JOINED)) for name in sorted(TOLD.keys() - {"told"})],
)
def test_condition_is_learned_from_its_row_and_the_wrong_one_is_worse(folder: Path, name: str) -> None:
    config = training(folder, name, 2_000 if name == "layout" else 1_200)  # corners have to be learned as well
    check_inputs(config)
    run(config)
    assert loss(config, 1) > 1.01 * loss(config, 0)


def test_trained_conditioner_is_stored_beside_the_unet_and_refused_if_it_is_another(folder: Path) -> None:
    config = training(folder, "class", 64)
    config = replace(config, root=str(folder / "short"))
    run(config)
    weights = load_weights(f"{config.model_folder}/conditioner/model.safetensors")
    assert weights["class_table.embedding.weight"].shape == (4, 32)
    model = load_text_to_image(config.model_folder, torch.device("cpu"))
    assert model.card.conditioning == config.conditioning
    assert sum(weight.numel() for weight in load_denoiser(config.model_folder, config.conditioning).parameters()) == (
        num_parameters(config)
    )
    path = Path(config.model_folder, "conditioner", "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="names conditioner .* but what is there has digest"):
        load_text_to_image(config.model_folder, torch.device("cpu"))


def test_training_with_drawn_conditions_goes_on_bit_for_bit(folder: Path) -> None:
    config = training(folder, "class", 64)
    config = replace(config, loop=replace(config.loop, checkpoint_every=16))
    whole, broken = (replace(config, root=str(folder / name)) for name in ("whole", "broken"))
    run(whole)
    stopping_after(broken, 3)
    run(broken)
    for part in ("unet/diffusion_pytorch_model.safetensors", "conditioner/model.safetensors"):
        assert Path(whole.model_folder, part).read_bytes() == Path(broken.model_folder, part).read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_classes": 3}, "make them with columns.class_attribute"),
        (
            {"has_masked_image": True},
            "2 channels with 3 beside them ask for a UNet of 5 input and 2 output channels, got 2",
        ),
        ({"text": TextUse.TRAINED}, "reads token ids: make the latents with text_storage online"),
    ],
)
def test_condition_that_the_latents_do_not_hold_is_refused_before_training(folder, tmp_path, changes, message) -> None:
    plain = latents_config(folder, root=str(tmp_path / "plain"), image_size=SIDE)
    carry_out(plan_latents(plain))
    config = replace(tiny_config(folder), latents=plain.root, conditioning=ConditioningConfig(**changes))
    with pytest.raises(ValueError, match=message):
        check_inputs(config)


@pytest.mark.parametrize("name", ["class", "trained text", "hybrid"])
def test_pictures_along_the_way_are_drawn_of_what_rows_are_told(folder: Path, tmp_path: Path, name: str) -> None:
    config = training(folder, name, 32)
    config = replace(
        config,
        root=str(tmp_path / "run"),
        record=str(tmp_path / "record"),
        preview=PreviewConfig(prompts=("a red square", "a blue square"), sampler=SamplerConfig(num_steps=2)),
        loop=replace(config.loop, picture_every=16),
    )
    run(config)
    (picture, *_) = sorted(Path(config.record).rglob("*.png"))
    with Image.open(picture) as image:
        assert min(image.size) >= SIDE


def train_told(world: World, folder: Path, stage: int | None) -> None:
    config = training(folder, "told", 32)
    if stage is not None:
        path = folder / f"stage{stage}.json"
        if world.is_main:
            own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
            partition = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
            path.write_text(json.dumps({**own, "zero_optimization": partition}))
        world.barrier()
        config = replace(config, engine=EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path)))
    config = replace(config, root=str(folder / f"stage-{stage}"), record=str(folder / f"record-{stage}"))
    train_ldm_worker(config, world, lambda _: None, lambda: False)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_zero_ranks_train_what_reads_conditions_as_one_process_does(folder: Path, stage: int) -> None:
    train_told(alone(), folder, None)
    run_ranks(2, train_told, folder, stage)
    told = TOLD["told"]
    one, two = (load_denoiser(str(folder / f"stage-{name}" / "model"), told).state_dict() for name in (None, stage))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_unet_that_diffusers_has_or_lacks_a_class_for_comes_back_from_its_folder(tmp_path, num_heads) -> None:
    """Plain attention with several heads of a level's own width (the paper's inpainting) is none there."""
    config = UNetConfig(
        in_channels=2,
        out_channels=2,
        base_channels=16,
        channel_mult=(1, 2),
        attention_factors=(1, 2),
        num_heads=num_heads,
        context_width=None,
        norm_groups=8,
    )
    told = ConditioningConfig(text=TextUse.NONE)
    torch.manual_seed(0)
    network = build_denoiser(config, told)
    for _ in range(2):  # the second replaces the first
        save_denoiser(replace(config, num_heads=3 - num_heads), told, other_weights(config, num_heads), str(tmp_path))
        save_denoiser(config, told, network.state_dict(), str(tmp_path))
    assert (tmp_path / "unet" / "unet.json").exists() == (num_heads == 2)
    loaded = load_denoiser(str(tmp_path), told)
    noisy, time = torch.randn(1, 2, 8, 8), torch.tensor([5.0])
    assert torch.equal(loaded(noisy, time, Condition()), network(noisy, time, Condition()))
    assert denoiser_digests(unet_config(loaded), told, loaded.state_dict()) == (
        denoiser_digests(config, told, network.state_dict())
    )


def other_weights(config: UNetConfig, num_heads: int) -> dict[str, torch.Tensor]:
    return build_denoiser(replace(config, num_heads=3 - num_heads), ConditioningConfig(text=TextUse.NONE)).state_dict()
