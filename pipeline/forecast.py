"""What a latent cache will cost before it is made: a minute of the real stage on the real data, then arithmetic.

Order: some rows of a missing shard → a small tar of their own → the real stage, in as many processes as will work on
this machine → rows a second and bytes a row → hours, bytes, money, and the number of epochs from which a cache pays.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from ldm.config import Config
from pipeline.encode import EncodeStage
from pipeline.latent_config import LatentsConfig
from pipeline.plan import Plan, ShardTask
from pipeline.store.manifest import shard_path
from pipeline.store.schema import Row
from pipeline.store.shards import read_rows, write_shard

MAX_PROCESSES = 8
"""Workers that are really started for a measurement; more are reckoned from these."""
WARM_UP_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig(Config):
    """What `--dry-run` measures, and at which prices it reckons."""

    seconds: float = 60.0
    """How long to measure, about; 0 measures nothing."""
    price_per_hour: float = 0.0
    """Price of one worker (a GPU, or its CPUs) for an hour, in any currency."""
    price_per_tb_month: float = 0.0
    """Price of a terabyte kept for a month, in the same currency."""
    months: float = 1.0
    """How long the cache is kept."""
    epochs: float = 10.0
    """How often training will go through the dataset, for the question whether a cache pays."""

    def __post_init__(self) -> None:
        for name in ("seconds", "price_per_hour", "price_per_tb_month", "months", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A measurement and what follows from it.

    Attributes:
        rows_per_second: of all workers together.
        num_workers: workers that will work at once.
        bytes_per_row: what a row takes in the cache, its share of the text included.
        num_rows: rows that are still to be encoded.
        num_rows_in_all: rows of the finished cache.
        num_measured: rows that the measurement encoded.
        start_seconds: from the start of a worker's process until it is ready to encode.
        config: the prices.
    """

    rows_per_second: float
    num_workers: int
    bytes_per_row: float
    num_rows: int
    num_rows_in_all: int
    num_measured: int
    start_seconds: float
    config: ForecastConfig

    @property
    def seconds(self) -> float:
        """Wall-clock time of what is missing, with the start of the workers and without that of Ray."""
        return self.start_seconds + self.num_rows / self.rows_per_second

    @property
    def worker_hours(self) -> float:
        """Time of all workers together for what is missing."""
        return self.seconds * self.num_workers / 3600

    @property
    def worker_hours_an_epoch(self) -> float:
        """Time of all workers together to encode every row once, as training without a cache does in each epoch."""
        return self.num_rows_in_all / self.rows_per_second * self.num_workers / 3600

    @property
    def storage_price(self) -> float:
        """Price of keeping the finished cache."""
        terabytes = self.num_rows_in_all * self.bytes_per_row / 1e12
        return terabytes * self.config.price_per_tb_month * self.config.months

    @property
    def cached_price(self) -> float:
        """Price of encoding every row once and keeping the result."""
        return self.worker_hours_an_epoch * self.config.price_per_hour + self.storage_price

    @property
    def online_price(self) -> float:
        """Price of encoding every row in each epoch."""
        return self.config.epochs * self.worker_hours_an_epoch * self.config.price_per_hour

    def describe(self) -> str:
        """Return the forecast for a person, with its arithmetic."""
        each = self.rows_per_second / self.num_workers
        size = self.num_rows * self.bytes_per_row
        lines = [
            f"  measured {self.num_measured:,} rows of this dataset on this machine: {each:.1f} rows/s a worker, "
            f"{self.bytes_per_row:,.0f} bytes a row",
            f"  time     {self.start_seconds:.0f} s start + {self.num_rows:,} rows / ({self.num_workers} workers x "
            f"{each:.1f} rows/s) = {_duration(self.seconds)}, {self.worker_hours:.3g} worker hours",
            f"  bytes    {self.num_rows:,} rows x {self.bytes_per_row:,.0f} = {size / 1e9:.3g} GB",
        ]
        return "\n".join(lines + self._money())

    def _money(self) -> list[str]:
        prices = self.config
        hours = self.worker_hours_an_epoch
        if not prices.price_per_hour:
            pays = f"{prices.epochs:g} epochs without a cache encode every row as often: {prices.epochs * hours:.3g}"
            return [f"  caching  {pays} worker hours against {hours:.3g}; --forecast.price-per-hour reckons in money"]
        verdict = "pays" if self.cached_price < self.online_price else "does not pay"
        return [
            f"  money    {self.worker_hours:.3g} worker hours x {prices.price_per_hour:g} = "
            f"{self.worker_hours * prices.price_per_hour:.2f}",
            f"  caching  {verdict}: {hours:.3g} h x {prices.price_per_hour:g} + storage {self.storage_price:.2f} = "
            f"{self.cached_price:.2f} with it, {prices.epochs:g} epochs x {hours:.3g} h x {prices.price_per_hour:g} = "
            f"{self.online_price:.2f} without",
        ]


def forecast(config: LatentsConfig, plan: Plan, todo: list[ShardTask], prices: ForecastConfig) -> Forecast:
    """Measure the stage on rows of the first missing shards and reckon from that.

    Raises:
        ValueError: if the stage refuses those rows, as it would in the run.
    """
    num_workers = min(plan.resources.max_actors or _num_fitting(plan), len(todo))
    # A process would take the first GPU however many there are, so one is measured and stands for all.
    num_processes = 1 if plan.resources.num_gpus else min(num_workers, _num_fitting(plan), MAX_PROCESSES)
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_measure, config, todo, prices.seconds, time.time()) for _ in range(num_processes)]
        measured = [job.result() for job in jobs]
    rate = sum(part.num_rows / part.seconds for part in measured) * num_workers / num_processes
    return Forecast(
        rows_per_second=rate,
        num_workers=num_workers,
        bytes_per_row=sum(part.num_bytes for part in measured) / sum(part.num_rows for part in measured),
        num_rows=sum(task.num_rows for task in todo),
        num_rows_in_all=plan.num_rows,
        num_measured=sum(part.num_rows for part in measured),
        start_seconds=max(part.start_seconds for part in measured),
        config=prices,
    )


class _Measured(NamedTuple):
    """Rows that the stage, once it was warm, encoded in some seconds, the bytes that they took, and its start."""

    num_rows: int
    seconds: float
    num_bytes: int
    start_seconds: float


def _measure(config: LatentsConfig, todo: list[ShardTask], seconds: float, asked: float) -> _Measured:
    """Encode rows of the missing shards for about some seconds, cut into shards as large as the first of them.

    Args:
        config: of the run.
        todo: the missing shards.
        seconds: how long.
        asked: `time.time()` when the process was asked for.
    """
    rows = itertools.chain.from_iterable(read_rows(task.source_name) for task in todo)
    with TemporaryDirectory(prefix="ldm-forecast-") as home:
        stage = EncodeStage(dataclasses.replace(config, root=f"{home}/latents"))
        warm = _encode(stage, home, todo[0], list(islice(rows, WARM_UP_ROWS)), time.time() - asked)
        left = max(1, round(seconds * warm.num_rows / warm.seconds))
        parts = []
        while shard := list(islice(rows, min(left, todo[0].num_rows))):
            parts.append(_encode(stage, home, todo[0], shard, warm.start_seconds))
            left -= len(shard)
        if sum(part.num_rows for part in parts) < warm.num_rows:
            return warm  # a few rows share fewer captions, and say less
        num_rows, spent, num_bytes = (sum(part[i] for part in parts) for i in range(3))
        return _Measured(int(num_rows), spent, int(num_bytes), warm.start_seconds)


def _encode(stage: EncodeStage, home: str, first: ShardTask, rows: list[Row], start_seconds: float) -> _Measured:
    """Encode rows as a shard of their own, under the name of the first shard that they came from."""
    write_shard(f"{home}/dataset", first.split, first.name, rows)
    source = shard_path(f"{home}/dataset", first.split, first.name, "tar")
    task = dataclasses.replace(first, source_name=source, num_rows=len(rows))
    started = time.perf_counter()
    record = stage(task)
    return _Measured(len(rows), time.perf_counter() - started, record.num_bytes, start_seconds)


def _num_fitting(plan: Plan) -> int:
    """Return how many workers this machine holds at once; a cluster's other nodes are not known here."""
    needs = plan.resources
    by_cpu = int(len(os.sched_getaffinity(0)) / needs.num_cpus)
    by_gpu = int(torch.cuda.device_count() / needs.num_gpus) if needs.num_gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
