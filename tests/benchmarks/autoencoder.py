"""The autoencoder against diffusers' `AutoencoderKL` with the same weights, in turns: encode and decode, equal outputs.

python -m tests.benchmarks.autoencoder [--device cuda] [--quick] [--save]

Ours is what the jobs use: the frozen network as a worker of `jobs/precompute_latents.py` holds it (channels last, on
a CPU few images at once). The other is the class as anyone loads it, called with the whole batch. Weights are random
and the same; the largest difference of the outputs is printed and must stay below 1e-4 of their size in float32. On a
GPU: kl-f8 at 256 and 512 px in bf16.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.interop.diffusers import save_autoencoder
from ldm.precision import Precision
from pipeline.encoder import Encoder
from pipeline.latent_config import LatentsConfig
from tests.benchmarks.network_pair import PairSettings, in_turns, line, run

TOLERANCE = {Precision.FP32: 1e-4, Precision.BF16: 5e-2}


@dataclass(frozen=True, slots=True)
class Work:
    """A network, how large its images are, how many at once, and in which number format."""

    name: str
    config: AutoencoderConfig
    image_size: int
    batch_size: int
    precision: Precision


CPU_WORKS = (
    Work("small_f4, 64 px", zoo.small_f4(), 64, 64, Precision.FP32),
    Work("small_f8, 64 px", zoo.small_f8(), 64, 64, Precision.FP32),
    Work("emoji_f4, 256 px", zoo.emoji_f4(), 256, 8, Precision.FP32),
    Work("kl_f8, 256 px", zoo.kl_f8(), 256, 1, Precision.FP32),
)
GPU_WORKS = (
    Work("kl_f8, 256 px", zoo.kl_f8(), 256, 64, Precision.BF16),
    Work("kl_f8, 512 px", zoo.kl_f8(), 512, 16, Precision.BF16),
)


def measured(work: Work, settings: PairSettings) -> dict[str, Any]:
    """Print and return rates and ratios of encoding and decoding with one network."""
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
    return {f"{work.name} {name}": _row(work, name, pair, settings) for name, pair in pairs.items()}


def _row(
    work: Work, name: str, pair: tuple[Callable[[], Tensor], Callable[[], Tensor]], settings: PairSettings
) -> dict[str, Any]:
    mine, other = pair[0](), pair[1]()
    apart = float(((mine - other).abs() / (1 + other.abs())).max())
    assert apart < TOLERANCE[work.precision], f"{work.name} {name}: the sides are {apart:.2g} apart"
    start = time.perf_counter()
    pair[1]()
    repeats = 1 if settings.quick else max(1, round(1 / (time.perf_counter() - start)))
    result = in_turns(*pair, settings, repeats=repeats, images=work.batch_size) | {"apart": apart}
    print(f"{line(f'{work.name} {name}', result)}   {apart:.1g} apart")
    return result


if __name__ == "__main__":
    run("autoencoder", __doc__ or "", 1.2, CPU_WORKS, GPU_WORKS, measured)
