"""Batches of images of a dataset, in the same order as latents would come: the rows that train an autoencoder.

Order: positions of the batch → rows (`pipeline.order`) → encoded bytes from a memory map → decoded pixels, kept in
memory while they fit → a square of them, centred or drawn → mirrored where drawn → [-1, 1].

Letters: b batch, y pixel row, x pixel column.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image as PillowImage

from ldm.config import Config, added_later
from ldm.randomness import Draw, generator, uniform
from ldm.types import Image, SampleIndex
from pipeline.local_shards import groups_of, max_open, open_local_shards
from pipeline.order import Order, Positions, Rows, check_world, rank_positions, rows_at, sequential_rows_at
from pipeline.prefetch import prefetched
from pipeline.store.manifest import Manifest
from pipeline.store.schema import Split
from pipeline.store.shards import ShardIndex, read_index

IMAGE_SUFFIXES = ("png", "jpg", "webp")

Pixels = UInt8[np.ndarray, "y x 3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCropConfig(Config):
    """Which square of a picture is a row: the centre, or in training one drawn anywhere and of any side within limits.

    Drawn squares are shrunk to `image_size`, so that a network sees the same things large and small.
    """

    image_size: int = 0
    """Side of the rows in pixels, at most the dataset's; 0 for the dataset's."""
    min_side: int = 0
    """Least side of drawn squares, in pixels of the dataset's pictures; 0 for centred squares, none drawn."""
    max_side: int = 0
    """Greatest side of drawn squares; 0 for the picture's shorter side. Sides are drawn evenly by their logarithm."""

    def __post_init__(self) -> None:
        """Refuse squares that would be enlarged, and limits that hold nothing."""
        if min(self.image_size, self.min_side, self.max_side) < 0:
            raise ValueError(f"sides can't be negative, got {self}")
        if self.min_side and not 0 < self.image_size <= self.min_side:
            raise ValueError(f"squares of min_side {self.min_side} can't be shrunk to image_size {self.image_size}")
        if self.max_side and not 0 < self.min_side <= self.max_side:
            raise ValueError(f"max_side {self.max_side} needs a min_side from 1 to it, got {self.min_side}")

    def size_of(self, dataset_size: int) -> int:
        """Return the side of the rows of a dataset.

        Raises:
            ValueError: if its pictures are too small.
        """
        if max(self.image_size, self.min_side) > dataset_size:
            wanted = f"image_size {self.image_size} and min_side {self.min_side}"
            raise ValueError(f"pictures of {dataset_size} px are too small for {wanted}")
        return self.image_size or dataset_size

    def centred(self, pixels: Pixels, dataset_size: int) -> Pixels:
        """Return the centre square of the dataset's side, or of the picture's shorter one, shrunk to `image_size`.

        Raises:
            ValueError: if the picture is smaller than `image_size`.
        """
        height, width = pixels.shape[:2]
        side = min(height, width, dataset_size)
        self._refuse_smaller(side, self.image_size)
        return _shrunk(pixels, (height - side) // 2, (width - side) // 2, side, self.image_size or side)

    def drawn(self, pixels: Pixels, dataset_size: int, seed: int, position: int) -> Pixels:
        """Return the square that is drawn for a position of the training sequence, shrunk.

        Raises:
            ValueError: if the picture is smaller than `min_side`.
        """
        height, width = pixels.shape[:2]
        self._refuse_smaller(min(height, width), self.min_side)
        draws = generator(seed, Draw.CROP, position)
        largest = min(self.max_side or height, height, width)
        side = round(math.exp(draws.uniform(math.log(self.min_side), math.log(largest))))
        top, left = draws.integers(height - side, endpoint=True), draws.integers(width - side, endpoint=True)
        return _shrunk(pixels, int(top), int(left), side, self.size_of(dataset_size))

    def _refuse_smaller(self, side: int, wanted: int) -> None:
        if side < wanted:
            raise ValueError(f"a picture of {side} px is too small for squares of {wanted} px")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLoaderConfig(Config):
    """Which images are read, and in which order."""

    root: str
    """Folder of the dataset, local or remote."""
    split: Split = Split.TRAIN
    """Part of the dataset."""
    batch_size: int = 16
    """Rows of a global batch, over all ranks; a multiple of the number of ranks."""
    num_streams: int = 8
    """Canonical streams of the order; the number of ranks must divide it."""
    block_rows: int = 8192
    """Rows shuffled together inside a stream."""
    has_flips: bool = True
    """Whether half of the training rows are mirrored."""
    seed: int = 0
    """Seed of the order and of the flips."""
    prefetch_batches: int = 4
    """Batches made ahead of the consumer."""
    max_cached_bytes: int = 1 << 30
    """Decoded images kept in memory, in bytes; rows beyond are decoded each time."""
    cache_folder: str = ""
    """Local folder for copies of a remote root's shards; a local root needs none."""
    crop: ImageCropConfig = added_later(ImageCropConfig())
    """Which square of a picture is a row."""

    def __post_init__(self) -> None:
        if self.prefetch_batches < 1 or self.batch_size < 1 or self.max_cached_bytes < 0:
            raise ValueError(
                "prefetch_batches and batch_size must be at least 1 and max_cached_bytes at least 0, "
                f"got {self.prefetch_batches}, {self.batch_size} and {self.max_cached_bytes}"
            )


class ImageBatch(NamedTuple):
    """Rows of a dataset, in the order of training.

    Attributes:
        keys: the rows' keys, length b.
        samples: the rows' positions in the endless training sequence.
        images: pixels in [-1, 1], float32, shape (b, 3, y, x).
    """

    keys: tuple[str, ...]
    samples: SampleIndex
    images: Image


class _OpenShard(NamedTuple):
    content: UInt8[np.ndarray, " bytes"]
    places: ShardIndex
    column: int


class ImageLoader:
    """Reads image batches of one split for one rank; `wait_seconds` is how long consumers waited for them so far."""

    def __init__(self, manifest: Manifest, config: ImageLoaderConfig, rank: int = 0, world: int = 1) -> None:
        """Check files and world size; read nothing yet.

        Raises:
            ValueError: if a file is missing or not whole, `world` does not divide the streams and the batch, or
                pictures are smaller than the squares asked for.
        """
        config.crop.size_of(manifest.image_size)
        check_world(world=world, num_streams=config.num_streams, batch_size=config.batch_size)
        self.config = config
        self.wait_seconds = 0.0
        self._rank, self._world = rank, world
        self._files = open_local_shards(
            config.root,
            config.split,
            groups_of(manifest, config.split, ("tar", "index")),
            cache_folder=config.cache_folder,
        )
        self._order = Order(
            shard_sizes=self._files.sizes,
            seed=config.seed,
            num_streams=config.num_streams,
            block_rows=config.block_rows,
        )
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._decoded: dict[tuple[int, int], Pixels] = {}
        self._decoded_bytes = 0
        self._lock = Lock()
        self._max_open = max_open(1)
        self._side = manifest.image_size

    @property
    def num_rows(self) -> int:
        """Rows of the split: one epoch over all ranks."""
        return self._order.num_rows

    def batches(self, samples_seen: int = 0) -> Iterator[ImageBatch]:
        """Yield this rank's share of each global batch, endlessly, from `samples_seen` on, made ahead on a thread."""
        starts = count(samples_seen, self.config.batch_size)
        return prefetched(self._drawn_batch, starts, self.config.prefetch_batches, self._record_wait)

    def rows(self, start: int, stop: int) -> ImageBatch:
        """Return rows [start, stop) of the split in the manifest's order, none mirrored."""
        if not 0 <= start < stop <= self.num_rows:
            raise ValueError(f"rows [{start}, {stop}) are not within the split's {self.num_rows}")
        positions = np.arange(start, stop, dtype=np.int64)
        rows = sequential_rows_at(self._order, positions)
        return self._batch(positions, rows, np.zeros(len(positions), bool), self._centred)

    def _record_wait(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _drawn_batch(self, start: int) -> ImageBatch:
        positions = rank_positions(start, start + self.config.batch_size, self._rank, self._world)
        flipped = (uniform(self.config.seed, Draw.FLIP, positions).numpy() < 0.5) & self.config.has_flips
        square = self._drawn if self.config.crop.min_side else self._centred
        return self._batch(positions, rows_at(self._order, positions), flipped, square)

    def _centred(self, pixels: Pixels, _: int) -> Pixels:
        return self.config.crop.centred(pixels, self._side)

    def _drawn(self, pixels: Pixels, position: int) -> Pixels:
        return self.config.crop.drawn(pixels, self._side, self.config.seed, position)

    def _batch(
        self,
        positions: Positions,
        rows: Rows,
        flipped: Bool[np.ndarray, " b"],
        square: Callable[[Pixels, int], Pixels],
    ) -> ImageBatch:
        places = list(zip(rows.shards.tolist(), rows.rows.tolist(), strict=True))
        pixels = [
            square(self._pixels(*place), position) for place, position in zip(places, positions.tolist(), strict=True)
        ]
        mirrored = [row[:, ::-1] if flip else row for row, flip in zip(pixels, flipped, strict=True)]
        keys = tuple(self._shard(shard).places.keys[row] for shard, row in places)
        return ImageBatch(keys, torch.from_numpy(positions), image_of_pixels(mirrored))

    def _pixels(self, shard: int, row: int) -> Pixels:
        kept = self._decoded.get((shard, row))
        if kept is not None:
            return kept
        content, places, column = self._shard(shard)
        start = int(places.offsets[row, column])
        pixels = decode_pixels(content[start : start + int(places.sizes[row, column])].tobytes())
        if not self.config.crop.min_side:  # what lies beside the square is never looked at, and takes no memory
            pixels = np.ascontiguousarray(self.config.crop.centred(pixels, self._side))
        with self._lock:
            if (
                self._decoded_bytes + pixels.nbytes <= self.config.max_cached_bytes
                and (shard, row) not in self._decoded
            ):
                self._decoded[shard, row] = pixels
                self._decoded_bytes += pixels.nbytes
        return pixels

    def _shard(self, number: int) -> _OpenShard:
        """Return a shard's memory map and index; the most recently used ones stay open."""
        with self._lock:
            shard = self._open.pop(number, None) or self._opened(number)
            self._open[number] = shard
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return shard

    def _opened(self, number: int) -> _OpenShard:
        with self._files.paths(number) as (tar, index):
            places = read_index(str(index))
            content = np.asarray(np.memmap(tar, np.uint8, mode="r"))
        return _OpenShard(content, places, places.column(image_suffix(places.suffixes)))


def image_suffix(suffixes: Sequence[str]) -> str:
    """Return which member of a row is its image.

    Raises:
        ValueError: if none is.
    """
    found = [suffix for suffix in IMAGE_SUFFIXES if suffix in suffixes]
    if not found:
        raise ValueError(f"rows need an image member ({', '.join(IMAGE_SUFFIXES)}), they have {', '.join(suffixes)}")
    return found[0]


def decode_pixels(content: bytes) -> Pixels:
    """Return the RGB pixels of an encoded image."""
    with PillowImage.open(BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _shrunk(pixels: Pixels, top: int, left: int, side: int, size: int) -> Pixels:
    """Return the square at (top, left) as `size` rows of pixels, antialiased; as it is where it has them."""
    if side == size:
        return pixels[top : top + side, left : left + side]
    box = (left, top, left + side, top + side)
    image = PillowImage.fromarray(pixels).resize((size, size), PillowImage.Resampling.LANCZOS, box=box)
    return np.asarray(image)


def image_of_pixels(pixels: Sequence[Pixels]) -> Image:
    """Return pixels 0 to 255 as a batch in [-1, 1].

    Raises:
        ValueError: if they have several shapes.
    """
    shapes = {row.shape for row in pixels}
    if len(shapes) != 1:
        raise ValueError(f"images of one batch have one size, got {sorted(shapes)}")
    channels_first = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    image: Image = channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
    return image
