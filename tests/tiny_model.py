"""A text-to-image model of a few thousand weights in a folder: trained for a few steps, seconds on one core."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from ldm.drawing import Drawing
from ldm.samplers.sample import SamplerConfig
from pipeline.generate_config import BulkConfig, GenerateConfig
from pipeline.generate_plan import plan_generate
from pipeline.latent_config import Device
from pipeline.plan import Plan, missing
from pipeline.store.manifest import Manifest, claim_root, commit_shard, publish_manifest, read_records
from tests.small_datasets import contents
from tests.tiny_latents import write_latents
from tests.tiny_training import run, tiny_config

PROMPTS = ("red", "a blue square", "green", "red", "grey", "a white square", "blue", "red", "green and grey", "white")
DRAWING = Drawing(sampler=SamplerConfig(num_steps=3))
SIZE = 16
"""Pixels of its pictures' sides."""


def write_model(folder: Path) -> Path:
    """Train a model below a folder and return where it lies."""
    write_latents(folder)
    run(tiny_config(folder, "run", total_samples=32))
    return folder / "run" / "model"


def generate_config(model: Path, prompts: Path | str, root: Path, **bulk: object) -> GenerateConfig:
    """Return a drawing of a file of prompts on CPUs, four rows a tar, batches of three."""
    settings: dict[str, object] = {
        "root": str(root),
        "shard_rows": 4,
        "batch_size": 3,
        "device": Device.CPU,
        "num_actors": 1,
    }
    return GenerateConfig(
        prompts=str(prompts),
        model=str(model),
        drawing=DRAWING,
        guidance=3.0,
        bulk=BulkConfig(**(settings | bulk)),  # type: ignore[arg-type]
    )


def write_lines(path: Path, prompts: Sequence[str]) -> Path:
    """Write a plain text of prompts."""
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def draw_missing(plan: Plan) -> Manifest:
    """Do what `pipeline.run.run` does, in this process."""
    claim_root(plan.root, plan.kind, plan.identity)
    todo, stage = missing(plan), plan.make_stage()
    assert plan.prepare is not None
    plan.prepare(todo)
    for task in todo:
        commit_shard(plan.root, stage(task))
    records = read_records(plan.root)
    identity = {**plan.identity, **(plan.facts or {})}
    return publish_manifest(plan.root, identity, plan.kind, plan.summarize(records), records)


def root_of(config: GenerateConfig) -> Path:
    return Path(config.bulk.root)


def shard_files(config: GenerateConfig) -> dict[str, bytes]:
    """Return everything but what speaks of all shards together."""
    return {name: content for name, content in contents(root_of(config)).items() if name.startswith("train/")}


def drawn_file(model: Path, file: Path, root: Path, **bulk: object) -> tuple[GenerateConfig, Manifest]:
    config = generate_config(model, file, root, **bulk)
    return config, draw_missing(plan_generate(config))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows, of which each may name other columns, in the format that the file's name says."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        pq.write_table(table, path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def picture_of(seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def png_of(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
