"""Batches of a latent cache: which rows come next is a pure function of (manifest, config, rank, world, samples seen).

Order: positions of the batch → its shape → rows (`pipeline.bucket_order`, `pipeline.order`) → one gather of moments for
each tar, from a memory map → caption, crop and mask choice, dropout and flip, each drawn at the row's own position →
`LatentBatch`, some batches ahead.

Letters: b batch, m moment channel, h latent row, w latent column, l token, d embedding width, p width of the pooled
text, r rows of one tar.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, groupby
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float16, Float64, Int32, Int64
from torch import Tensor

from ldm.conditioning.text_embedding import condition_of, pad_states
from ldm.config import Config
from ldm.randomness import Draw, uniform
from ldm.types import Condition, LatentBatch
from pipeline.batch_columns import Columns, RowDraws, gathered_columns, joined_columns
from pipeline.bucket_order import BucketOrder, rank_rows
from pipeline.latent_shard import LatentShard, open_latent_shard
from pipeline.latent_summary import cached_parts, file_groups
from pipeline.local_shards import max_open, open_local_shards
from pipeline.order import Order, Positions, Rows, check_world, sequential_rows_at
from pipeline.prefetch import prefetched
from pipeline.store.manifest import Manifest
from pipeline.store.schema import Split

FILES_OF_SHARD = 3
"""Memory maps of an open tar: itself, its columns, its text."""
AHEAD_WINDOWS = 16
"""How many windows before it is needed the copy of a shard begins."""
NUM_CHECKED_WINDOWS = 64
"""Windows whose shards are compared with the limit of the copies at the start."""
WINDOW_ROWS = 256
"""Rows of one rank gathered together and then cut into batches: the cost of touching a shard is shared by more rows."""

Places = Int64[np.ndarray, " r"]
PooledRows = Float16[np.ndarray, "r p"]
ReadTokens = Callable[[Sequence[Int32[np.ndarray, "l towers"]]], Condition]
"""Returns the condition of some captions that a cache holds as token ids; `token_reader` gives one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig(Config):
    """Which latents are read, in which order, and what is drawn for a row when it is loaded."""

    root: str
    """Folder of the latents, local or remote."""
    split: Split = Split.TRAIN
    """Part of the latents."""
    image_size: int = 0
    """Which of the image sizes that the cache was made at; 0 for the only one."""
    batch_size: int = 64
    """Rows of a global batch, over all ranks; a multiple of the number of ranks."""
    num_streams: int = 8
    """Canonical streams of the order; the number of ranks must divide it."""
    block_rows: int = 8192
    """Rows shuffled together inside a stream."""
    caption_dropout: float = 0.1
    """Share of rows whose caption is replaced by the empty one, for classifier-free guidance."""
    max_boxes: int = 32
    """Boxes of a layout that a batch holds, the first ones; fewer are filled up with class -1."""
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
        for name in ("prefetch_batches", "batch_size", "max_boxes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """All that a loader needs to go on: how many samples of the endless sequence were seen."""

    samples_seen: int


class LatentLoader:
    """Reads batches of one split for one rank; `wait_seconds` is how long consumers waited for them so far."""

    def __init__(
        self,
        manifest: Manifest,
        config: LoaderConfig,
        rank: int = 0,
        world: int = 1,
        read_tokens: ReadTokens | None = None,
    ) -> None:
        """Check files and world size; read nothing yet.

        Args:
            manifest: the cache's.
            config: what is read, and how.
            rank: this process among those that share each batch.
            world: how many those are.
            read_tokens: what becomes of captions, for a cache that holds token ids only.

        Raises:
            ValueError: if a file is missing or not whole, `world` does not divide the streams and the batch, the cache
                holds no such image size, or it holds token ids and there is no text encoder.
        """
        check_world(world=world, num_streams=config.num_streams, batch_size=config.batch_size)
        if manifest.identity.get("text_storage") and read_tokens is None:
            raise ValueError(f"{config.root} holds token ids, not embeddings: its loader needs a reader of tokens")
        self.config = config
        self.wait_seconds = 0.0
        self._rank, self._world = rank, world
        self._read_tokens = read_tokens
        self._max_tokens = int(manifest.identity["max_tokens"])
        self._parts = cached_parts(manifest, config.split, config.image_size)
        self._has_flips = bool(manifest.identity["flip"])
        self._num_crops = int(manifest.identity["preprocessing"]["crop"]["count"])
        self._num_masks = int(manifest.identity.get("columns", {}).get("num_masks", 0))
        self._files = open_local_shards(
            config.root,
            config.split,
            file_groups(manifest, config.split, self._parts),
            cache_folder=config.cache_folder,
            cache_bytes=config.cache_bytes,
            has_digest_check=config.has_digest_check,
        )
        self._buckets = [list(alike) for _, alike in groupby(self._parts, key=lambda part: part.size)]
        self._order = self._order_of([[part.num_rows for part in parts] for parts in self._buckets])
        self._in_sequence = Order(shard_sizes=tuple(part.num_rows for part in self._parts), seed=config.seed)
        self._open: OrderedDict[int, LatentShard] = OrderedDict()
        self._lock = Lock()
        self._max_open = max_open(FILES_OF_SHARD)
        if self._files.is_limited:
            self._check_room()

    @property
    def num_rows(self) -> int:
        """Rows of the split: one epoch over all ranks."""
        return self._order.num_rows

    def batches(self, samples_seen: int = 0) -> Iterator[LatentBatch]:
        """Yield this rank's share of each global batch, endlessly, from `samples_seen` on, made ahead on a thread.

        Raises:
            ValueError: if the cache holds several shapes and `samples_seen` is amid a batch.
        """
        self._order.check_start(samples_seen)
        return self._made_ahead(samples_seen)

    def rows(self, start: int, stop: int) -> LatentBatch:
        """Return rows [start, stop) of the split, shape after shape: first captions, middle crops.

        Raises:
            ValueError: if there are no such rows, or they have several shapes; `spans` tells which have one.
        """
        positions, rows = self._fixed(start, stop)
        never = np.zeros(len(positions), bool)
        nought = np.zeros(len(positions))
        gathered = self._gathered(positions, rows, RowDraws(nought, never, never, nought + 0.5, nought))
        return self._batch(gathered, 0, len(positions))

    def spans(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
        """Yield rows [start, stop) in spans of at most `step` rows, all of one shape each."""
        ends = np.cumsum([sum(part.num_rows for part in parts) for parts in self._buckets])
        while start < stop:
            end = min(start + step, stop, int(ends[np.searchsorted(ends, start, side="right")]))
            yield start, end
            start = end

    def captions(self, start: int, stop: int) -> list[str]:
        """Return the first caption of rows [start, stop) of the split, in the order of `rows`."""
        _, rows = self._fixed(start, stop)
        self._use(sorted(set(rows.shards.tolist())))
        first = []
        for part, row in zip(rows.shards.tolist(), rows.rows.tolist(), strict=True):
            shard = self._shard(part)
            table = shard.text
            first.append(table.text(int(table.choices[table.choice_offsets[shard.columns.text_rows[row]]])))
        return first

    def null_condition(self, batch_size: int) -> Condition:
        """Return the condition of the empty caption, `batch_size` times."""
        with self._lock:
            number = next(iter(self._open), 0)  # all tars have the same one, and of some there may be no copy
        table = self._shard(number).text
        if self._read_tokens is not None:
            return self._read_tokens([table.ids(0)] * batch_size)
        return condition_of([table.embedding(0)] * batch_size, self._max_tokens)

    def _order_of(self, sizes: Sequence[Sequence[int]]) -> BucketOrder:
        config = self.config
        rows = [
            Order(
                shard_sizes=tuple(bucket),
                seed=config.seed,
                num_streams=config.num_streams,
                block_rows=config.block_rows,
            )
            for bucket in sizes
        ]
        return BucketOrder(buckets=tuple(rows), batch_size=config.batch_size, seed=config.seed)

    @property
    def _batches_together(self) -> int:
        """Global batches that are gathered together."""
        return max(1, WINDOW_ROWS * self._world // self.config.batch_size)

    def _made_ahead(self, samples_seen: int) -> Iterator[LatentBatch]:
        together = self._batches_together
        step = together * self.config.batch_size
        depth = -(-self.config.prefetch_batches // together)
        with self._files.fetching_ahead(self._shards_between) as fetch_ahead:

            def drawn(start: int) -> list[LatentBatch]:
                ahead = start + AHEAD_WINDOWS * step
                fetch_ahead(ahead, ahead + step)
                return self._window(start, together)

            with closing(prefetched(drawn, count(samples_seen, step), depth, self._record_wait)) as made:
                for window in made:
                    yield from window

    def _shards_between(self, start: int, stop: int) -> list[int]:
        """Return the tars of this rank's rows of the batches between two positions."""
        num_batches = (stop - start) // self.config.batch_size
        parts = rank_rows(self._order, start, num_batches, self._rank, self._world)
        return sorted({int(number) for part in parts for number in np.unique(part.rows.shards)})

    def _check_room(self) -> None:
        """Refuse a limit below what a window needs; the largest are those in which all streams change their blocks."""
        block = self.config.num_streams * self.config.block_rows
        step = self._batches_together * self.config.batch_size
        for border in range(0, min(self.num_rows, NUM_CHECKED_WINDOWS * block), block):
            start = max(0, border - step // 2) // self.config.batch_size * self.config.batch_size
            self._files.check_room(self._shards_between(start, start + step))

    def _record_wait(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _fixed(self, start: int, stop: int) -> tuple[Positions, Rows]:
        if not 0 <= start < stop <= self.num_rows:
            raise ValueError(f"rows [{start}, {stop}) are not within the split's {self.num_rows}")
        positions = np.arange(start, stop, dtype=np.int64)
        return positions, sequential_rows_at(self._in_sequence, positions)

    def _window(self, start: int, num_batches: int) -> list[LatentBatch]:
        """Return this rank's share of some global batches from `start` on; those of one shape gathered at once."""
        share = self.config.batch_size // self._world
        batches: dict[int, LatentBatch] = {}
        for part in rank_rows(self._order, start, num_batches, self._rank, self._world):
            together = self._gathered(part.positions, part.rows, self._draws(part.positions))
            for place, number in enumerate(part.batches):
                batches[number] = self._batch(together, place * share, (place + 1) * share)
        return [batches[number] for number in range(num_batches)]

    def _draws(self, positions: Positions) -> RowDraws:
        """Return what is drawn for each of some positions."""
        never, nought = np.zeros(len(positions), bool), np.zeros(len(positions))
        return RowDraws(
            quantiles=self._uniform(Draw.CAPTION, positions),
            dropped=self._uniform(Draw.DROPOUT, positions) < self.config.caption_dropout,
            flipped=self._uniform(Draw.FLIP, positions) < 0.5 if self._has_flips else never,
            crops=self._uniform(Draw.CROP, positions) if self._num_crops > 1 else nought,
            masks=self._uniform(Draw.MASK, positions) if self._num_masks > 1 else nought,
        )

    def _uniform(self, draw: Draw, positions: Positions) -> Float64[np.ndarray, " b"]:
        drawn: Float64[np.ndarray, " b"] = uniform(self.config.seed, draw, positions).numpy()
        return drawn

    def _gathered(self, positions: Positions, rows: Rows, draws: RowDraws) -> _Gathered:
        """Return rows of one shape; the shards of `rows` are numbers of tars."""
        numbers = np.unique(rows.shards)
        self._use(numbers.tolist())
        shape = self._shard(int(numbers[0])).moments.shape
        moments = np.empty((len(positions), *shape), np.float16)
        keys = [""] * len(positions)
        texts = [np.empty((0, 0), np.float16)] * len(positions)
        pooled: list[tuple[Places, PooledRows]] = []
        columns: list[tuple[Places, Columns]] = []
        for number in numbers:
            shard = self._shard(int(number))
            if shard.moments.shape != shape:
                raise ValueError(f"rows of one batch have one shape, got {shape} and {shard.moments.shape}")
            here = np.flatnonzero(rows.shards == number)
            shard_rows, own = rows.rows[here], draws.of(here, shard)
            moments[here] = shard.moments.pick(shard_rows, shard.moment_forms(own.crops, own.flipped))
            text_rows = shard.columns.text_rows[shard_rows].astype(np.int64)
            captions = np.where(draws.dropped[here], 0, shard.text.chosen(text_rows, draws.quantiles[here]))
            of_caption = shard.text.states if self._read_tokens is None else shard.text.ids
            for place, row, caption in zip(here.tolist(), shard_rows.tolist(), captions.tolist(), strict=True):
                keys[place] = shard.keys[row]
                texts[place] = of_caption(caption)
            if shard.text.pooled is not None:
                pooled.append((here, shard.text.pooled[captions]))
            columns.append((here, gathered_columns(shard, shard_rows, own, self.config.max_boxes)))
        is_embedded = self._read_tokens is None
        return _Gathered(
            keys=tuple(keys),
            samples=torch.from_numpy(positions),
            moments=torch.from_numpy(moments).float(),
            condition=_condition(texts, pooled, self._max_tokens) if is_embedded else None,
            ids=[] if is_embedded else texts,
            columns=joined_columns(columns, len(positions)),
        )

    def _batch(self, rows: _Gathered, start: int, stop: int) -> LatentBatch:
        """Return some of the rows. Captions are embedded here: what shares a forward is then always the same."""
        if rows.condition is not None:
            condition = rows.condition.rows(start, stop)
        else:
            assert self._read_tokens is not None
            condition = self._read_tokens(rows.ids[start:stop])
        return LatentBatch(
            keys=rows.keys[start:stop],
            samples=rows.samples[start:stop],
            moments=rows.moments[start:stop],
            condition=condition,
            columns={name: column[start:stop] for name, column in rows.columns.items()},
        )

    def _use(self, numbers: Sequence[int]) -> None:
        """Have tars here; under a limit let go of all others, since deleting an open file frees nothing."""
        if self._files.is_limited:
            with self._lock:
                for number in self._open.keys() - set(numbers):
                    del self._open[number]
        self._files.use(numbers)

    def _shard(self, number: int) -> LatentShard:
        """Return a tar's memory maps; the most recently used ones stay open."""
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                with self._files.paths(number) as paths:
                    shard = open_latent_shard(*paths)
            self._open[number] = shard
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return shard


class _Gathered(NamedTuple):
    """Rows of one shape: those of several batches; either their condition or the token ids that it is made of."""

    keys: tuple[str, ...]
    samples: Tensor
    moments: Tensor
    condition: Condition | None
    ids: list[Any]
    columns: dict[str, Tensor]


def _condition(
    states: Sequence[Float16[np.ndarray, "_ d"]], pooled: Sequence[tuple[Places, PooledRows]], max_tokens: int
) -> Condition:
    """Return the condition of rows with the given states; `pooled` holds each tar's rows and their places."""
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
