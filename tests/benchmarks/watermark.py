"""The watermark: what it costs in PSNR, how often it is found after what happens to pictures, how often by wrong keys.

python -m tests.benchmarks.watermark [--quick] [--save]

Pictures are emoji drawings of the installed packages at 64 px, the same through an autoencoder that comes with the
project (as what a model draws is), and parts of packaged photographs at 64, 256 and 512 px (scikit-learn's china and
flower, matplotlib's portrait). Each is marked with a key of its own. The ratio is the share that is found after JPEG
75, of the worst set; nobody is measured against.
"""

from __future__ import annotations

import io
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image

from ldm.config import Config
from ldm.drawing import images_of, pixels_of
from ldm.first_stage import load_autoencoder
from ldm.watermark import MARKED_BELOW, Detection, detect, detect_crop, marked
from pipeline.ingest.transforms import Measured, Picture, PictureConfig, measure, render
from pipeline.sources.emoji import EmojiConfig
from pipeline.store.schema import Split

RESULTS = Path(__file__).parent / "results"
GOAL, FLOOR_DB = 0.99, 38.0
AUTOENCODER = "shipped:small_f4"

Pixels = NDArray[np.uint8]
Attack = Callable[[Pixels], Pixels]


@dataclass(frozen=True, kw_only=True, slots=True)
class WatermarkBenchmark(Config):
    """What the watermark costs and survives."""

    num_drawings: int = 1000
    """Emoji drawings."""
    num_photos: int = 150
    """Parts of photographs at 64 and at 256 px; a third as many at 512 px."""
    num_keys: int = 50_000
    """Wrong keys on each set of 64 px, and on larger ones as many as take as long."""
    quick: bool = False
    """Under a minute: a fifteenth of it all."""
    save: bool = False
    """Write the result beside the other results."""


def through_jpeg(quality: int) -> Attack:
    """JPEG with its colours at half resolution, as most programs write it."""

    def attack(picture: Pixels) -> Pixels:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", quality=quality)
        return np.asarray(Image.open(stream))

    return attack


def through_png(picture: Pixels) -> Pixels:
    """PNG, which loses nothing."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return np.asarray(Image.open(stream))


def shrunk(share: float) -> Attack:
    """Bicubic, to a share of its sides and back."""

    def attack(picture: Pixels) -> Pixels:
        size = picture.shape[1], picture.shape[0]
        less = Image.fromarray(picture).resize([round(share * side) for side in size], Image.Resampling.BICUBIC)
        return np.asarray(less.resize(size, Image.Resampling.BICUBIC))

    return attack


def blurred(picture: Pixels) -> Pixels:
    """Gaussian, one pixel."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))


def noisy(picture: Pixels) -> Pixels:
    """Gaussian noise of five grey levels."""
    noise = np.random.default_rng(0).normal(0, 5, picture.shape)
    return np.clip(np.round(picture + noise), 0, 255).astype(np.uint8)


def brighter(picture: Pixels) -> Pixels:
    """A tenth lighter and with more contrast."""
    return np.clip(np.round((picture.astype(float) - 128) * 1.2 + 141), 0, 255).astype(np.uint8)


def cut(picture: Pixels) -> Pixels:
    """The middle nine tenths of both sides."""
    top, left = (math.ceil(side * 0.05) for side in picture.shape[:2])
    return picture[top : picture.shape[0] - top, left : picture.shape[1] - left]


def corner(picture: Pixels) -> Pixels:
    """The lower right three quarters of both sides."""
    top, left = (side // 4 for side in picture.shape[:2])
    return picture[top:, left:]


ATTACKS: dict[str, tuple[Attack, Callable[[Pixels, str], Detection]]] = {
    "untouched": (lambda picture: picture, detect),
    "PNG": (through_png, detect),
    "JPEG 90": (through_jpeg(90), detect),
    "JPEG 75": (through_jpeg(75), detect),
    "JPEG 50": (through_jpeg(50), detect),
    "JPEG 30": (through_jpeg(30), detect),
    "0.75 and back": (shrunk(0.75), detect),
    "0.5 and back": (shrunk(0.5), detect),
    "blur 1 px": (blurred, detect),
    "noise 5": (noisy, detect),
    "brighter": (brighter, detect),
    "middle 0.9": (cut, detect),
    "middle 0.9, searched": (cut, detect_crop),
    "corner 0.75, searched": (corner, detect_crop),
}


def main() -> None:
    """Measure each set and print the table."""
    settings = tyro.cli(WatermarkBenchmark, description=__doc__)
    torch.set_num_threads(1)
    share = 15 if settings.quick else 1
    pictures_of = sets(settings.num_drawings // share, settings.num_photos // share)
    found = {name: measured(pictures, settings.num_keys // share) for name, pictures in pictures_of.items()}
    show(found)
    worst = min(one["found"]["JPEG 75"]["share"] for one in found.values())
    if settings.save:
        record = {
            "settings": settings.to_dict(),
            "machine": platform.processor() or platform.machine(),
            "versions": {name: version(name) for name in ("numpy", "pillow")},
            "p_value_below": MARKED_BELOW,
            "sets": found,
            "ratio": worst,
        }
        (RESULTS / "watermark.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"watermark ratio {worst:.4f} goal {GOAL}")


def sets(num_drawings: int, num_photos: int) -> dict[str, Pixels]:
    """Return the pictures of each set, (n, y, x, 3)."""
    drawn = drawings(num_drawings)
    rebuilt = through_autoencoder(drawn[: max(1, num_drawings // 4)])
    numbers = {64: num_photos, 256: num_photos, 512: -(-num_photos // 3)}
    parts = {f"photos {side} px": photos(number, side) for side, number in numbers.items()}
    return {"drawings 64 px": drawn, "decoded 64 px": rebuilt, **parts}


def drawings(count: int) -> Pixels:
    """Return emoji drawings as the emoji recipe shards them: a spread of all, in both styles."""
    source = EmojiConfig(rows_per_shard=100).build()
    shards = source.shard_names(Split.TRAIN)
    each = -(-count // len(shards))
    rows = [row for name in shards for row in islice(source.open_shard_at_row(name, 0), each)]
    config = PictureConfig(image_size=64)
    pixels = []
    for row in rows[:: len(rows) // count][:count]:
        place = measure(row.payload, config)
        assert isinstance(place, Measured), f"{row.key}: {place}"
        picture = render(row.payload, place, config)
        assert isinstance(picture, Picture), f"{row.key}: {picture}"
        pixels.append(picture.pixels)
    return np.stack(pixels)


@torch.no_grad()
def through_autoencoder(pixels: Pixels) -> Pixels:
    """Return what an autoencoder makes of pictures: no longer of one colour anywhere, as what a model draws."""
    network = load_autoencoder(AUTOENCODER).eval()
    device = torch.device("cpu")
    parts = [images_of(pixels[start : start + 32], device) for start in range(0, len(pixels), 32)]
    latents = [network.encode(part)[:, : network.config.latent_channels] for part in parts]
    return np.concatenate([pixels_of(network.decode(latent)) for latent in latents])


def photos(count: int, side: int) -> Pixels:
    """Return random squares of photographs, scaled to a side."""
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    whole.append(Image.open(portrait).convert("RGB"))
    dice = np.random.default_rng(side)
    parts = []
    for number in range(count):
        photo = whole[number % len(whole)]
        part = int(dice.integers(min(200, side), min(photo.size) + 1))
        left, top = (int(dice.integers(0, edge - part + 1)) for edge in photo.size)
        box = (left, top, left + part, top + part)
        parts.append(np.asarray(photo.resize((side, side), Image.Resampling.LANCZOS, box=box)))
    return np.stack(parts)


def measured(pictures: Pixels, num_keys: int) -> dict[str, Any]:
    """Return PSNR, what is found after each attack, and what wrong keys find."""
    keys = [f"key {number}" for number in range(len(pictures))]
    begun = time.process_time()
    carriers = [marked(picture[None], key)[0] for picture, key in zip(pictures, keys, strict=True)]
    seconds = (time.process_time() - begun) / len(pictures)
    quality = np.array([psnr_db(carrier, picture) for carrier, picture in zip(carriers, pictures, strict=True)])
    found = {}
    for name, (attack, look) in ATTACKS.items():
        seen = [look(attack(carrier), key) for carrier, key in zip(carriers, keys, strict=True)]
        scores = np.array([one.score for one in seen])
        found[name] = {
            "share": float(np.mean([one.is_marked for one in seen])),
            "score": {"median": float(np.median(scores)), "min": float(scores.min())},
        }
    return {
        "num_pictures": len(pictures),
        "psnr_db": {
            "mean": float(quality.mean()),
            "min": float(quality.min()),
            "share_below_floor": float(np.mean(quality < FLOOR_DB - 0.005)),
        },
        "seconds_each": seconds,
        "found": found,
        "wrong_keys": wrong_keys(carriers, num_keys * 64**2 // pictures[0, ..., 0].size),
    }


def psnr_db(first: Pixels, second: Pixels) -> float:
    """Return 10 log10(255^2 / mean squared error)."""
    return 10 * math.log10(255**2 / max(1e-9, float(np.square(first.astype(float) - second).mean())))


def wrong_keys(carriers: list[Pixels], num_keys: int) -> dict[str, Any]:
    """Return how often keys find themselves in pictures that carry another, beside what the p-values promise."""
    seen = [detect(carriers[number % len(carriers)], f"wrong {number}") for number in range(num_keys)]
    scores = np.array([one.score for one in seen])
    return {
        "num_keys": num_keys,
        "mean": float(scores.mean()),
        "standard_deviation": float(scores.std()),
        "largest": float(scores.max()),
        "share_at_p": {f"{level:g}": float(np.mean([one.p_value < level for one in seen])) for level in (1e-2, 1e-4)},
        "marked": sum(one.is_marked for one in seen),
    }


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print the table: a column for each set."""
    print(f"{platform.processor() or platform.machine()}, one thread; share found at p < {MARKED_BELOW:g}\n")
    print(f"{'':24}" + "".join(f"{name:>16}" for name in found))
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "pictures": lambda one: f"{one['num_pictures']}",
        "PSNR dB, mean": lambda one: f"{one['psnr_db']['mean']:.2f}",
        "PSNR dB, least": lambda one: f"{one['psnr_db']['min']:.2f}",
        "share below 38 dB": lambda one: f"{one['psnr_db']['share_below_floor']:.4f}",
        "milliseconds each": lambda one: f"{1e3 * one['seconds_each']:.0f}",
    }
    for label, said in rows.items():
        print(f"{label:24}" + "".join(f"{said(one):>16}" for one in found.values()))
    for attack in ATTACKS:
        shares = "".join(f"{one['found'][attack]['share']:16.4f}" for one in found.values())
        print(f"{attack:24}{shares}")
    wrong = [one["wrong_keys"] for one in found.values()]
    print(f"{'wrong keys':24}" + "".join(f"{one['num_keys']:>16}" for one in wrong))
    print(f"{'  their z, mean':24}" + "".join(f"{one['mean']:16.3f}" for one in wrong))
    print(f"{'  deviation':24}" + "".join(f"{one['standard_deviation']:16.3f}" for one in wrong))
    print(f"{'  largest':24}" + "".join(f"{one['largest']:16.2f}" for one in wrong))
    print(f"{'  found':24}" + "".join(f"{one['marked']:>16}" for one in wrong))


if __name__ == "__main__":
    main()
