"""CPU time of our dataset job by stage, measured in one process: each stage by itself, and the whole of them.

`total` is the job without Ray over the whole listing, all threads together; `other` is what of it no stage explains:
reading the listing, captions, ledger, JSON, index. Run it with OMP_NUM_THREADS=1, as Ray runs its workers: the threads
of a linear algebra library that wait for work would otherwise count.
"""

from __future__ import annotations

import hashlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.fetch import Fetcher
from pipeline.ingest.fingerprints import perceptual_hash, pixel_sha256
from pipeline.ingest.geometry import place
from pipeline.ingest.transforms import Measured, Picture, encode, measure, render
from pipeline.sources.tables import UrlTableConfig
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows, write_shard
from tests.benchmarks.photos import Photo
from tests.small_datasets import made

REPEATS = 3

T = TypeVar("T")


def profile(config: DatasetConfig, photos: Sequence[Photo]) -> dict[str, dict[str, float]]:
    """Return milliseconds of CPU an image for each size in megapixels, and for the mixture, by stage.

    Args:
        config: of a dataset that is not made yet, whose listing holds the photos equally often.
        photos: what is listed.
    """
    sizes = sorted({photo.megapixels for photo in photos})
    table = {f"{size:g} MP": _pixels([photo for photo in photos if photo.megapixels == size], config) for size in sizes}
    mixed = {stage: statistics.mean(spent[stage] for spent in table.values()) for stage in next(iter(table.values()))}
    start = time.process_time()
    num_rows = made(config).num_rows
    total = 1e3 * (time.process_time() - start) / num_rows
    mixed |= {"fetch": _fetch(config), "tar": _tar(config)}
    return table | {"mixed": mixed | {"other": total - sum(mixed.values()), "total": total}}


def _pixels(photos: Sequence[Photo], config: DatasetConfig) -> dict[str, float]:
    """Return what decode, resize, encode and digests of some pictures cost on the average."""
    spent = [_pixel_stages(photo.path.read_bytes(), config) for photo in photos for _ in range(REPEATS)]
    return {stage: statistics.mean(each[stage] for each in spent) for stage in spent[0]}


def _pixel_stages(content: bytes, config: DatasetConfig) -> dict[str, float]:
    picture, whole = _timed(lambda: _rendered(content, config))
    _, decode = _timed(lambda: _decoded(content, config))
    image = Image.fromarray(picture.pixels)
    _, encoding = _timed(lambda: encode(image, config.picture))
    _, hashing = _timed(lambda: _digests(content, picture))
    return {"decode": decode, "resize": whole - decode - encoding, "encode": encoding, "hash": hashing}


def _rendered(content: bytes, config: DatasetConfig) -> Picture:
    measured = measure(content, config.picture)
    assert isinstance(measured, Measured)
    picture = render(content, measured, config.picture)
    assert isinstance(picture, Picture)
    return picture


def _decoded(content: bytes, config: DatasetConfig) -> Image.Image:
    """Decode a JPEG at the smallest scale that suffices, as `render` does."""
    image = Image.open(io.BytesIO(content))
    width, height = image.size
    shrink = place(width, height, config.picture).shrink
    scale = next((scale for scale in (8, 4, 2) if scale <= shrink), 1)
    image.draft(None, (width // scale, height // scale))
    image.load()
    return image


def _digests(content: bytes, picture: Picture) -> None:
    hashlib.sha256(content).hexdigest()
    hashlib.sha256(picture.content).hexdigest()
    pixel_sha256(picture.pixels)
    perceptual_hash(picture.pixels)


def _fetch(config: DatasetConfig) -> float:
    """Return what fetching the listing costs when nothing else is done, in all threads."""
    assert isinstance(config.source, UrlTableConfig)
    source = config.source.build()
    names = source.shard_names(Split.TRAIN)
    num_rows = 0
    start = time.process_time()
    with Fetcher(config.fetch) as fetcher:
        for name in names:
            for _, content in fetcher.payloads(source.open_shard_at_row(name, 0)):
                assert isinstance(content, bytes)
                num_rows += 1
    return 1e3 * (time.process_time() - start) / num_rows


def _tar(config: DatasetConfig) -> float:
    """Return what writing one finished shard again costs, its digest and index included."""
    rows = list(read_rows(str(min(Path(config.root, Split.TRAIN.value).glob("*.tar")))))
    with tempfile.TemporaryDirectory() as folder:
        _, spent = _timed(lambda: write_shard(folder, Split.TRAIN, "000000", rows))
    return spent / len(rows)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what some work gives and its milliseconds of CPU in this thread."""
    start = time.thread_time()
    result = work()
    return result, 1e3 * (time.thread_time() - start)
