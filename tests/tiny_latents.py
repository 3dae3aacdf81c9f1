"""A tiny dataset of coloured squares, a tiny random autoencoder, and latents of them, made without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.autoencoder.regularizer import Regularizer
from ldm.conditioning.text import TextEncoderConfig
from ldm.interop.diffusers import save_autoencoder
from pipeline.latent_config import Device, LatentsConfig
from pipeline.latent_gate import GateConfig
from pipeline.latent_plan import plan_latents
from pipeline.plan import Plan, ShardTask
from pipeline.store.manifest import (
    Manifest,
    ShardRecord,
    claim_root,
    commit_shard,
    load_manifest,
    publish_manifest,
    read_records,
)
from pipeline.store.schema import Row, Split, key_of
from pipeline.store.shards import write_shard

COLOURS = ("red", "green", "blue", "grey", "white")
TRAIN_SIZES = (7, 5, 6)
VALIDATION_SIZES = (4,)
IMAGE_SIZE = 16


def image_row(number: int, size: int = IMAGE_SIZE) -> Row:
    """Return a row: noise over a colour, two captions, the second longer."""
    rng = np.random.default_rng(number)
    pixels = (rng.random((size, size, 3)) * 60 + 40 * (number % 5)).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    colour = COLOURS[number % len(COLOURS)]
    captions = [colour, f"a {colour} square, number {number}"]
    facts = {"captions": captions, "width": size, "height": size, "original_width": 40, "original_height": 30}
    return {
        "__key__": key_of(f"row {number}"),
        "png": file.getvalue(),
        "txt": captions[0].encode(),
        "json": json.dumps(facts).encode(),
    }


def write_dataset(root: Path, sizes: Sequence[int] = TRAIN_SIZES, image_size: int = IMAGE_SIZE) -> Manifest:
    """Publish a dataset with the given train shards and one of validation."""
    identity = {"picture": {"image_size": image_size, "image_format": "png"}}
    claim_root(str(root), "dataset", identity)
    number = 0
    for split, shard_sizes in ((Split.TRAIN, sizes), (Split.VALIDATION, VALIDATION_SIZES)):
        for place, size in enumerate(shard_sizes):
            rows = [image_row(number + row, image_size) for row in range(size)]
            number += size
            files = write_shard(str(root), split, f"{place:06d}", rows)
            record = ShardRecord(name=f"{place:06d}", split=split, num_rows=size, files=files, counts={"ok": size})
            commit_shard(str(root), record)
    return publish_manifest(str(root), identity, "dataset", {})


def write_vq_autoencoder(folder: Path) -> Autoencoder:
    """Publish a random VQ autoencoder of factor 2 with three latent channels, its codes among its latents."""
    torch.manual_seed(0)
    model = Autoencoder(
        AutoencoderConfig(
            latent_channels=3,
            base_channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            norm_groups=4,
            attention_factors=(2,),
            regularizer=Regularizer.VQ,
            num_codes=24,
        )
    )
    assert model.quantize is not None
    with torch.no_grad():
        latent = model.encode(torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1)
        model.quantize.embedding.weight.copy_(latent.movedim(1, -1).flatten(0, 2)[:24])
    save_autoencoder(model, str(folder))
    return model


def write_autoencoder(folder: Path, seed: int = 0) -> Autoencoder:
    """Publish a random autoencoder of factor 2 with two latent channels."""
    torch.manual_seed(seed)
    config = AutoencoderConfig(
        latent_channels=2, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, mid_attention=False, norm_groups=4
    )
    model = Autoencoder(config)
    save_autoencoder(model, str(folder))
    return model


def latents_config(folder: Path, **fields: object) -> LatentsConfig:
    """Return the config of latents in `folder`, where dataset and autoencoder lie; the gate takes a random one."""
    settings: dict[str, object] = {
        "root": str(folder / "latents"),
        "dataset": str(folder / "dataset"),
        "autoencoder": str(folder / "autoencoder"),
        "text": TextEncoderConfig(max_tokens=16),
        "image_size": IMAGE_SIZE,
        "batch_size": 4,
        "gate": GateConfig(min_psnr=-100.0, std_range=(0.0, 1e9)),
        "device": Device.CPU,
    }
    return LatentsConfig(**(settings | fields))  # type: ignore[arg-type]


def carry_out(plan: Plan, tasks: Iterable[ShardTask] | None = None) -> Manifest:
    """Make the given tasks in order (all missing ones by default) and publish the manifest."""
    claim_root(plan.root, plan.kind, plan.identity)
    there = {(record.split, record.name) for record in read_records(plan.root)}
    stage = plan.make_stage()
    for task in plan.tasks if tasks is None else tasks:
        if (task.split, task.name) not in there:
            commit_shard(plan.root, stage(task))
    publish_manifest(plan.root, plan.identity, plan.kind, plan.summarize(read_records(plan.root)))
    return load_manifest(plan.root)


def write_latents(folder: Path, **fields: object) -> Manifest:
    """Publish dataset, autoencoder and latents in `folder`."""
    write_dataset(folder / "dataset")
    write_autoencoder(folder / "autoencoder")
    return carry_out(plan_latents(latents_config(folder, **fields)))
