"""A text-to-image model of a few thousand weights in a folder: trained for a few steps, seconds on one core."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.drawing import Drawing
from ldm.samplers.sample import SamplerConfig
from pipeline.generate_config import BulkConfig, GenerateConfig
from pipeline.latent_config import Device
from pipeline.plan import Plan, missing
from pipeline.store.manifest import Manifest, claim_root, commit_shard, publish_manifest, read_records
from tests.tiny_latents import write_latents
from tests.tiny_training import run, tiny_config

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
