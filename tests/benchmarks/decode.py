"""JPEG bytes → 256 px centre crop → JPEG of quality 95: ours against the ways of others, in turns, on one thread.

python -m tests.benchmarks.decode [--quick] [--save] [--folder PHOTOS]

Pictures are made: 1/f noise with edges, 0.5 to 12 megapixels, JPEG of quality 90; `--folder` takes photographs instead.
Seconds are CPU time, so that neighbours on a shared machine count little. `pillow` decodes in full and resizes by
Lanczos, and every result is compared with that one; `opencv` decodes in full, averages areas and crops, as img2dataset
does. The ratio is against the faster of these two, in the pictures of 4 megapixels and more. The others show what was
to be had from shrinking while decoding elsewhere.
"""

from __future__ import annotations

import io
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import PIL
import pyvips
import simplejpeg
import tyro
from numpy.typing import NDArray
from PIL import Image

from ldm.config import Config
from pipeline.ingest.geometry import place
from pipeline.ingest.transforms import Measured, Picture, PictureConfig, ResizeFilter, measure, render
from tests.image_bytes import encoded, natural

RESULTS = Path(__file__).parent / "results"
GOAL, LARGE_MEGAPIXELS, FLOOR_DB = 2.0, 3.9, 35.0
MEGAPIXELS = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0)
SIDE, QUALITY = 256, 95
CONFIG = PictureConfig(image_size=SIDE, quality=QUALITY)

Pixels = NDArray[np.uint8]
Stamps = tuple[Pixels, float, float]
"""Pixels, and the seconds of decoding and of resizing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBenchmark(Config):
    """Images a second of decode, resize and encode."""

    rounds: int = 9
    """Turns of each side."""
    folder: str = ""
    """Photographs (*.jpg) to take instead of made ones."""
    quick: bool = False
    """Under a minute: three turns, up to 4 megapixels."""
    save: bool = False
    """Write the result beside the other results."""


def pillow(content: bytes) -> Stamps:
    """Full decode, Lanczos."""
    start = time.thread_time()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    decoded = time.thread_time()
    box = place(*image.size, CONFIG).box
    resized = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized), decoded - start, time.thread_time() - decoded


def opencv(content: bytes) -> Stamps:
    """Full decode, mean over areas, as img2dataset does it."""
    return _opencv(content, cv2.IMREAD_COLOR)


def opencv_reduced(content: bytes) -> Stamps:
    """Decode at a half, quarter or eighth, mean over areas."""
    height, width = simplejpeg.decode_jpeg_header(content)[:2]
    flags = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
    scale = next((scale for scale in flags if scale * SIDE <= min(width, height)), 1)
    return _opencv(content, flags.get(scale, cv2.IMREAD_COLOR))


def _opencv(content: bytes, flag: int) -> Stamps:
    start = time.thread_time()
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    decoded = time.thread_time()
    scale = SIDE / min(image.shape[:2])
    size = [max(SIDE, round(side * scale)) for side in image.shape[1::-1]]
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    resized = resized[top : top + SIDE, left : left + SIDE, ::-1]
    return resized, decoded - start, time.thread_time() - decoded


def simplejpeg_scaled(content: bytes) -> Stamps:
    """Decode at n eighths, Pillow's bicubic."""
    start = time.thread_time()
    height, width = simplejpeg.decode_jpeg_header(content)[:2]
    eighths = next((n for n in range(1, 9) if min(width, height) * n >= 8 * SIDE), 8)
    pixels = simplejpeg.decode_jpeg(content, "RGB", False, False, -(-height * eighths // 8), -(-width * eighths // 8))
    decoded = time.thread_time()
    left, top, right, bottom = (edge * eighths / 8 for edge in place(width, height, CONFIG).box)
    resized = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.asarray(resized), decoded - start, time.thread_time() - decoded


def vips(content: bytes) -> Stamps:
    """Vips' thumbnail; decoding and resizing are one stream."""
    start = time.process_time()  # vips has threads of its own
    pixels = pyvips.Image.thumbnail_buffer(content, SIDE, height=SIDE, crop="centre").numpy()
    return pixels, time.process_time() - start, 0.0


PEERS: dict[str, Callable[[bytes], Stamps]] = {
    "pillow": pillow,
    "opencv": opencv,
    "opencv-reduced": opencv_reduced,
    "simplejpeg": simplejpeg_scaled,
    "vips": vips,
}


def rendered(content: bytes, config: PictureConfig) -> Pixels:
    """Ours, whole: header, decode, resize, encode."""
    measured = measure(content, config)
    assert isinstance(measured, Measured)
    picture = render(content, measured, config)
    assert isinstance(picture, Picture)
    return picture.pixels


def main() -> None:
    """Run all sides in turns and print the table."""
    settings = tyro.cli(DecodeBenchmark, description=__doc__)
    if settings.quick:
        settings = replace(settings, rounds=3)
    cv2.setNumThreads(1)
    photos = list(_photos(settings))
    results = [_measure(name, content, settings.rounds) for name, content in photos]
    large = [result for result in results if result["megapixels"] >= LARGE_MEGAPIXELS]
    ratio = statistics.median(result["ratio"] for result in large)
    _print(results)
    worst = min(result["sides"]["ours"]["psnr_db"] for result in results)
    assert worst >= FLOOR_DB, f"ours is {worst:.1f} dB from the full decode, the floor is {FLOOR_DB}"
    if settings.save:
        record = {
            "settings": settings.to_dict(),
            "machine": platform.processor() or platform.machine(),
            "versions": _versions(),
            "photos": results,
            "ratio": ratio,
        }
        name = "decode-photos.json" if settings.folder else "decode.json"
        (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"decode ratio {ratio:.2f} goal {GOAL}")


def _photos(settings: DecodeBenchmark) -> list[tuple[str, bytes]]:
    if settings.folder:
        return [(path.stem, path.read_bytes()) for path in sorted(Path(settings.folder).glob("*.jpg"))]
    sizes = [size for size in MEGAPIXELS if size <= 4.0] if settings.quick else MEGAPIXELS
    return [(f"{size:g} MP", _photo(size)) for size in sizes]


def _photo(megapixels: float) -> bytes:
    width = round(math.sqrt(1.5e6 * megapixels))
    return encoded(natural(width, round(width / 1.5), seed=round(10 * megapixels)), "JPEG", quality=90)


def _measure(name: str, content: bytes, rounds: int) -> dict:
    """Time every side in turns on one photograph."""
    lanczos = replace(CONFIG, resize_filter=ResizeFilter.LANCZOS)
    ours = {"ours": CONFIG, "ours-lanczos": lanczos}
    seconds: dict[str, list[tuple[float, float, float]]] = {side: [] for side in (*ours, *PEERS)}
    pixels: dict[str, Pixels] = {}
    for _ in range(rounds):
        for side, config in ours.items():
            start = time.thread_time()
            pixels[side] = rendered(content, config)
            seconds[side].append((time.thread_time() - start, 0.0, 0.0))
        for side, peer in PEERS.items():
            pixels[side], decode, resize = peer(content)
            start = time.thread_time()
            encoded(Image.fromarray(np.ascontiguousarray(pixels[side])), "JPEG", quality=QUALITY, subsampling=0)
            seconds[side].append((decode, resize, time.thread_time() - start))
    sides = {side: _summary(turns, pixels[side], pixels["pillow"]) for side, turns in seconds.items()}
    fastest_peer = max(sides[side]["images_a_second"]["median"] for side in ("pillow", "opencv"))
    width, height = Image.open(io.BytesIO(content)).size
    return {
        "name": name,
        "megapixels": width * height / 1e6,
        "bytes": len(content),
        "sides": sides,
        "ratio": sides["ours"]["images_a_second"]["median"] / fastest_peer,
    }


def _summary(turns: list[tuple[float, float, float]], pixels: Pixels, reference: Pixels) -> dict:
    rates = [1 / sum(turn) for turn in turns]
    error = float(np.square(pixels.astype(float) - reference.astype(float)).mean())
    decode, resize, encode = (1e3 * statistics.median(stage) for stage in zip(*turns, strict=True))
    return {
        "images_a_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
        "milliseconds": {"decode": decode, "resize": resize, "encode": encode},
        "psnr_db": 10 * math.log10(255**2 / max(error, 1e-6)),
    }


def _print(results: list[dict]) -> None:
    print(f"{platform.processor() or platform.machine()}, one thread, {_versions()}")
    for result in results:
        print(
            f"\n{result['name']}, {result['megapixels']:.1f} MP, {result['bytes'] / 1e6:.2f} MB, x{result['ratio']:.2f}"
        )
        print(f"  {'side':15}{'median':>9}{'min':>9}{'max':>9}  images/s   ms: decode  resize  encode     dB")
        for side, summary in result["sides"].items():
            rate, spent = summary["images_a_second"], summary["milliseconds"]
            stages = "".join(f"{spent[stage]:8.1f}" for stage in ("decode", "resize", "encode"))
            stages = f"{spent['decode']:8.1f}   in all       " if side.startswith("ours") else stages
            print(
                f"  {side:15}{rate['median']:9.1f}{rate['min']:9.1f}{rate['max']:9.1f}  {'':11}{stages}"
                f"{min(summary['psnr_db'], 99):8.1f}"
            )


def _versions() -> dict[str, str]:
    return {
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
        "simplejpeg": simplejpeg.__version__,
        "libvips": ".".join(str(pyvips.version(part)) for part in range(3)),
    }


if __name__ == "__main__":
    main()
