"""Samples a second of the latents' loader against webdataset and mosaicml-streaming, in turns, in one process each.

python -m tests.benchmarks.loader --peer-python VENV/bin/python [--quick] [--save]

mosaicml-streaming wants an older transformers than ours and so an environment of its own:
`python -m venv VENV`, `VENV/bin/pip install mosaicml-streaming==0.13.0`.
All sides read the same rows, written in each one's own form, from the page cache, shuffled, in batches of 64: raw
moments and padded token states as float32, a mask, and the rows' keys. `gather` is the least that such a batch costs:
rows picked at random from two memory-mapped arrays and widened; `moments alone` leaves the text out and does not widen.
Torch has one thread, so that neighbours on a shared machine are not waited for at its barriers. The rows' numbers are
random; every row is compared between the sides by weighted sums.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import webdataset

from jobs.command_line import report_errors
from jobs.session import PROJECT
from ldm.config import Config
from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.order import Order, check_world, rank_positions, rows_at
from pipeline.store.manifest import load_manifest
from tests.benchmarks.collation import Batch, batched_rows, digests, samples_a_second
from tests.benchmarks.latent_rows import BATCH_SIZE, SHAPES, RowShape, write_all

RESULTS = Path(__file__).parent / "results"
GOAL, GATHER_GOAL, START_GOAL_SECONDS = 2.0, 0.5, 1.0
INDEXED_ROWS, INDEXED_SHARD_ROWS = 10_000_000, 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchmark(Config):
    """Samples a second of a shuffled cache of latents."""

    peer_python: str
    """The python that mosaicml-streaming is installed for."""
    rounds: int = 5
    """Turns of each side."""
    quick: bool = False
    """Under a minute: two turns of a tenth of the rows."""
    save: bool = False
    """Write the result beside the other results."""


@report_errors()
def main() -> None:
    """Run all sides in turns and print the tables."""
    settings = tyro.cli(LoaderBenchmark, description=__doc__)
    torch.set_num_threads(1)
    shapes = SHAPES
    if settings.quick:
        settings, shapes = replace(settings, rounds=2), tuple(replace(shape, rows=shape.rows // 10) for shape in SHAPES)
    record: dict[str, Any] = {"settings": settings.to_dict() | {"peer_python": ""}}
    record |= {"machine": platform.processor() or platform.machine(), "num_cores": len(os.sched_getaffinity(0))}
    record |= {"versions": {name: version(name) for name in ("torch", "numpy", "webdataset")}, "shapes": {}}
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as folder:
            record["shapes"][shape.name] = _measured(shape, settings, Path(folder))
        _print(shape, record["shapes"][shape.name])
    record["start_seconds"] = _start_seconds()
    record["cluster_milliseconds"] = _cluster_milliseconds()
    record |= {name: record["shapes"][shapes[0].name][name] for name in ("ratio", "gather_share")}
    if settings.save:
        (RESULTS / "loader.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"loader-start at any of {INDEXED_ROWS:,} rows {record['start_seconds']:.3f} s goal {START_GOAL_SECONDS}")
    print(f"loader-shapes of 100 clusters {record['cluster_milliseconds']:.0f} ms")
    print(f"loader-gather share {record['gather_share']:.2f} goal {GATHER_GOAL}")
    print(f"loader ratio {record['ratio']:.2f} goal {GOAL}")


def _measured(shape: RowShape, settings: LoaderBenchmark, home: Path) -> dict[str, Any]:
    """Return the rates of all sides, after seeing that they give the same rows."""
    sizes = write_all(shape, home)
    num_batches = shape.rows // BATCH_SIZE - 1
    with _streaming(settings.peer_python, shape, home) as ask:
        sizes["streaming"] = (told := ask(None))["bytes"]
        _check(shape, home, ask)
        sides: dict[str, Callable[[], float]] = {
            "ours": lambda: samples_a_second(_ours(shape, home), num_batches),
            "webdataset": lambda: samples_a_second(_webdataset(shape, home), num_batches),
            "streaming": lambda: float(ask(["samples", num_batches])),
            "gather": lambda: samples_a_second(_gather(home), num_batches),
            "moments alone": lambda: samples_a_second(_moments(home), num_batches),
        }
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(settings.rounds):
            for side, turn in sides.items():
                rates[side].append(turn())
    peers = [max(pair) for pair in zip(rates["webdataset"], rates["streaming"], strict=True)]
    ratios, shares = _ratios(rates["ours"], peers), _ratios(rates["ours"], rates["gather"])
    return {
        "rows": shape.rows,
        "samples_per_second": rates,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "gather_share": statistics.median(shares),
        "gather_shares": shares,
        "moments_share": statistics.median(_ratios(rates["ours"], rates["moments alone"])),
        "bytes_per_row": {side: size / shape.rows for side, size in sizes.items()},
        "peer": told["versions"],
    }


def _ours(shape: RowShape, home: Path) -> Iterator[Batch]:
    config = LoaderConfig(root=str(home / "ours"), batch_size=BATCH_SIZE, caption_dropout=0.0)
    for batch in LatentLoader(load_manifest(config.root), config).batches():
        states, mask = batch.condition.states, batch.condition.mask
        assert states is not None
        assert mask is not None
        yield Batch(batch.keys, batch.moments, states, mask)


def _webdataset(shape: RowShape, home: Path) -> Iterator[Batch]:
    shards = sorted(str(path) for path in (home / "webdataset").glob("*.tar"))
    rows = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode()
    named = rows.to_tuple("__key__", "moments.npy", "states.npy")
    while True:
        yield from batched_rows(iter(named), BATCH_SIZE, shape.max_tokens)


def _gather(home: Path) -> Iterator[Batch]:
    moments, states = (np.load(home / name, mmap_mode="r") for name in ("moments.npy", "states.npy"))
    lengths, names = np.load(home / "lengths.npy"), json.loads((home / "names.json").read_text())
    keys = [key for key, _ in names]
    places = np.arange(states.shape[1])
    for rows in _picked(len(moments)):
        yield Batch(
            [keys[row] for row in rows.tolist()],
            torch.from_numpy(moments[rows]).float(),
            torch.from_numpy(states[rows]).float(),
            torch.from_numpy(places < lengths[rows, None]),
        )


def _moments(home: Path) -> Iterator[Batch]:
    moments, nothing = np.load(home / "moments.npy", mmap_mode="r"), torch.empty(0)
    for rows in _picked(len(moments)):
        yield Batch(range(BATCH_SIZE), torch.from_numpy(moments[rows]), nothing, nothing)  # type: ignore[arg-type]


def _picked(num_rows: int) -> Iterator[np.ndarray]:
    dice = np.random.default_rng(0)
    while True:
        order = dice.permutation(num_rows)
        yield from (order[start : start + BATCH_SIZE] for start in range(0, num_rows - BATCH_SIZE + 1, BATCH_SIZE))


@contextmanager
def _streaming(python: str, shape: RowShape, home: Path) -> Iterator[Callable[[object], Any]]:
    """Start the peer's process; yield what sends it a command, if there is one, and returns its answer."""
    command = [python, "-m", "tests.benchmarks.streaming_child", str(home), str(BATCH_SIZE), str(shape.max_tokens)]
    quiet = {"cwd": PROJECT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **quiet) as process:  # type: ignore[call-overload]

        def ask(question: object) -> Any:
            if question is not None:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            if not (line := process.stdout.readline()):
                raise ValueError(f"--peer-python {python} cannot read MDS; see the first lines of this file")
            return json.loads(line)

        yield ask
        process.stdin.close()


def _check(shape: RowShape, home: Path, ask: Callable[[object], Any]) -> None:
    """See that all sides give the same rows under the same keys."""
    num_batches = shape.rows // BATCH_SIZE
    wanted = digests(_gather(home), num_batches)
    found = {
        "ours": digests(_ours(shape, home), num_batches),
        "webdataset": digests(_webdataset(shape, home), num_batches),
        "streaming": ask(["digests", num_batches]),
    }
    for side, rows in found.items():
        common = rows.keys() & wanted.keys()
        assert 2 * len(common) > len(wanted), f"{side} has {len(common)} of {len(wanted)} rows"
        for key in common:
            assert np.allclose(rows[key], wanted[key], rtol=1e-9), f"{side} has another row {key}"


def _start_seconds() -> float:
    """Return the seconds from nothing to the first batch's rows, in the middle of ten million, the slowest of some."""
    sizes = (INDEXED_SHARD_ROWS,) * (INDEXED_ROWS // INDEXED_SHARD_ROWS)
    seconds = []
    for sample in (0, 7_654_321, 123_456_789):
        start = time.perf_counter()
        rows_at(Order(shard_sizes=sizes, seed=sample), rank_positions(sample, sample + 2048, 0, 1))
        seconds.append(time.perf_counter() - start)
    return max(seconds)


def _cluster_milliseconds() -> float:
    """Return how long it takes to see for a hundred clusters that their ranks share out the same global batch."""
    order, batch_size = Order(shard_sizes=(1_000,) * 100, seed=0, num_streams=48), 480
    worlds = [world for world in range(1, 49) if 48 % world == 0]
    start_seconds = time.perf_counter()
    for number in range(100):
        world, start = worlds[number % len(worlds)], 997 * number
        check_world(world=world, num_streams=order.num_streams, batch_size=batch_size)
        shares = [rank_positions(start, start + batch_size, rank, world) for rank in range(world)]
        together = np.concatenate(shares)
        rows, wanted = rows_at(order, together), rows_at(order, np.arange(start, start + batch_size))
        assert {len(share) for share in shares} == {batch_size // world}
        assert np.array_equal(rows.shards, wanted.shards[together - start])
        assert np.array_equal(rows.rows, wanted.rows[together - start])
    return 1e3 * (time.perf_counter() - start_seconds)


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _print(shape: RowShape, result: dict[str, Any]) -> None:
    print(
        f"\n{shape.name}: {shape.rows} rows, moments {shape.moments}, up to {shape.max_tokens} tokens of {shape.width}"
    )
    print(f"  {'samples/s':16}{'median':>10}{'min':>10}{'max':>10}   bytes a row on disk")
    for side, rates in result["samples_per_second"].items():
        size = result["bytes_per_row"].get(side)
        shown = f"{size:12.0f}" if size else ""
        print(f"  {side:16}{statistics.median(rates):10.0f}{min(rates):10.0f}{max(rates):10.0f}{shown}")
    for name, values in (("ratio", result["ratios"]), ("of the gather", result["gather_shares"])):
        print(f"  {name:16}{statistics.median(values):10.2f}{min(values):10.2f}{max(values):10.2f}")
    print(f"  of the moments alone {result['moments_share']:.2f}")


if __name__ == "__main__":
    main()
