"""A latent cache made end to end against the plain script: diffusers' autoencoder behind torch's DataLoader, in turns.

python -m tests.benchmarks.encode_peer [--device cuda] [--quick] [--save]

Both sides read the same tars, crop alike, encode the same pictures with the same weights and every caption with the
same text encoder, and write moments and token states as float16. Ours also gates, digests, indexes and publishes; the
script (tests/benchmarks/plain_encoding.py) does nothing more. It has the best of 0, 1 and 2 workers, tried first. What
both wrote is compared. The CPU ratio compares seconds of CPU, which neighbours on a shared machine touch less. The last
table is what a row takes on disk, ours and as others store the same rows.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from ldm.conditioning.text import encoder_folder
from ldm.config import Config
from ldm.precision import Precision
from pipeline.encode import EncodeStage
from pipeline.latent_config import Device, LatentsConfig
from pipeline.latent_plan import plan_latents
from pipeline.latent_shard import MOMENTS
from pipeline.plan import Plan
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows
from pipeline.text_table import open_text_table
from tests.benchmarks.cache_formats import CachedRow, bytes_per_row
from tests.benchmarks.encode_work import Work, cpu_works, gpu_works, tars_of
from tests.benchmarks.neighbours import TRIES_PER_TURN, Clock, quiet_turns
from tests.benchmarks.plain_encoding import PlainEncoding

RESULTS = Path(__file__).parent / "results"
GOALS = {Device.CPU: 1.3, Device.CUDA: 2.0}
HALF = {Precision.FP32: None, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
TOLERANCE = 1e-2
"""Largest difference of a stored number from the script's, against 1 + its size, in float32."""


_script: PlainEncoding | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodePeerBenchmark(Config):
    """Rows a second of a latent cache being made, against the plain script."""

    device: Device = Device.CPU
    """Where the encoders run."""
    rounds: int = 5
    """Turns of each side."""
    threads: int = 2
    """CPU threads of torch on both sides."""
    quick: bool = False
    """Under a minute: two turns of a quarter of the rows, however busy the machine is, the script without workers."""
    save: bool = False
    """Write the result beside the other results."""


def main() -> None:
    """Run both sides in turns and print the tables."""
    settings = tyro.cli(EncodePeerBenchmark, description=__doc__)
    torch.set_num_threads(settings.threads)
    works = gpu_works() if settings.device is Device.CUDA else cpu_works()
    if settings.quick:
        settings, works = replace(settings, rounds=2), [replace(work, rows=work.rows // 4) for work in works]
    machine = torch.cuda.get_device_name() if settings.device is Device.CUDA else platform.processor()
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "webdataset")}
    record: dict[str, Any] = {"settings": settings.to_dict(), "machine": machine or platform.machine()}
    record |= {"num_cores": len(os.sched_getaffinity(0)), "versions": versions, "works": {}}
    print(f"{record['machine']}, {settings.threads} threads of {record['num_cores']} cores, {versions}")
    for work in works:
        with tempfile.TemporaryDirectory(prefix="encode-benchmark-") as home:
            result = _measured(replace(work, threads=settings.threads), settings, Path(home))
        record["works"][work.name] = result
        _print(work, result)
    record["ratio"] = record["works"][works[0].name]["ratio"]
    if settings.save:
        path = RESULTS / ("encode_peer-cuda.json" if settings.device is Device.CUDA else "encode_peer.json")
        path.write_text(json.dumps(record, indent=1) + "\n")
    for work in works[1:]:
        print(f"encode_peer of {work.name}: ratio {record['works'][work.name]['ratio']:.2f}")
    print(f"encode_peer ratio {record['ratio']:.2f} goal {GOALS[settings.device]}")


def _measured(work: Work, settings: EncodePeerBenchmark, home: Path) -> dict[str, Any]:
    """Return the rates of every turn of both sides, after seeing that they wrote the same numbers."""
    config = work.make(home)
    plan, stage = plan_latents(config), EncodeStage(config)
    tars, theirs = tars_of(config.dataset), home / "plain.tar"
    folder = encoder_folder(config.text)
    device = "cuda" if settings.device is Device.CUDA else "cpu"
    spawn = multiprocessing.get_context("spawn")
    script = (config.autoencoder, folder, work.image_size, config.text.max_tokens, work.batch_size, device)
    arguments = (settings.threads, *script, HALF[work.precision])
    with ProcessPoolExecutor(1, spawn, initializer=_load_script, initargs=arguments) as process:

        def of_script(num_workers: int) -> Clock:
            return process.submit(_clock_of_script, tars, theirs, num_workers).result()

        _clock_of_ours(stage, plan)
        tried = {number: of_script(number).wall for number in ((0,) if settings.quick else (0, 1, 2))}
        num_workers = min(tried, key=lambda number: tried[number])
        worst = _compared(config, plan, theirs)
        turns = quiet_turns(
            lambda: (_clock_of_ours(stage, plan), of_script(num_workers)),
            settings.rounds,
            1 if settings.quick else TRIES_PER_TURN,
        )
    ratios = [other.wall / ours.wall for (ours, other), _ in turns]
    return {
        "rows": plan.num_rows,
        "rows_per_second": {
            "ours": [plan.num_rows / ours.wall for (ours, _), _ in turns],
            "script": [plan.num_rows / other.wall for (_, other), _ in turns],
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratios": [other.cpu / ours.cpu for (ours, other), _ in turns],
        "neighbours": [done.neighbours for done in turns],
        "script_workers": num_workers,
        "worst_difference": worst,
        "bytes_per_row": bytes_per_row(_cached(config, plan), config.text.max_tokens, Path(config.root)),
    }


def _clock_of_ours(stage: EncodeStage, plan: Plan) -> Clock:
    start = Clock.now()
    for task in plan.tasks:
        stage(task)
    return Clock.now() - start


def _load_script(threads: int, *arguments: Any) -> None:
    """Load the script into a process of its own: its memory is managed as anyone's, not as a worker of ours."""
    global _script
    torch.set_num_threads(threads)
    _script = PlainEncoding(*arguments)


def _clock_of_script(tars: list[str], target: Path, num_workers: int) -> Clock:
    assert _script is not None
    start = Clock.now()
    _script(tars, target, num_workers)
    return Clock.now() - start


def _compared(config: LatentsConfig, plan: Plan, theirs: Path) -> float:
    """See that the script wrote our numbers, and return the largest difference against 1 + a number's size."""
    script = {row["__key__"]: row for row in read_rows(str(theirs))}
    assert len(script) == plan.num_rows, f"the script wrote {len(script)} of {plan.num_rows} rows"
    worst = 0.0
    for name in (task.name for task in plan.tasks):
        base = f"{config.root}/{Split.TRAIN.value}/{name}"
        table = open_text_table(Path(f"{base}.text.safetensors"))
        for row in read_rows(f"{base}.tar"):
            other = script[row["__key__"]]
            pairs = [(_array(row[MOMENTS]), _array(other["moments.npy"]))]
            for place, caption in enumerate(json.loads(row["json"])["text_index"]):
                pairs.append((table.states(caption), _array(other[f"text{place}.npy"])))
            for one, peer in pairs:
                error = np.abs(one.astype(np.float32) - peer) / (1 + np.abs(peer.astype(np.float32)))
                worst = max(worst, float(error.max()))
    limit = TOLERANCE if config.precision is Precision.FP32 else 10 * TOLERANCE  # bf16 has 8 bits
    assert worst < limit, f"the sides wrote numbers that are {worst:.2g} apart"
    return worst


def _cached(config: LatentsConfig, plan: Plan) -> list[CachedRow]:
    rows = []
    for name in (task.name for task in plan.tasks):
        base = f"{config.root}/{Split.TRAIN.value}/{name}"
        table = open_text_table(Path(f"{base}.text.safetensors"))
        for row in read_rows(f"{base}.tar"):
            facts = json.loads(row["json"])
            states = table.states(facts["text_index"][0])
            rows.append(CachedRow(_array(row[MOMENTS]), states, facts["captions"][0]))
    return rows


def _array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content))


def _print(work: Work, result: dict[str, Any]) -> None:
    print(f"\n{work.name}, {result['rows']} rows, batch {work.batch_size}, {work.precision.value}")
    print(f"  the script has {result['script_workers']} workers; same numbers to {result['worst_difference']:.1g}")
    print(f"  {'rows/s':8}{'median':>9}{'min':>9}{'max':>9}")
    for side, rates in result["rows_per_second"].items():
        print(f"  {side:8}{statistics.median(rates):9.1f}{min(rates):9.1f}{max(rates):9.1f}")
    for name, ratios in (("ratio", result["ratios"]), ("CPU", result["cpu_ratios"])):
        print(f"  {name:8}{statistics.median(ratios):9.2f}{min(ratios):9.2f}{max(ratios):9.2f}")
    print(f"  neighbours took {min(result['neighbours']):.0%} to {max(result['neighbours']):.0%} of the machine")
    for form, size in result["bytes_per_row"].items():
        print(f"  {size:9.0f} bytes a row, {form}")


if __name__ == "__main__":
    main()
