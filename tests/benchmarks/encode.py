"""A latent cache made end to end against the autoencoder's own forward on random tensors, in turns, on two cores.

python -m tests.benchmarks.encode [--device cuda] [--quick] [--save]

Ours is `EncodeStage` on whole shards: read, decode, crop, encode pictures and captions, gate, write. The bare side is
the same weights in the same precision, batch and threads, on as many random images, half of them before ours and half
behind it, so that neighbours on a shared machine hit both; the turns that count are those in which neighbours took
least. A second ratio adds to the bare side the text encoder's forward on the tokens of the same captions, in batches of
equal length: what both networks take at least. Weights are random; the gate works, but its floor is out of the way. The
CPU ratio compares seconds of CPU, which neighbours touch less. Stages are timed alone, in milliseconds of CPU a row, on
a GPU of wall time: their sum is what a worker without any overlap would take. On a GPU: kl-f8 at 256 and 512 px in
bf16.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from ldm.conditioning.text import TextEncoder
from ldm.config import Config
from ldm.first_stage import load_autoencoder
from ldm.precision import Precision
from ldm.types import Image
from pipeline.crops import Part
from pipeline.encode import EncodeStage
from pipeline.encoder import Encoder, torch_device
from pipeline.latent_config import Device, LatentsConfig
from pipeline.latent_gate import EncodedBatch, Gate, stored_form
from pipeline.latent_plan import plan_latents
from pipeline.latent_shard import MOMENTS, npy_bytes
from pipeline.plan import ShardTask
from pipeline.store.schema import Row, Split
from pipeline.store.shards import read_rows, write_shard
from pipeline.text_table import distinct_captions, write_table
from tests.benchmarks.encode_work import Work, cpu_works, gpu_works
from tests.benchmarks.neighbours import TRIES_PER_TURN, Clock, quiet_turns

RESULTS = Path(__file__).parent / "results"
GOAL = 0.95
TEXT_BATCH = 64
"""Captions at once, as in `TextEncoder`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeBenchmark(Config):
    """Rows a second of a latent cache being made."""

    device: Device = Device.CPU
    """Where the encoders run."""
    rounds: int = 5
    """Turns of each side, after one that is not counted."""
    threads: int = 2
    """CPU threads of the worker."""
    quick: bool = False
    """Under a minute: two turns of a quarter of the rows, however busy the machine is."""
    save: bool = False
    """Write the result beside the other results."""


def main() -> None:
    """Run both sides in turns and print the tables."""
    settings = tyro.cli(EncodeBenchmark, description=__doc__)
    works = gpu_works() if settings.device is Device.CUDA else cpu_works()
    if settings.quick:
        settings, works = replace(settings, rounds=2), [replace(work, rows=work.rows // 4) for work in works]
    machine = torch.cuda.get_device_name() if settings.device is Device.CUDA else platform.processor()
    record: dict[str, Any] = {"settings": settings.to_dict(), "machine": machine or platform.machine()}
    record |= {"num_cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "works": {}}
    print(f"{record['machine']}, {settings.threads} threads of {record['num_cores']} cores, torch {torch.__version__}")
    for work in works:
        measured = replace(work, threads=settings.threads)
        with tempfile.TemporaryDirectory(prefix="encode-benchmark-") as home:
            record["works"][work.name] = _measured(measured, settings, Path(home))
        _print(measured, record["works"][work.name])
    record["ratio"] = record["works"][works[0].name]["ratio"]
    if settings.save:
        path = RESULTS / ("encode-cuda.json" if settings.device is Device.CUDA else "encode.json")
        path.write_text(json.dumps(record, indent=1) + "\n")
    for work in works[1:]:
        result = record["works"][work.name]
        print(f"encode of {work.name}: ratio {result['ratio']:.3f}, with text {result['ratio_with_text']:.3f}")
    print(f"encode ratio {record['ratio']:.3f} goal {GOAL}")


def _measured(work: Work, settings: EncodeBenchmark, home: Path) -> dict[str, Any]:
    """Return the rates of every turn of both sides, and the milliseconds a row of every stage."""
    config = work.make(home)
    plan = plan_latents(config)
    stage = EncodeStage(config)
    bare, text = Bare(config), BareText(config, plan.tasks)
    num_rows = sum(task.num_rows for task in plan.tasks)

    def turn() -> tuple[Clock, Clock, Clock]:
        before, text_before = bare.clock(num_rows // 2), text.clock(0)
        start = Clock.now()
        for task in plan.tasks:
            stage(task)
        ours = Clock.now() - start
        return ours, before + bare.clock(num_rows - num_rows // 2), text_before + text.clock(1)

    turn()  # warms up
    turns = quiet_turns(turn, settings.rounds, 1 if settings.quick else TRIES_PER_TURN)
    ratios = [theirs.wall / ours.wall for (ours, theirs, _), _ in turns]
    ratios_with_text = [(theirs.wall + captions.wall) / ours.wall for (ours, theirs, captions), _ in turns]
    return {
        "rows": num_rows,
        "rows_per_second": {
            "ours": [num_rows / ours.wall for (ours, _, _), _ in turns],
            "bare": [num_rows / theirs.wall for (_, theirs, _), _ in turns],
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio_with_text": statistics.median(ratios_with_text),
        "ratios_with_text": ratios_with_text,
        "cpu_ratios": [theirs.cpu / ours.cpu for (ours, theirs, _), _ in turns],
        "neighbours": [done.neighbours for done in turns],
        "milliseconds": Stages(config, plan.tasks).milliseconds(),
    }


class Bare:
    """The autoencoder's forward on random images: the module as it is loaded, whole batches, nothing else."""

    def __init__(self, config: LatentsConfig) -> None:
        self._device = torch_device(config.device)
        self._model = load_autoencoder(config.autoencoder).requires_grad_(False).eval().to(self._device)
        shape = (config.batch_size, 3, config.image_size, config.image_size)
        self._images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._device)
        self._is_half = config.precision is not Precision.FP32
        self._dtype = torch.float16 if config.precision is Precision.FP16 else torch.bfloat16

    def clock(self, num_rows: int) -> Clock:
        """Return how long that many rows take."""
        _wait(self._device)
        start = Clock.now()
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=self._is_half):
            for first in range(0, num_rows, len(self._images)):
                self._model.encode(self._images[: num_rows - first])
        _wait(self._device)
        return Clock.now() - start


class BareText:
    """The text encoder's forward on the tokens of every shard's distinct captions: nothing is cut, cast or written."""

    def __init__(self, config: LatentsConfig, tasks: Sequence[ShardTask]) -> None:
        self._device = torch_device(config.device)
        encoder = TextEncoder(config.text, self._device)
        (self._tower,) = encoder.towers
        self._halves: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for number, task in enumerate(tasks):
            captions = [tuple(json.loads(row["json"])["captions"]) for row in read_rows(task.source_name)]
            tokens = encoder.token_ids(distinct_captions(captions))
            by_length = itertools.groupby(sorted(tokens, key=len), key=len)
            for same in (list(group) for _, group in by_length):
                batches = torch.from_numpy(np.stack(same)).long()[..., 0].to(self._device).split(TEXT_BATCH)
                self._halves[number % 2].extend(batches)

    def clock(self, half: int) -> Clock:
        """Return how long half of the shards' captions take."""
        _wait(self._device)
        start = Clock.now()
        for tokens in self._halves[half]:
            self._tower.output(tokens)
        _wait(self._device)
        return Clock.now() - start


class Stages:
    """Each stage of a shard's encoding by itself."""

    def __init__(self, config: LatentsConfig, tasks: Sequence[ShardTask]) -> None:
        self.config = config
        self.encoder = Encoder(config)
        self.text = TextEncoder(config.text, self.encoder.device)
        self.task = tasks[0]
        self.rows = list(read_rows(self.task.source_name))
        size = config.image_size
        self.part = Part(name="", image_size=size, size=(size, size), rows=tuple(range(len(self.rows))))
        self.captions = [tuple(json.loads(row["json"])["captions"]) for row in self.rows]

    def milliseconds(self, repeats: int = 3) -> dict[str, float]:
        """Return the milliseconds a row of every stage, the median of some repeats."""
        images = [self.encoder.prepare(batch, self.part).images[0] for batch in self._batches()]
        moments = [self.encoder.encode(batch) for batch in images]
        stages: dict[str, Callable[[], object]] = {
            "read": lambda: list(read_rows(self.task.source_name)),
            "decode": lambda: [self.encoder.prepare(batch, self.part).images[0] for batch in self._batches()],
            "forward": lambda: [self.encoder.encode(batch) for batch in images],
            "fp16": lambda: [stored_form(batch) for batch in moments],
            "text": self._embed,
            "gate": lambda: self._gate(images, moments),
            "write": lambda: self._write(moments),
        }
        spent: dict[str, list[float]] = {stage: [] for stage in stages}
        for _ in range(repeats):
            for stage, work in stages.items():
                _wait(self.encoder.device)
                start = Clock.now()
                work()
                _wait(self.encoder.device)
                taken = Clock.now() - start
                spent[stage].append(taken.wall if self.encoder.device.type == "cuda" else taken.cpu)
        return {stage: 1e3 * statistics.median(seconds) / len(self.rows) for stage, seconds in spent.items()}

    def _batches(self) -> Iterator[list[Row]]:
        rows = iter(self.rows)
        while batch := list(itertools.islice(rows, self.config.batch_size)):
            yield batch

    def _embed(self) -> None:
        distinct = distinct_captions(self.captions)
        self.text.count_truncated(distinct)
        numbers = {caption: number for number, caption in enumerate(distinct)}
        choices = [[numbers[text] for text in row] for row in self.captions]
        tokens = self.text.token_ids(distinct)
        with tempfile.TemporaryDirectory(prefix="encode-benchmark-") as folder:
            parts = self.text.parts_of_tokens(tokens)
            write_table(f"{folder}/text.safetensors", distinct, choices, [len(row) for row in tokens], parts)

    def _gate(self, images: list[Image], moments: list[torch.Tensor]) -> None:
        gate, first = Gate(self.config.gate, -100.0, self.task, [len(self.rows)], [MOMENTS]), 0
        for batch, made in zip(images, moments, strict=True):
            stored, faults, is_bad = stored_form(made)
            crops = batch[gate.chosen_of(0, first, len(batch))]
            encoded = EncodedBatch(
                part=0, first=first, forms={MOMENTS: stored}, stored={}, faults=faults, is_bad=is_bad, crops=crops
            )
            gate.take(encoded, [str(row) for row in range(len(batch))])
            first += len(batch)
        gate.judge(self.encoder.decode)

    def _write(self, moments: list[torch.Tensor]) -> None:
        stored = (row for batch in moments for row in batch.half().cpu().numpy())
        made = (
            {"__key__": row["__key__"], MOMENTS: npy_bytes(one), "txt": row["txt"], "json": row["json"]}
            for row, one in zip(self.rows, stored, strict=True)
        )
        with tempfile.TemporaryDirectory(prefix="encode-benchmark-") as folder:
            write_shard(folder, Split.TRAIN, "000000", made)


def _print(work: Work, result: dict[str, Any]) -> None:
    print(f"\n{work.name}, {result['rows']} rows, batch {work.batch_size}, {work.precision.value}")
    print(f"  {'rows/s':8}{'median':>9}{'min':>9}{'max':>9}")
    for side, rates in result["rows_per_second"].items():
        print(f"  {side:8}{statistics.median(rates):9.1f}{min(rates):9.1f}{max(rates):9.1f}")
    sides = (("ratio", "ratios"), ("+ text", "ratios_with_text"), ("CPU", "cpu_ratios"))
    for name, ratios in ((name, result[key]) for name, key in sides):
        print(f"  {name:8}{statistics.median(ratios):9.3f}{min(ratios):9.3f}{max(ratios):9.3f}")
    print(f"  neighbours took {min(result['neighbours']):.0%} to {max(result['neighbours']):.0%} of the machine")
    spent = result["milliseconds"]
    stages = "".join(f"  {stage} {value:.2f}" for stage, value in spent.items())
    print(f"  ms a row, each stage alone:{stages}  together {sum(spent.values()):.2f}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
