"""How well autoencoders give back pictures that they never saw: PSNR, SSIM and ST-LPIPS on datasets' held-out rows.

python -m tests.benchmarks.first_stages --autoencoders ADDRESS ... --datasets DATASET ... [--image-size 64] [--save]

Every held-out picture is shrunk to the image size, encoded, and decoded from the mode of its latent. After
`make demo`: runs/emoji/autoencoder/model and runs/emoji/dataset.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from jobs.command_line import MARKERS
from ldm.config import Config
from ldm.first_stage import load_autoencoder
from ldm.interop.diffusers import weights_digest
from ldm.losses.perceptual import PerceptualConfig, perceptual_distance
from ldm.training.autoencoder_validation import SCORES, AutoencoderValidation
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.world import World
from pipeline.images import ImageCropConfig, ImageLoader, ImageLoaderConfig
from pipeline.store.manifest import load_manifest
from pipeline.store.schema import Split

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStagesBenchmark(Config):
    """Reconstructions of held-out pictures."""

    datasets: tuple[str, ...]
    """Folders or URLs of datasets."""
    autoencoders: tuple[str, ...]
    """Addresses of autoencoders."""
    image_size: int = 64
    """Side of the pictures in pixels."""
    threads: int = 2
    """CPU threads."""
    save: bool = False
    """Write the result beside the other results."""


def main() -> None:
    """Measure each autoencoder on each dataset and print the table."""
    settings = tyro.cli(FirstStagesBenchmark, description=__doc__, config=MARKERS)
    torch.set_num_threads(settings.threads)
    asked = {"image_size": settings.image_size, "threads": settings.threads}
    record: dict[str, Any] = {"settings": asked, "torch": torch.__version__, "scores": []}
    print(f"{'':36}{'dataset':28}{'rows':>7}{'PSNR dB':>9}{'SSIM':>7}{'ST-LPIPS':>10}")
    for autoencoder in settings.autoencoders:
        for dataset in settings.datasets:
            found = scores(autoencoder, dataset, settings.image_size)
            record["scores"].append(found)
            psnr, ssim, distance = (found[name] for name in SCORES)
            print(
                f"{found['autoencoder']:36}{found['name']:28}{found['num_rows']:7,}{psnr:9.2f}{ssim:7.3f}{distance:10.4f}"
            )
    if settings.save:
        (RESULTS / "first_stages.json").write_text(json.dumps(record, indent=1) + "\n")


def scores(autoencoder: str, dataset: str, image_size: int) -> dict[str, Any]:
    """Return the scores of an autoencoder on a dataset, with the digests of both."""
    manifest = load_manifest(dataset)
    crop = ImageCropConfig(image_size=image_size)
    loader = ImageLoader(manifest, ImageLoaderConfig(root=dataset, split=Split.VALIDATION, crop=crop))
    network = load_autoencoder(autoencoder).eval()
    measure = AutoencoderValidation(
        held_out=loader,
        perceptual=perceptual_distance(PerceptualConfig()),
        features=None,
        config=ReconstructionConfig(validation_rows=0, perceptual_rows=0),
        world=World(rank=0, size=1, device=torch.device("cpu")),
    )
    return {
        "autoencoder": _short(autoencoder),
        "digest": weights_digest(network.state_dict(), network.config),
        "name": _short(dataset),
        "dataset": manifest.digest,
        "num_rows": loader.num_rows,
        **measure.scores(network),
    }


def _short(address: str) -> str:
    """Return the end of an address: where a folder lies on this machine means nothing elsewhere."""
    return "/".join(Path(address).parts[-2:])


if __name__ == "__main__":
    main()
