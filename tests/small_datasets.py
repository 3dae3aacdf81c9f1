"""Small folders of images, datasets made of them, and a runner that makes shards in this process instead of Ray's."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.dataset import Request, make_dataset
from pipeline.ingest.transforms import PictureConfig
from pipeline.plan import Plan, missing
from pipeline.run import RunReport
from pipeline.sources.folder import FolderConfig
from pipeline.store.ledger import read_ledger
from pipeline.store.manifest import claim_root, commit_shard, load_manifest, publish_manifest, read_records
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows


def picture(number: int, side: int = 48, form: str = "PNG") -> bytes:
    """Return an image like no other: waves whose lengths and places its number decides."""
    dice = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (dice.uniform(-4, 4) * x + dice.uniform(-4, 4) * y + dice.random())) for _ in range(12)]
    pixels = np.stack([sum(waves[channel::3]) for channel in range(3)], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(np.uint8(127 + 30 * pixels)).save(stream, form)
    return stream.getvalue()


def add_images(folder: Path, numbers: range, side: int = 48) -> None:
    """Put images with captions into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(picture(number, side))
        (folder / f"{number}.txt").write_text(f"waves number {number}")


def folder_config(root: Path | str, images: Path, rows_per_shard: int = 4, **fields: object) -> DatasetConfig:
    """Return the config of a dataset made of a folder, 32 pixels a side."""
    source = FolderConfig(folder=str(images), rows_per_shard=rows_per_shard, holdout_share=0.2)
    settings: dict[str, object] = {"root": str(root), "source": source, "picture": PictureConfig(image_size=32)}
    return DatasetConfig(**(settings | fields))  # type: ignore[arg-type]


def made(config: DatasetConfig, request: Request | None = None) -> RunReport:
    """Make a dataset without Ray, one shard after the other."""
    return make_dataset(config, request, runner=run_here)


def run_here(plan: Plan) -> RunReport:
    """Carry out a plan in this process; what `pipeline.run.run` does, but for workers and second tries."""
    claim_root(plan.root, plan.kind, plan.identity)
    todo = missing(plan)
    if plan.prepare is not None:
        plan.prepare(todo)
    stage = plan.make_stage()
    records = [stage(task) for task in todo]
    for record in records:
        commit_shard(plan.root, record)
    wanted = {(task.split, task.name) for task in plan.tasks}
    there = [record for record in read_records(plan.root) if (record.split, record.name) in wanted]
    identity = {**plan.identity, **(plan.facts or {})}
    manifest = publish_manifest(plan.root, identity, plan.kind, plan.summarize(there), there)
    if plan.finish is not None:
        plan.finish()
    return RunReport(
        num_rows=sum(record.num_rows for record in records),
        num_shards=len(records),
        num_skipped=len(plan.tasks) - len(records),
        seconds=0.0,
        counts=records[0].counts if records else {},
        manifest=manifest,
    )


def contents(root: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rows_of(root: Path | str) -> dict[str, Mapping[str, bytes]]:
    """Return every row of a finished dataset by its key; a key that stands twice is an error."""
    rows: dict[str, Mapping[str, bytes]] = {}
    for shard in load_manifest(str(root)).shards:
        for row in read_rows(f"{root}/{shard.split.value}/{shard.name}.tar"):
            assert row["__key__"] not in rows
            rows[row["__key__"]] = {suffix: content for suffix, content in row.items() if suffix != "__key__"}
    return rows


def facts_of(root: Path | str) -> dict[str, dict[str, object]]:
    """Return the JSON of every row by its key."""
    return {key: json.loads(row["json"]) for key, row in rows_of(root).items()}


def lines_of_dataset(root: Path | str) -> list[dict[str, object]]:
    """Return every ledger line of a finished dataset, in the order of its shards."""
    return [
        line | {"shard": f"{shard.split.value}/{shard.name}"}
        for shard in load_manifest(str(root)).shards
        for line in read_ledger(f"{root}/{shard.split.value}/{shard.name}.ledger.parquet").to_pylist()
    ]


def counts_of(root: Path | str) -> dict[str, int]:
    """Return the manifest's counts over both splits."""
    counts = load_manifest(str(root)).summary["counts"]
    statuses = sorted({status for split in Split for status in counts[split.value]})
    return {status: sum(counts[split.value].get(status, 0) for split in Split) for status in statuses}
