"""The evaluation, put together: a finished model against held-out rows, under one protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm import storage
from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.rows import RowConditions
from ldm.config import Config
from ldm.denoiser import load_denoiser
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.denoising import Denoising
from ldm.evaluation.features import feature_network
from ldm.evaluation.frechet import frechet_distance, statistics_of
from ldm.evaluation.protocol import EvaluationProtocol
from ldm.evaluation.scores import psnr, ssim
from ldm.first_stage import load_autoencoder
from ldm.model_card import AUTOENCODER_FOLDER, load_card, model_digest
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.training.diffusion_task import usable_rows
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import Progress
from ldm.training.tracking_config import TrackingConfig
from ldm.training.world import World
from ldm.types import Condition, Image, LatentBatch
from pipeline.images import ImageLoader, ImageLoaderConfig
from pipeline.ingest.picture import ResizeMode
from pipeline.latent_plan import token_reader
from pipeline.latent_summary import latent_size
from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.store.manifest import Manifest, load_manifest
from pipeline.store.schema import Split

REPORT_FILE = "evaluation.json"
SHUFFLED_LOSS = "validation_loss_shuffled_captions"
"""The loss of rows that are told what belongs to others of their batch."""
BATCH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig(Config):
    """What a model must reach to become the champion of its name."""

    min_psnr_db: float = 20.0
    """Least mean PSNR of reconstructions, in decibels."""
    min_loss_drop: float = 0.7
    """Least share by which the validation loss of a network that predicts noise fell below its first measurement; of
    one that predicts something else, whose loss ends far from 0 however good it is, that it fell at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(Config):
    """Measure a finished model on held-out rows and write the result on its registered version."""

    root: str
    """Folder or URL of the training that made the model."""
    record: str
    """Local folder of that training's record, which names its MLflow run."""
    dataset: str
    """Folder or URL of the dataset."""
    latents: str
    """Folder or URL of the latent cache."""
    protocol: EvaluationProtocol
    """What must be equal for two evaluations to be comparable."""
    gate: GateConfig = field(default_factory=GateConfig)
    """What a champion must reach."""
    validation_rows: int = 384
    """Held-out rows of the denoising loss; the training's own number makes the two figures equal."""
    launch: LaunchConfig = LaunchConfig()
    """Where it runs (one worker)."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    @property
    def model_folder(self) -> str:
        """Where the model lies."""
        return storage.join(self.root, "model")


def report_there(config: EvaluateConfig) -> dict[str, Any] | None:
    """Return the report of an earlier evaluation of this very model under this protocol, or None."""
    path = storage.join(config.root, REPORT_FILE)
    if not storage.exists(path):
        return None
    report: dict[str, Any] = json.loads(storage.read_text(path))
    is_same = report["model"] == model_digest(load_card(config.model_folder))
    is_same = is_same and report["validation_rows"] == config.validation_rows
    return report if is_same and report["protocol"] == config.protocol.digest() else None


def evaluate_worker(
    config: EvaluateConfig, world: World, report: Callable[[Progress], None], should_stop: Callable[[], bool]
) -> Outcome:
    """Measure in one process and write the report beside the model.

    Raises:
        ValueError: if the model was not made from these latents.
    """
    model = load_text_to_image(config.model_folder, world.device)
    latents, dataset = load_manifest(config.latents), load_manifest(config.dataset)
    for name, uri, found in (("latents", config.latents, latents), ("dataset", config.dataset, dataset)):
        made_of = model.card.lineage.get(f"{name}_digest", "that nobody names")
        if made_of != found.digest:
            raise ValueError(f"{config.model_folder} was trained on {name} {made_of}, {uri} has {found.digest}")
    if dataset.image_size != config.protocol.image_size:
        raise ValueError(
            f"the protocol compares images of {config.protocol.image_size} px, "
            f"{config.dataset} has {dataset.image_size}"
        )
    if dataset.identity.get("picture", {}).get("resize") == ResizeMode.BUCKETS:
        raise ValueError(f"the protocol compares squares, the pictures in {config.dataset} come in buckets")
    split = Split(config.protocol.split)
    images = ImageLoader(dataset, ImageLoaderConfig(root=config.dataset, split=split))
    held_out = LatentLoader(
        latents,
        LoaderConfig(
            root=config.latents,
            split=split,
            image_size=_image_size(latents, model.card.latent_size),
            caption_dropout=0.0,
        ),
        read_tokens=token_reader(latents, model.card.text, model.card.conditioning.text, world.device),
    )
    factor = _image_size(latents, model.card.latent_size) // model.card.latent_size[0]
    conditions = RowConditions(config=model.card.conditioning, space=model.card.space, factor=factor, seed=0)
    num_images = min(config.protocol.num_images, images.num_rows)
    total = images.num_rows + 2 * config.validation_rows + num_images
    bar = _Bar(report, total)
    metrics = {
        **_reconstruction(config, images, world, bar),
        **_denoising(config, conditions, held_out, world, bar),
        **_distance(config, model, images, partial(_told, model, conditions, held_out), num_images, bar),
    }
    content = {
        "model": model_digest(model.card),
        "protocol": config.protocol.digest(),
        "validation_rows": config.validation_rows,
        "metrics": metrics,
    }
    storage.write_text(storage.join(config.root, REPORT_FILE), json.dumps(content, indent=1))
    return {"is_finished": True, **content}


def verdict(
    config: EvaluateConfig, prediction: Prediction, metrics: dict[str, float], first_loss: float
) -> dict[str, tuple[str, bool]]:
    """Return each bound of the gate: what was measured against what is asked, and whether it holds."""
    drop = 1 - metrics["validation_loss"] / first_loss
    least_drop = config.gate.min_loss_drop if prediction is Prediction.NOISE else 0.0
    right, gate = metrics["validation_loss"], config.gate
    wrong = {}
    if SHUFFLED_LOSS in metrics:  # a model that is told nothing has none
        shuffled = metrics[SHUFFLED_LOSS]
        wrong = {"right captions": (f"{right:.4f} against {shuffled:.4f} with shuffled ones (lower)", right < shuffled)}
    return {
        "reconstruction PSNR": (
            f"{metrics['reconstruction_psnr_db']:.2f} dB (at least {gate.min_psnr_db:g})",
            metrics["reconstruction_psnr_db"] >= gate.min_psnr_db,
        ),
        "validation loss": (
            f"{right:.4f}, {drop:.1%} below the first {first_loss:.4f} (at least {least_drop:.0%})",
            drop >= least_drop,
        ),
        **wrong,
    }


class _Bar:
    """Counts rows for the progress report."""

    def __init__(self, report: Callable[[Progress], None], total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def add(self, rows: int) -> None:
        self._done = min(self._done + rows, self._total)
        self._report(Progress(done=self._done, total=self._total))


def _reconstruction(config: EvaluateConfig, images: ImageLoader, world: World, bar: _Bar) -> dict[str, float]:
    autoencoder = load_autoencoder(storage.join(config.model_folder, AUTOENCODER_FOLDER)).to(world.device).eval()
    scores: list[tuple[Tensor, Tensor]] = []
    for batch in _batches(images, images.num_rows):
        real = batch.to(world.device)
        with torch.no_grad():
            made = autoencoder.reconstruct(real).clamp(-1, 1)
        scores.append((psnr(made, real), ssim(made, real)))
        bar.add(len(batch))
    decibels, similarity = (torch.cat(parts).mean().item() for parts in zip(*scores, strict=True))
    return {"reconstruction_psnr_db": decibels, "reconstruction_ssim": similarity}


def _denoising(
    config: EvaluateConfig, conditions: RowConditions, held_out: LatentLoader, world: World, bar: _Bar
) -> dict[str, float]:
    card = load_card(config.model_folder)
    denoiser = load_denoiser(config.model_folder, card.conditioning).to(world.device).eval()
    num_rows = usable_rows(min(held_out.num_rows, config.validation_rows))
    measure = Denoising(
        schedule=Schedule(card.schedule), prediction=card.prediction, space=card.space, num_rows=num_rows
    )
    spans = list(held_out.spans(0, num_rows, BATCH))
    batches = [held_out.rows(*span) for span in spans]
    sums, is_told = [0.0, 0.0], False
    for batch, (start, stop) in zip(batches, spans, strict=True):
        right, part = conditions.whole(batch), _placed(batch, world.device)
        is_told = right.num_rows is not None
        for i, condition in enumerate((right, right.rolled((stop - start) // 2))):
            on_device = condition.to(world.device, torch.float32)
            sums[i] += measure.losses(denoiser, part, on_device).sum().item()
            bar.add(stop - start)
    losses = {"validation_loss": sums[0] / num_rows, SHUFFLED_LOSS: sums[1] / num_rows}
    return {"validation_loss": losses["validation_loss"]} if not is_told else losses


def _told(model: TextToImage, conditions: RowConditions, held_out: LatentLoader, start: int, stop: int) -> Condition:
    """Return what an image of each of some held-out rows is drawn from."""
    if conditions.config == ConditioningConfig():
        return model.condition(held_out.captions(start, stop))
    return conditions.whole(held_out.rows(start, stop)).to(model.device, torch.float32)


def _distance(
    config: EvaluateConfig,
    model: TextToImage,
    images: ImageLoader,
    told: Callable[[int, int], Condition],
    num_images: int,
    bar: _Bar,
) -> dict[str, float]:
    protocol = config.protocol
    network = feature_network(protocol.features)
    real = [network(batch) for batch in _batches(images, num_images)]
    made: list[Tensor] = []
    for start in range(0, num_images, BATCH):
        stop = min(start + BATCH, num_images)
        seeds = range(protocol.seed + start, protocol.seed + stop)
        scales = [protocol.guidance_scale] * len(seeds)
        drawn = model.images(told(start, stop), seeds, scales, protocol.sampler)
        made.append(network(drawn.clamp(-1, 1).cpu()))
        bar.add(len(seeds))
    distance = frechet_distance(statistics_of(torch.cat(real)), statistics_of(torch.cat(made)))
    return {protocol.features.value.lower().replace("-", "_"): distance, "fd_num_images": float(num_images)}


def _batches(images: ImageLoader, num_rows: int) -> Iterator[Image]:
    for start in range(0, num_rows, BATCH):
        yield images.rows(start, min(start + BATCH, num_rows)).images


def _image_size(latents: Manifest, wanted: tuple[int, int]) -> int:
    """Return the image size of a cache whose square latents have the wanted size."""
    sizes = {shape["image_size"] for shape in latents.summary["shapes"]}
    return next(size for size in sorted(sizes) if latent_size(latents, size) == wanted)


def _placed(batch: LatentBatch, device: torch.device) -> LatentBatch:
    return LatentBatch(
        keys=batch.keys,
        samples=batch.samples,
        moments=batch.moments.to(device, torch.float32),
        condition=batch.condition.to(device, torch.float32),
    )
