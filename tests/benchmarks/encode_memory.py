"""Peak memory of an encode worker beside its models, for shards of several sizes: it must not depend on them.

python -m tests.benchmarks.encode_memory [--rows 250 2000] [--quick] [--save]

Each shard is encoded in a fresh process: resident memory once both networks are loaded is what the models take; the
highest while the shard is made, less that, is what the worker takes beside: on a CPU the activations are part of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.conditioning.text import TextEncoderConfig
from ldm.config import Config
from ldm.interop.diffusers import save_autoencoder
from pipeline.encode import EncodeStage
from pipeline.latent_config import Device, LatentsConfig
from pipeline.latent_gate import GateConfig
from pipeline.latent_plan import plan_latents
from pipeline.store.manifest import ShardRecord, claim_root, commit_shard, publish_manifest
from pipeline.store.schema import Row, Split, key_of
from pipeline.store.shards import write_shard

RESULT = Path(__file__).parent / "results" / "encode_memory.json"
GOAL_GIB = 2.0
NUM_PICTURES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeMemoryBenchmark(Config):
    """Peak memory of an encode worker."""

    rows: tuple[int, ...] = (250, 2000)
    """Rows of each shard that is made."""
    image_size: int = 512
    """Side of the pictures and crops, pixels."""
    batch_size: int = 32
    """Images encoded at once."""
    base_channels: int = 16
    """Width of the autoencoder, the smaller the less its own activations take."""
    quick: bool = False
    """A tenth of the rows."""
    save: bool = False
    """Write the result beside the other results."""


def main() -> None:
    """Measure and print."""
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        print(json.dumps(measured(json.loads(sys.argv[2]))))
        return
    settings = tyro.cli(EncodeMemoryBenchmark, description=__doc__)
    sizes = [max(rows // (10 if settings.quick else 1), settings.batch_size) for rows in settings.rows]
    with tempfile.TemporaryDirectory(prefix="encode-memory-") as folder:
        home = Path(folder)
        write_inputs(home, settings, sizes)
        results = [run_worker(home, settings, number) for number in range(len(sizes))]
    for result in results:
        print(
            f"{result['rows']:6,} rows of {settings.image_size} px: {result['beside_gib']:.2f} GiB beside the models' "
            f"{result['models_gib']:.2f} GiB, {result['images_a_second']:.1f} images/s"
        )
    worst = max(result["beside_gib"] for result in results)
    if settings.save:
        RESULT.write_text(json.dumps({"settings": settings.to_dict(), "results": results}, indent=1) + "\n")
    print(f"encode_memory {worst:.2f} GiB goal {GOAL_GIB}")


def run_worker(home: Path, settings: EncodeMemoryBenchmark, shard: int) -> dict[str, Any]:
    """Encode one shard in a process of its own and return what it measured."""
    asked = json.dumps({"home": str(home), "shard": shard, "settings": settings.to_dict()})
    command = [sys.executable, "-m", "tests.benchmarks.encode_memory", "--worker", asked]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """Encode a shard and return the peak of memory beside the models."""
    settings = {name: asked["settings"][name] for name in ("image_size", "batch_size")}
    config = latents_config(Path(asked["home"]), **settings)
    plan = plan_latents(config)
    stage = EncodeStage(config)
    models_kib = status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    task = plan.tasks[asked["shard"]]
    started = time.monotonic()
    stage(replace(task, name=f"1{task.name}"))
    seconds = time.monotonic() - started
    return {
        "rows": task.num_rows,
        "models_gib": models_kib / 2**20,
        "beside_gib": (status_kib("VmHWM") - models_kib) / 2**20,
        "images_a_second": task.num_rows / seconds,
    }


def latents_config(home: Path, image_size: int, batch_size: int) -> LatentsConfig:
    """Return the config of latents of the benchmark's dataset, on the CPU; the gate takes a random autoencoder."""
    return LatentsConfig(
        root=str(home / "latents"),
        dataset=str(home / "dataset"),
        autoencoder=str(home / "autoencoder"),
        text=TextEncoderConfig(max_tokens=77),
        image_size=image_size,
        batch_size=batch_size,
        gate=GateConfig(min_psnr=-100.0, std_range=(0.0, 1e9)),
        device=Device.CPU,
    )


def write_inputs(home: Path, settings: EncodeMemoryBenchmark, sizes: list[int]) -> None:
    """Publish an autoencoder of factor 8 and a dataset of one shard a size; every caption is another one."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(
        latent_channels=4,
        base_channels=settings.base_channels,
        channel_mult=(1, 1, 2, 2),
        num_res_blocks=1,
        mid_attention=False,
        norm_groups=8,
    )
    save_autoencoder(Autoencoder(shape), str(home / "autoencoder"))
    identity = {"picture": {"image_size": settings.image_size, "image_format": "jpg"}}
    claim_root(str(home / "dataset"), "dataset", identity)
    pictures = [picture(number, settings.image_size) for number in range(NUM_PICTURES)]
    for shard, size in enumerate(sizes):
        rows = (row_of(shard, number, pictures, settings.image_size) for number in range(size))
        files = write_shard(str(home / "dataset"), Split.TRAIN, f"{shard:06d}", rows)
        record = ShardRecord(name=f"{shard:06d}", split=Split.TRAIN, num_rows=size, files=files, counts={"ok": size})
        commit_shard(str(home / "dataset"), record)
    publish_manifest(str(home / "dataset"), identity, "dataset", {})


def row_of(shard: int, number: int, pictures: list[bytes], side: int) -> Row:
    """Return a row with a caption of its own, as long as a person's."""
    words = "a photograph of a harbour at dusk with boats and people on the quay, seen from the water, in the rain"
    caption = f"{words}, number {number} of shard {shard}"
    facts = {"captions": [caption], "width": side, "height": side, "original_width": side, "original_height": side}
    return {
        "__key__": key_of(f"{shard} {number}"),
        "jpg": pictures[number % len(pictures)],
        "txt": caption.encode(),
        "json": json.dumps(facts).encode(),
    }


def picture(number: int, side: int) -> bytes:
    """Return a JPEG of soft noise."""
    coarse = np.random.default_rng(number).integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def status_kib(name: str) -> int:
    """Return a figure of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"this system does not say the {name} of a process")


if __name__ == "__main__":
    main()
