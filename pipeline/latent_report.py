"""What a person looks at to trust a latent cache: originals beside what their latents decode to, and the channels.

Order: manifest → rows that the gates decoded, the worst and others evenly spread over their PSNR → crops from the
dataset, images from the stored moments → `report.html`, published whole; it needs no script, file or network.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.evaluation.scores import psnr
from ldm.storage import join, write_bytes
from ldm.types import Image as Pictures
from pipeline.crops import Part
from pipeline.encoder import Encoder
from pipeline.latent_config import Device, LatentsConfig
from pipeline.latent_gate import Chosen
from pipeline.latent_shard import MOMENTS, part_file
from pipeline.report import REPORT_NAME, data_uri
from pipeline.report_charts import Axis, histogram_figure
from pipeline.report_document import document, making, section, table
from pipeline.report_elements import Element, byte_size, count, decimal, element, render, stranger
from pipeline.report_totals import Column
from pipeline.store.manifest import Manifest, ShardRecord, load_manifest, shard_path
from pipeline.store.schema import Row
from pipeline.store.shards import read_index, read_row

NUM_PAIRS = 24
SIDE = 192
"""Longest side of a shown picture in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """A row's crop and what its latent decodes to.

    Attributes:
        caption: the row's first caption.
        place: its shard.
        figure: PSNR between the two, in decibels.
        crop: the crop as a `data:` URI.
        decoded: the decoded latent as a `data:` URI.
    """

    caption: str
    place: str
    figure: float
    crop: str
    decoded: str


def write_latent_report(config: LatentsConfig) -> str:
    """Write the report of a finished cache into its folder and return the report's path.

    Raises:
        ValueError: if the cache was never finished.
    """
    manifest = load_manifest(config.root)
    # The driver draws it, which may have no GPU where the workers have one.
    encoder = Encoder(dataclasses.replace(config, device=Device.AUTO))
    pairs = [_pair(config, encoder, shard, row) for shard, row in chosen_rows(manifest, NUM_PAIRS)]
    sections = [_pairs(pairs), *_shapes(manifest), _channels(manifest), _figures(manifest), making(manifest)]
    path = join(config.root, REPORT_NAME)
    write_bytes(path, render(document(f"Latents {manifest.digest[:12]}", _header(manifest), sections)))
    return path


def chosen_rows(manifest: Manifest, num_rows: int) -> list[tuple[ShardRecord, Chosen]]:
    """Return rows that the gates decoded: the worst one, and others evenly spread over the order of their PSNR."""
    gated = [
        (figure, shard.split.value, shard.name, Chosen(*row), shard)
        for shard in manifest.shards
        for row, figure in zip(shard.details["gate"]["rows"], shard.details["gate"]["psnr"], strict=True)
    ]
    ordered = sorted(gated, key=lambda entry: entry[:4])
    places = np.unique(np.linspace(0, len(ordered) - 1, num_rows).round().astype(int))
    return [(ordered[place][4], ordered[place][3]) for place in places]


def _pair(config: LatentsConfig, encoder: Encoder, shard: ShardRecord, chosen: Chosen) -> _Pair:
    told = shard.details["parts"][chosen.part]
    part = Part(name=told["name"], image_size=told["image_size"], size=tuple(told["size"]), rows=())
    latents = _row(config.root, shard, part_file(part.name, "tar"), chosen.row)
    source = shard_path(config.dataset, shard.split, shard.name, "tar")
    index = read_index(f"{source.removesuffix('tar')}index")
    crop = encoder.prepare([read_row(source, index, index.keys.index(latents["__key__"]))], part).images[0]
    moments = torch.from_numpy(np.load(io.BytesIO(latents[MOMENTS]))).float()[None]
    decoded = encoder.decode(moments).clamp(-1.0, 1.0)
    return _Pair(
        caption=json.loads(latents["json"])["captions"][0],
        place=f"{shard.split.value}/{shard.name}",
        figure=float(psnr(decoded, crop)[0]),
        crop=_uri(crop),
        decoded=_uri(decoded),
    )


def _row(root: str, shard: ShardRecord, suffix: str, row: int) -> Row:
    tar = shard_path(root, shard.split, shard.name, suffix)
    return read_row(tar, read_index(f"{tar.removesuffix('tar')}index"), row)


def _uri(pictures: Pictures) -> str:
    pixels = pictures[0].add(1.0).mul(127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return data_uri(stream.getvalue(), SIDE)


def _header(manifest: Manifest) -> Element:
    summary = manifest.summary
    figures = [figure for shard in manifest.shards for figure in shard.details["gate"]["psnr"]]
    facts = [
        ("Rows", count(sum(shard.num_rows for shard in manifest.shards))),
        ("Shards", count(len(manifest.shards))),
        ("On disk", byte_size(sum(shard.num_bytes for shard in manifest.shards))),
        ("Moments", _moments(summary["shapes"])),
        ("Round trip", f"{sum(figures) / len(figures):.2f} dB"),
        ("Captions", count(summary["num_captions"])),
    ]
    cards = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    told = "Each shard decoded some of its rows again before it was published; this page shows some of those."
    return element(
        "header",
        element("h1", "Latent cache"),
        element("p", "Cache ", element("code", manifest.digest[:12]), ". ", told, class_="lead"),
        element("dl", *cards, class_="cards"),
    )


def _moments(shapes: Sequence[Mapping[str, Any]]) -> str:
    """Return the shape of a row's moments, or how many there are."""
    if len(shapes) == 1:
        return " x ".join(map(str, shapes[0]["moment_shape"]))
    return f"{len(shapes)} shapes of {shapes[0]['moment_shape'][0]} channels"


def _shapes(manifest: Manifest) -> list[Element]:
    """Return a section on the shapes of a cache that has several."""
    shapes = manifest.summary["shapes"]
    if len(shapes) == 1:
        return []
    rows = [
        [
            str(shape["image_size"]),
            " x ".join(map(str, shape["size"])),
            " x ".join(map(str, shape["moment_shape"])),
            *[count(number) for number in shape["num_rows"].values()],
        ]
        for shape in shapes
    ]
    heads = ("image size", "width x height", "moments", *[f"{split} rows" for split in shapes[0]["num_rows"]])
    note = "A batch holds rows of one shape; each shape of a shard is a tar of its own."
    return [section("shapes", "Shapes", element("p", note, class_="note"), table(heads, rows))]


def _pairs(pairs: Sequence[_Pair]) -> Element:
    figures = [
        element(
            "figure",
            element("img", src=pair.crop, alt="crop"),
            element("img", src=pair.decoded, alt="decoded latent"),
            element(
                "figcaption",
                element("p", f"{pair.figure:.2f} dB, {pair.place}"),
                element("p", stranger(pair.caption), class_="words"),
            ),
        )
        for pair in pairs
    ]
    note = "The crop above, what its stored latent decodes to below; from the worst to the best."
    return section(
        "pairs",
        "Originals and decoded latents",
        element("p", note, class_="note"),
        element("div", *figures, class_="gallery"),
    )


def _channels(manifest: Manifest) -> Element:
    names = ("mean", "std", "min", "max")
    columns = [manifest.summary[name] for name in names]
    rows = [
        [str(channel), *[decimal(value) for value in values]]
        for channel, values in enumerate(zip(*columns, strict=True))
    ]
    num_values = count(manifest.summary["num_values_per_channel"])
    return section(
        "channels",
        "Channels",
        element("p", f"Over {num_values} raw values a channel; training scales by these.", class_="note"),
        table(("channel", *names), rows),
    )


def _figures(manifest: Manifest) -> Element:
    column = Column()
    figures = np.array([figure for shard in manifest.shards for figure in shard.details["gate"]["psnr"]])
    column.add(figures, np.ones(len(figures), bool))
    floors = sorted({shard.details["gate"]["floor"] for shard in manifest.shards})
    said = " to ".join(f"{floor:.2f}" for floor in dict.fromkeys((floors[0], floors[-1])))
    return section(
        "figures",
        "Round trips",
        element("p", f"A shard whose rows have a mean PSNR below {said} dB is not published.", class_="note"),
        element("div", histogram_figure("PSNR in dB", column, Axis.LINEAR, decimal), class_="charts"),
    )
