"""Batches of a latent cache: which rows come next is a pure function of (manifest, config, rank, world, samples seen).

Order: positions of the batch → its shape → rows (`pipeline.bucket_order`, `pipeline.order`) → one gather of moments for
each tar, from a memory map → caption, crop and mask choice, dropout and flip, each drawn at the row's own position →
`LatentBatch`, some batches ahead.

Letters: b batch, m moment channel, h latent row, w latent column, l token, d embedding width, p width of the pooled
text, r rows of one tar.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from itertools import count, groupby
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float64, Int32, Int64
from torch import Tensor

from ldm.conditioning.text_embedding import TextEmbedding, condition_of, pad_states
from ldm.config import Config
from ldm.randomness import Draw, uniform
from ldm.types import Condition, LatentBatch
from pipeline.batch_columns import ColumnDraws, Columns, gathered_columns, joined_columns
from pipeline.bucket_order import BucketOrder
from pipeline.latent_shard import PART_SUFFIXES, TEXT_SUFFIX, LatentShard, open_latent_shard
from pipeline.latent_summary import CachedPart, cached_parts
from pipeline.local_shards import open_local_shards
from pipeline.order import Order, Positions, Rows, check_world, rank_positions, rows_at, sequential_rows_at
from pipeline.prefetch import prefetched
from pipeline.store.manifest import Manifest, ShardRecord
from pipeline.store.schema import Split

MAX_OPEN_SHARDS = 1024
WINDOW_ROWS = 256
"""Rows of one rank gathered together and then cut into batches: the cost of touching a shard is shared by more rows."""

Places = Int64[np.ndarray, " r"]
PooledRows = Float16[np.ndarray, "r p"]
Embed = Callable[[Sequence[Int32[np.ndarray, "l towers"]]], list[TextEmbedding]]
"""Returns the embedding of each of some captions, given as token ids: `TextEncoder.encode_tokens`."""


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
    has_digest_check: bool = False
    """Whether every file's sha256 is compared at the start (sizes always are)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must lie in [0, 1], got {self.caption_dropout}")
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
        self, manifest: Manifest, config: LoaderConfig, rank: int = 0, world: int = 1, embed: Embed | None = None
    ) -> None:
        """Check files and world size; read nothing yet.

        Args:
            manifest: the cache's.
            config: what is read, and how.
            rank: this process among those that share each batch.
            world: how many those are.
            embed: the text encoder, for a cache that holds token ids only.

        Raises:
            ValueError: if a file is missing or not whole, `world` does not divide the streams and the batch, the cache
                holds no such image size, or it holds token ids and there is no text encoder.
        """
        check_world(world=world, num_streams=config.num_streams, batch_size=config.batch_size)
        if manifest.identity.get("text_storage") and embed is None:
            raise ValueError(f"{config.root} holds token ids, not embeddings: its loader needs the text encoder")
        self.config = config
        self.wait_seconds = 0.0
        self._rank, self._world = rank, world
        self._embed = embed
        self._max_tokens = int(manifest.identity["max_tokens"])
        self._parts = cached_parts(manifest, config.split, config.image_size)
        names = {part.name for part in self._parts}
        self._files = open_local_shards(
            manifest,
            config.root,
            config.split,
            lambda shard: _suffixes_of(shard, names),
            cache_folder=config.cache_folder,
            has_digest_check=config.has_digest_check,
        )
        self._buckets = [list(alike) for _, alike in groupby(self._parts, key=lambda part: part.size)]
        self._first_parts = np.cumsum([0, *[len(parts) for parts in self._buckets]])
        self._order = self._order_of([[part.num_rows for part in parts] for parts in self._buckets])
        self._in_sequence = Order(shard_sizes=tuple(part.num_rows for part in self._parts), seed=config.seed)
        self._open: OrderedDict[int, LatentShard] = OrderedDict()
        self._lock = Lock()

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
        num_together = max(1, WINDOW_ROWS * self._world // self.config.batch_size)
        windows = count(samples_seen, num_together * self.config.batch_size)
        depth = -(-self.config.prefetch_batches // num_together)
        return self._made_ahead(windows, num_together, depth)

    def rows(self, start: int, stop: int) -> LatentBatch:
        """Return rows [start, stop) of the split, shape after shape in the manifest's order, with their first captions.

        Raises:
            ValueError: if there are no such rows, or they have several shapes; `spans` tells which have one.
        """
        positions, rows = self._fixed(start, stop)
        never = np.zeros(len(positions), bool)
        nought = np.zeros(len(positions))
        gathered = self._gathered(positions, rows, _Draws(nought, never, never, nought, nought))
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
        first = []
        for part, row in zip(rows.shards.tolist(), rows.rows.tolist(), strict=True):
            shard = self._shard(part)
            table = shard.text
            first.append(table.text(int(table.choices[table.choice_offsets[shard.columns.text_rows[row]]])))
        return first

    def null_condition(self, batch_size: int) -> Condition:
        """Return the condition of the empty caption, `batch_size` times."""
        table = self._shard(0).text
        null = table.embedding(0) if self._embed is None else self._embed([table.ids(0)])[0]
        return condition_of([null] * batch_size, self._max_tokens)

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

    def _made_ahead(self, windows: Iterator[int], num_together: int, depth: int) -> Iterator[LatentBatch]:
        with closing(
            prefetched(lambda start: self._window(start, num_together), windows, depth, self._record_wait)
        ) as made:
            for window in made:
                yield from window

    def _record_wait(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _fixed(self, start: int, stop: int) -> tuple[Positions, Rows]:
        if not 0 <= start < stop <= self.num_rows:
            raise ValueError(f"rows [{start}, {stop}) are not within the split's {self.num_rows}")
        positions = np.arange(start, stop, dtype=np.int64)
        return positions, sequential_rows_at(self._in_sequence, positions)

    def _window(self, start: int, num_batches: int) -> list[LatentBatch]:
        """Return this rank's share of some global batches from `start` on; those of one shape gathered at once."""
        size, share = self.config.batch_size, self.config.batch_size // self._world
        starts = range(start, start + num_batches * size, size)
        places = [self._order.place_of(first) for first in starts]
        batches: dict[int, LatentBatch] = {}
        for bucket in sorted({place.bucket for place in places}):
            here = [number for number, place in enumerate(places) if place.bucket == bucket]
            own = [
                rank_positions(places[number].first, places[number].first + size, self._rank, self._world)
                for number in here
            ]
            shifts = [starts[number] - places[number].first for number in here]
            positions = np.concatenate([part + shift for part, shift in zip(own, shifts, strict=True)])
            rows = rows_at(self._order.buckets[bucket], np.concatenate(own))
            rows = Rows(rows.shards + self._first_parts[bucket], rows.rows)
            together = self._gathered(positions, rows, self._draws(positions))
            for place, number in enumerate(here):
                batches[number] = self._batch(together, place * share, (place + 1) * share)
        return [batches[number] for number in range(num_batches)]

    def _draws(self, positions: Positions) -> _Draws:
        """Return what is drawn for each of some positions."""
        shard = self._shard(0)
        never, nought = np.zeros(len(positions), bool), np.zeros(len(positions))
        return _Draws(
            quantiles=self._uniform(Draw.CAPTION, positions),
            dropped=self._uniform(Draw.DROPOUT, positions) < self.config.caption_dropout,
            flipped=self._uniform(Draw.FLIP, positions) < 0.5 if shard.has_flips else never,
            crops=self._uniform(Draw.CROP, positions) if shard.columns.num_crops > 1 else nought,
            masks=self._uniform(Draw.MASK, positions) if shard.num_masks > 1 else nought,
        )

    def _uniform(self, draw: Draw, positions: Positions) -> Float64[np.ndarray, " b"]:
        drawn: Float64[np.ndarray, " b"] = uniform(self.config.seed, draw, positions).numpy()
        return drawn

    def _gathered(self, positions: Positions, rows: Rows, draws: _Draws) -> _Gathered:
        """Return rows of one shape; the shards of `rows` are numbers of tars."""
        numbers = np.unique(rows.shards)
        self._fetch(numbers.tolist())
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
            of_caption = shard.text.states if self._embed is None else shard.text.ids
            for place, row, caption in zip(here.tolist(), shard_rows.tolist(), captions.tolist(), strict=True):
                keys[place] = shard.keys[row]
                texts[place] = of_caption(caption)
            if shard.text.pooled is not None:
                pooled.append((here, shard.text.pooled[captions]))
            columns.append((here, gathered_columns(shard, shard_rows, own, self.config.max_boxes)))
        is_embedded = self._embed is None
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
            assert self._embed is not None
            ids = {row.tobytes(): row for row in rows.ids[start:stop]}
            of_ids = dict(zip(ids, self._embed(list(ids.values())), strict=True))
            condition = condition_of([of_ids[row.tobytes()] for row in rows.ids[start:stop]], self._max_tokens)
        return LatentBatch(
            keys=rows.keys[start:stop],
            samples=rows.samples[start:stop],
            moments=rows.moments[start:stop],
            condition=condition,
            columns={name: column[start:stop] for name, column in rows.columns.items()},
        )

    def _fetch(self, numbers: Sequence[int]) -> None:
        """Have the files of several tars here, those of a remote root copied at once."""
        missing = [number for number in numbers if number not in self._open]
        self._files.fetch([name for number in missing for name in _files_of(self._parts[number])])

    def _shard(self, number: int) -> LatentShard:
        """Return a tar's memory maps; the most recently used ones stay open."""
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                shard = open_latent_shard(*(self._files.path(*name) for name in _files_of(self._parts[number])))
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
        crops: where in [0, 1) of its crops a row's choice lies.
        masks: where in [0, 1) of its masks a row's choice lies.
    """

    quantiles: Float64[np.ndarray, " b"]
    dropped: Bool[np.ndarray, " b"]
    flipped: Bool[np.ndarray, " b"]
    crops: Float64[np.ndarray, " b"]
    masks: Float64[np.ndarray, " b"]

    def of(self, places: Places, shard: LatentShard) -> ColumnDraws:
        """Return the choices of rows of one tar."""
        return ColumnDraws(
            flipped=self.flipped[places],
            crops=(self.crops[places] * shard.columns.num_crops).astype(np.int64),
            masks=(self.masks[places] * shard.num_masks).astype(np.int64),
        )


class _Gathered(NamedTuple):
    """Rows of one shape: those of several batches; either their condition or the token ids that it is made of."""

    keys: tuple[str, ...]
    samples: Tensor
    moments: Tensor
    condition: Condition | None
    ids: list[Any]
    columns: dict[str, Tensor]


def _suffixes_of(shard: ShardRecord, part_names: Set[str]) -> list[str]:
    """Return the files of a shard that hold any of the parts."""
    there = [part["name"] for part in shard.details["parts"] if part["name"] in part_names]
    return [f"{name}.{suffix}".lstrip(".") for name in there for suffix in PART_SUFFIXES] + [TEXT_SUFFIX]


def _files_of(part: CachedPart) -> list[tuple[int, str]]:
    """Return the shard and the suffix of each file that a part is opened from."""
    own = [(part.shard, f"{part.name}.{suffix}".lstrip(".")) for suffix in PART_SUFFIXES]
    return [*own, (part.shard, TEXT_SUFFIX)]


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
