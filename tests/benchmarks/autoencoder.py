"""The autoencoder against diffusers' `AutoencoderKL` with the same weights, in turns: encode and decode, equal outputs.

python -m tests.benchmarks.autoencoder [--device cuda] [--quick] [--save]

Ours is what the jobs use: the frozen network as a worker of `jobs/precompute_latents.py` holds it (channels last, on
a CPU few images at once). The other is the class as anyone loads it, called with the whole batch. Weights are random
and the same; the largest difference of the outputs is printed and must stay below 1e-4 of their size in float32. On a
GPU: kl-f8 at 256 and 512 px in bf16.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL
from torch import Tensor

from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.config import Config
from ldm.interop.diffusers import save_autoencoder
from pipeline.encoder import Encoder
from pipeline.latent_config import Device, LatentsConfig, Precision
from tests.benchmarks.neighbours import TRIES_PER_TURN, Clock, Turn, quiet_turns

RESULTS = Path(__file__).parent / "results"
GOAL = 1.2
TOLERANCE = {Precision.FP32: 1e-4, Precision.BF16: 5e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderBenchmark(Config):
    """Images a second through encoder and decoder, against diffusers."""

    device: Device = Device.CPU
    """Where the networks lie."""
    rounds: int = 5
    """Turns of each side."""
    threads: int = 2
    """CPU threads."""
    quick: bool = False
    """Under a minute: two turns of the first network, however busy the machine is."""
    save: bool = False
    """Write the result beside the other results."""


@dataclass(frozen=True, slots=True)
class Work:
    """A network, how large its images are, how many at once, and in which number format."""

    name: str
    config: AutoencoderConfig
    image_size: int
    batch_size: int
    precision: Precision


CPU_WORKS = (
    Work("emoji_f4, 64 px", zoo.emoji_f4(), 64, 64, Precision.FP32),
    Work("emoji_f4, 256 px", zoo.emoji_f4(), 256, 8, Precision.FP32),
    Work("kl_f8, 256 px", zoo.kl_f8(), 256, 1, Precision.FP32),
)
GPU_WORKS = (
    Work("kl_f8, 256 px", zoo.kl_f8(), 256, 64, Precision.BF16),
    Work("kl_f8, 512 px", zoo.kl_f8(), 512, 16, Precision.BF16),
)


def main() -> None:
    """Run both sides in turns and print the tables."""
    settings = tyro.cli(AutoencoderBenchmark, description=__doc__)
    torch.set_num_threads(settings.threads)
    works = GPU_WORKS if settings.device is Device.CUDA else CPU_WORKS
    machine = torch.cuda.get_device_name() if settings.device is Device.CUDA else platform.processor()
    record: dict[str, Any] = {"settings": settings.to_dict(), "machine": machine or platform.machine()}
    record |= {"num_cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "works": {}}
    print(f"{record['machine']}, {settings.threads} threads of {record['num_cores']} cores, torch {torch.__version__}")
    print(f"{'':18}{'':8}{'ours':>9}{'theirs':>9}  images/s{'ratio':>8}{'min':>7}{'max':>7}   apart")
    for work in works[:1] if settings.quick else works:
        record["works"][work.name] = measured(work, settings)
    ratios = [one["ratio"] for sides in record["works"].values() for one in sides.values()]
    record["ratio"] = min(ratios)
    if settings.save:
        path = RESULTS / ("autoencoder-cuda.json" if settings.device is Device.CUDA else "autoencoder.json")
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"autoencoder ratio {min(ratios):.2f} (the least) goal {GOAL}")


def measured(work: Work, settings: AutoencoderBenchmark) -> dict[str, Any]:
    """Return rates and ratios of encoding and decoding with one network."""
    with tempfile.TemporaryDirectory(prefix="autoencoder-benchmark-") as folder:
        torch.manual_seed(0)
        save_autoencoder(Autoencoder(work.config), folder)
        ours = Encoder(
            LatentsConfig(
                root=folder,
                dataset=folder,
                autoencoder=folder,
                image_size=work.image_size,
                device=settings.device,
                precision=work.precision,
                num_cpus=float(settings.threads),
            )
        )
        theirs = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False).to(ours.device)
    images = torch.rand(work.batch_size, 3, work.image_size, work.image_size) * 2 - 1
    moments = ours.encode(images.to(ours.device))
    latent = moments.chunk(2, dim=1)[0]

    def under(call: Callable[[], Tensor]) -> Tensor:
        half = work.precision is not Precision.FP32
        with torch.inference_mode(), torch.autocast(ours.device.type, torch.bfloat16, enabled=half):
            return call().float().cpu()

    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "encode": (
            lambda: ours.encode(images).cpu(),
            lambda: under(lambda: theirs.encode(images.to(ours.device)).latent_dist.parameters),
        ),
        "decode": (lambda: ours.decode(moments), lambda: under(lambda: theirs.decode(latent).sample)),
    }
    return {name: _row(work, name, pair, settings) for name, pair in pairs.items()}


def _row(
    work: Work, name: str, pair: tuple[Callable[[], Tensor], Callable[[], Tensor]], settings: AutoencoderBenchmark
) -> dict[str, Any]:
    mine, other = pair[0](), pair[1]()
    apart = float(((mine - other).abs() / (1 + other.abs())).max())
    assert apart < TOLERANCE[work.precision], f"{work.name} {name}: the sides are {apart:.2g} apart"
    repeats = 1
    while not settings.quick and _clock(pair[1], repeats).wall < 1.0:
        repeats *= 2
    turns = quiet_turns(
        lambda: (_clock(pair[0], repeats), _clock(pair[1], repeats)),
        2 if settings.quick else settings.rounds,
        1 if settings.quick else TRIES_PER_TURN,
    )
    rates = [_rates(turn, repeats * work.batch_size) for turn in turns]
    ratios = [one / two for one, two in rates]
    middle = [statistics.median(side) for side in zip(*rates, strict=True)]
    print(
        f"{work.name:18}{name:8}{middle[0]:9.1f}{middle[1]:9.1f}  {'':8}{statistics.median(ratios):8.2f}"
        f"{min(ratios):7.2f}{max(ratios):7.2f}   {apart:.1g}"
    )
    return {
        "images_per_second": {"ours": [one for one, _ in rates], "theirs": [two for _, two in rates]},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "apart": apart,
        "neighbours": [turn.neighbours for turn in turns],
    }


def _clock(work: Callable[[], Tensor], repeats: int) -> Clock:
    start = Clock.now()  # both sides end on the CPU, so a GPU has been waited for
    for _ in range(repeats):
        work()
    return Clock.now() - start


def _rates(turn: Turn[tuple[Clock, Clock]], num_images: int) -> tuple[float, float]:
    mine, other = turn.result
    return num_images / mine.wall, num_images / other.wall


if __name__ == "__main__":
    main()
