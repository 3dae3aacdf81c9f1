"""The totals of a latent cache: what its manifest says beyond its shards, and how it is read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.autoencoder.regularizer import LatentKind
from ldm.latents import LatentSpace
from pipeline.latent_shard import PART_SUFFIXES, TEXT_SUFFIX, part_file
from pipeline.local_shards import FileGroup
from pipeline.moment_statistics import MomentStatistics, merged
from pipeline.store.manifest import Manifest, ShardRecord
from pipeline.store.schema import JSON, Split


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedPart:
    """A tar of a cache: rows of one shard that have one shape.

    Attributes:
        shard: number of its shard in the split.
        name: what tells the tar from others of the shard; empty where there is only one.
        image_size: the size that was asked for.
        size: width and height of its crops in pixels.
        num_rows: rows in it.
    """

    shard: int
    name: str
    image_size: int
    size: tuple[int, int]
    num_rows: int


def summarize(records: Sequence[ShardRecord], *, dataset_digest: str) -> dict[str, JSON]:
    """Return the manifest's summary: what the latents were made of, and the statistics of all of them together."""
    ordered = sorted(records, key=lambda record: (record.split, record.name))
    parts = [(record, part) for record in ordered for part in record.details["parts"]]
    statistics = merged([MomentStatistics.from_dict(part["statistics"]) for _, part in parts])
    figures = [figure for record in ordered for figure in record.details["gate"]["psnr"]]
    return {
        "dataset": dataset_digest,
        "mean": statistics.mean.tolist(),
        "std": statistics.std.tolist(),
        "min": statistics.lowest.tolist(),
        "max": statistics.highest.tolist(),
        "num_values_per_channel": statistics.count,
        "num_rows": {split.value: sum(r.num_rows for r in ordered if r.split is split) for split in Split},
        "shapes": _shapes(parts),
        "gate_psnr_mean": sum(figures) / len(figures),
        "num_captions": sum(record.details["num_captions"] for record in ordered),
        "num_truncated": sum(record.details["num_truncated"] for record in ordered),
        **{name: width for name, width in ordered[0].details.items() if name in ("text_width", "pooled_width")},
    }


def cached_parts(manifest: Manifest, split: Split, image_size: int = 0) -> list[CachedPart]:
    """Return the tars of a split that hold pictures of one image size, those of one shape together.

    Args:
        manifest: a latent cache's.
        split: part of the cache.
        image_size: which of the cache's image sizes; 0 for the only one.

    Raises:
        ValueError: if the cache holds no such size, or several and none is named.
    """
    size = cached_size(manifest, image_size)
    parts = [
        CachedPart(
            shard=number,
            name=part["name"],
            image_size=part["image_size"],
            size=tuple(part["size"]),
            num_rows=part["num_rows"],
        )
        for number, shard in enumerate(shard for shard in manifest.shards_of(split) if shard.num_rows)
        for part in shard.details["parts"]
        if part["image_size"] == size
    ]
    return sorted(parts, key=lambda part: (part.size, part.shard))


def file_groups(manifest: Manifest, split: Split, parts: Sequence[CachedPart]) -> list[FileGroup]:
    """Return the files that each part is opened from: its own, and the text table of its shard."""
    shards = [shard for shard in manifest.shards_of(split) if shard.num_rows]
    return [
        FileGroup(
            record=shards[part.shard],
            suffixes=(*(part_file(part.name, suffix) for suffix in PART_SUFFIXES), TEXT_SUFFIX),
            num_rows=part.num_rows,
            shared=(TEXT_SUFFIX,) if len(shards[part.shard].details["parts"]) > 1 else (),
        )
        for part in parts
    ]


def cached_size(manifest: Manifest, image_size: int = 0) -> int:
    """Return an image size of a cache: the one named, or the only one; raises ValueError as `cached_parts`."""
    if "shapes" not in manifest.summary:
        raise ValueError("these latents have an older format than this code reads: make them again")
    there = sorted({shape["image_size"] for shape in manifest.summary["shapes"]})
    if image_size in there or (not image_size and len(there) == 1):
        return int(image_size or there[0])
    asked = f"not image_size {image_size}" if image_size else "several: name one with image_size"
    raise ValueError(f"these latents were made at {', '.join(map(str, there))} px, {asked}")


def latent_size(manifest: Manifest, image_size: int = 0) -> tuple[int, int]:
    """Return height and width of the latent of a square picture of one of the cache's image sizes."""
    size = cached_size(manifest, image_size)
    shape = next(shape for shape in manifest.summary["shapes"] if shape["image_size"] == size)
    side = size * int(shape["moment_shape"][1]) // int(shape["size"][1])
    return side, side


def latent_space(manifest: Manifest) -> LatentSpace:
    """Return raw and scaled latents of a finished cache, by its kind and the statistics of all its rows.

    Raises:
        ValueError: if it holds moments of a kind that this code doesn't know.
    """
    kind, known = manifest.identity["latent_kind"], [kind.value for kind in LatentKind]
    if kind not in known:
        raise ValueError(f"these latents are of kind {kind!r}, this code knows {', '.join(known)}")
    mean, std = (tuple(manifest.summary[name]) for name in ("mean", "std"))
    return LatentSpace(mean=mean, std=std, kind=LatentKind(kind))


def _shapes(parts: Sequence[tuple[ShardRecord, Mapping[str, Any]]]) -> list[dict[str, JSON]]:
    """Return every shape of a cache, with its rows by split."""
    num_rows = Counter[tuple[int, tuple[int, ...], tuple[int, ...], Split]]()
    for record, part in parts:
        num_rows[part["image_size"], tuple(part["size"]), tuple(part["moment_shape"]), record.split] += part["num_rows"]
    return [
        {
            "image_size": image_size,
            "size": list(size),
            "moment_shape": list(shape),
            "num_rows": {split.value: num_rows[image_size, size, shape, split] for split in Split},
        }
        for image_size, size, shape in sorted({entry[:3] for entry in num_rows})
    ]
