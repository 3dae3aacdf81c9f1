"""Batches of a latent cache: which rows come next is a pure function of (manifest, config, rank, world, samples seen).

Order: positions of the batch → rows (`pipeline.order`) → one gather of moments for each shard, from a memory map of its
tar → caption choice, dropout and flip, each drawn at the row's own position → `LatentBatch`, some batches ahead.

Letters: b batch, m moment channel, h latent row, w latent column, l token, d embedding width, p width of the pooled
text, r rows of one shard.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float64, Int64

from ldm.conditioning.text_embedding import condition_of, pad_states
from ldm.config import Config
from ldm.randomness import Draw, uniform
from ldm.types import Condition, LatentBatch
from pipeline.latent_shard import LATENT_FILES, LatentShard, open_latent_shard
from pipeline.local_shards import open_local_shards
from pipeline.order import Order, Positions, Rows, check_world, rank_positions, rows_at, sequential_rows_at
from pipeline.prefetch import prefetched
from pipeline.store.manifest import Manifest
from pipeline.store.schema import Split

MAX_OPEN_SHARDS = 1024
AHEAD_WINDOWS = 16
"""How many windows before it is needed the copy of a shard begins."""
NUM_CHECKED_WINDOWS = 64
"""Windows whose shards are compared with the limit of the copies at the start."""
WINDOW_ROWS = 256
"""Rows of one rank gathered together and then cut into batches: the cost of touching a shard is shared by more rows."""

Places = Int64[np.ndarray, " r"]
PooledRows = Float16[np.ndarray, "r p"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig(Config):
    """Which latents are read, in which order, and what is drawn for a row when it is loaded."""

    root: str
    """Folder of the latents, local or remote."""
    split: Split = Split.TRAIN
    """Part of the latents."""
    batch_size: int = 64
    """Rows of a global batch, over all ranks; a multiple of the number of ranks."""
    num_streams: int = 8
    """Canonical streams of the order; the number of ranks must divide it."""
    block_rows: int = 8192
    """Rows shuffled together inside a stream."""
    caption_dropout: float = 0.1
    """Share of rows whose caption is replaced by the empty one, for classifier-free guidance."""
    seed: int = 0
    """Seed of the order and of the draws."""
    prefetch_batches: int = 4
    """Batches made ahead of the consumer."""
    cache_folder: str = ""
    """Local folder for copies of a remote root's shards; a local root needs none."""
    cache_bytes: int = 0
    """Most bytes of copies in `cache_folder`, for all processes of a machine together; 0 is no limit."""
    has_digest_check: bool = False
    """Whether every file's sha256 is compared at the start (sizes always are)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must lie in [0, 1], got {self.caption_dropout}")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes must be at least 0, got {self.cache_bytes}")
        if self.prefetch_batches < 1 or self.batch_size < 1:
            raise ValueError(
                f"prefetch_batches and batch_size must be at least 1, got {self.prefetch_batches}, {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """All that a loader needs to go on: how many samples of the endless sequence were seen."""

    samples_seen: int


class LatentLoader:
    """Reads batches of one split for one rank; `wait_seconds` is how long consumers waited for them so far."""

    def __init__(self, manifest: Manifest, config: LoaderConfig, rank: int = 0, world: int = 1) -> None:
        """Check files and world size; read nothing yet.

        Raises:
            ValueError: if a file is missing or not whole, or `world` does not divide the streams and the batch.
        """
        check_world(world=world, num_streams=config.num_streams, batch_size=config.batch_size)
        self.config = config
        self.wait_seconds = 0.0
        self._rank, self._world = rank, world
        self._max_tokens = int(manifest.identity["max_tokens"])
        self._has_flips = bool(manifest.identity["flip"])
        self._files = open_local_shards(
            manifest,
            config.root,
            config.split,
            LATENT_FILES,
            cache_folder=config.cache_folder,
            cache_bytes=config.cache_bytes,
            has_digest_check=config.has_digest_check,
        )
        self._order = Order(
            shard_sizes=self._files.sizes,
            seed=config.seed,
            num_streams=config.num_streams,
            block_rows=config.block_rows,
        )
        self._open: OrderedDict[int, LatentShard] = OrderedDict()
        self._lock = Lock()
        if self._files.is_limited:
            self._check_room()

    @property
    def num_rows(self) -> int:
        """Rows of the split: one epoch over all ranks."""
        return self._order.num_rows

    def batches(self, samples_seen: int = 0) -> Iterator[LatentBatch]:
        """Yield this rank's share of each global batch, endlessly, from `samples_seen` on, made ahead on a thread."""
        step = self._window_rows
        depth = -(-self.config.prefetch_batches * self.config.batch_size // step)
        share = self.config.batch_size // self._world
        with self._files.fetching_ahead(self._shards_between) as fetch_ahead:

            def drawn(start: int) -> LatentBatch:
                ahead = start + AHEAD_WINDOWS * step
                fetch_ahead(ahead, ahead + step)
                return self._drawn(start, start + step)

            with closing(prefetched(drawn, count(samples_seen, step), depth, self._record_wait)) as made:
                for window in made:
                    yield from (window.rows(start, start + share) for start in range(0, len(window.keys), share))

    def rows(self, start: int, stop: int) -> LatentBatch:
        """Return rows [start, stop) of the split in the manifest's order, each with its first caption."""
        positions, rows = self._fixed(start, stop)
        never = np.zeros(len(positions), bool)
        return self._batch(positions, rows, _Draws(np.zeros(len(positions)), never, never))

    def captions(self, start: int, stop: int) -> list[str]:
        """Return the first caption of rows [start, stop) of the split in the manifest's order."""
        _, rows = self._fixed(start, stop)
        self._use(sorted(set(rows.shards.tolist())))
        tables = [self._shard(int(shard)).text for shard in rows.shards]
        first = [table.choices[table.choice_offsets[row]] for table, row in zip(tables, rows.rows, strict=True)]
        return [table.text(int(caption)) for table, caption in zip(tables, first, strict=True)]

    def null_condition(self, batch_size: int) -> Condition:
        """Return the condition of the empty caption, `batch_size` times."""
        with self._lock:
            number = next(iter(self._open), 0)  # all shards have the same one, and of some there may be no copy
        null = self._shard(number).text.embedding(0)
        return condition_of([null] * batch_size, self._max_tokens)

    @property
    def _window_rows(self) -> int:
        """Rows of all ranks that are gathered together, whole batches."""
        return max(1, WINDOW_ROWS * self._world // self.config.batch_size) * self.config.batch_size

    def _shards_between(self, start: int, stop: int) -> list[int]:
        """Return the shards of this rank's rows of positions [start, stop)."""
        positions = rank_positions(start, stop, self._rank, self._world)
        return [int(number) for number in np.unique(rows_at(self._order, positions).shards)]

    def _check_room(self) -> None:
        """Refuse a limit below what a window needs; the largest are those in which all streams change their blocks."""
        block = self._order.num_streams * self._order.block_rows
        step = self._window_rows
        for border in range(0, min(self.num_rows, NUM_CHECKED_WINDOWS * block), block):
            start = max(0, border - step // 2)
            self._files.check_room(self._shards_between(start, start + step))

    def _record_wait(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _fixed(self, start: int, stop: int) -> tuple[Positions, Rows]:
        if not 0 <= start < stop <= self.num_rows:
            raise ValueError(f"rows [{start}, {stop}) are not within the split's {self.num_rows}")
        positions = np.arange(start, stop, dtype=np.int64)
        return positions, sequential_rows_at(self._order, positions)

    def _drawn(self, start: int, stop: int) -> LatentBatch:
        """Return this rank's rows of positions [start, stop), with what is drawn for each at its position."""
        positions = rank_positions(start, stop, self._rank, self._world)
        never = np.zeros(len(positions), bool)
        draws = _Draws(
            quantiles=self._uniform(Draw.CAPTION, positions),
            dropped=self._uniform(Draw.DROPOUT, positions) < self.config.caption_dropout,
            flipped=self._uniform(Draw.FLIP, positions) < 0.5 if self._has_flips else never,
        )
        return self._batch(positions, rows_at(self._order, positions), draws)

    def _uniform(self, draw: Draw, positions: Positions) -> Float64[np.ndarray, " b"]:
        drawn: Float64[np.ndarray, " b"] = uniform(self.config.seed, draw, positions).numpy()
        return drawn

    def _batch(self, positions: Positions, rows: Rows, draws: _Draws) -> LatentBatch:
        numbers = np.unique(rows.shards)
        self._use([int(number) for number in numbers])
        shape = self._shard(int(rows.shards[0])).shape
        moments = np.empty((len(positions), *shape), np.float16)
        keys = [""] * len(positions)
        states = [np.empty((0, 0), np.float16)] * len(positions)
        pooled: list[tuple[Places, PooledRows]] = []
        for number in numbers:
            shard = self._shard(int(number))
            here = np.flatnonzero(rows.shards == number)
            shard_rows = rows.rows[here]
            moments[here] = shard.moments(shard_rows, draws.flipped[here])
            captions = np.where(draws.dropped[here], 0, shard.text.chosen(shard_rows, draws.quantiles[here]))
            for place, row, caption in zip(here.tolist(), shard_rows.tolist(), captions.tolist(), strict=True):
                keys[place] = shard.keys[row]
                states[place] = shard.text.states(caption)
            if shard.text.pooled is not None:
                pooled.append((here, shard.text.pooled[captions]))
        return LatentBatch(
            keys=tuple(keys),
            samples=torch.from_numpy(positions),
            moments=torch.from_numpy(moments).float(),
            condition=_condition(states, pooled, self._max_tokens),
        )

    def _use(self, numbers: Sequence[int]) -> None:
        """Have shards here; under a limit let go of all others, since deleting an open file frees nothing."""
        if self._files.is_limited:
            with self._lock:
                for number in self._open.keys() - set(numbers):
                    del self._open[number]
        self._files.use(numbers)

    def _shard(self, number: int) -> LatentShard:
        """Return a shard's memory maps; the most recently used ones stay open."""
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                with self._files.paths(number) as paths:
                    shard = open_latent_shard(*paths)
            self._open[number] = shard
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return shard


class _Draws(NamedTuple):
    """What is drawn for each row of a batch.

    Attributes:
        quantiles: where in [0, 1) of its captions a row's choice lies.
        dropped: whether the caption is replaced by the empty one.
        flipped: whether the moments are those of the mirrored image.
    """

    quantiles: Float64[np.ndarray, " b"]
    dropped: Bool[np.ndarray, " b"]
    flipped: Bool[np.ndarray, " b"]


def _condition(
    states: Sequence[Float16[np.ndarray, "_ d"]], pooled: Sequence[tuple[Places, PooledRows]], max_tokens: int
) -> Condition:
    """Return the condition of rows with the given states; `pooled` holds each shard's rows and their places."""
    padded, mask = pad_states(states, max_tokens)
    if not pooled:
        return Condition(states=padded, mask=mask)
    num_pooled = sum(len(places) for places, _ in pooled)
    if num_pooled < len(states):
        raise ValueError(f"{num_pooled} of {len(states)} rows have pooled text: all shards must have it, or none")
    rows = np.empty((len(states), pooled[0][1].shape[1]), np.float16)
    for places, part in pooled:
        rows[places] = part
    return Condition(states=padded, mask=mask, pooled=torch.from_numpy(rows).float())
