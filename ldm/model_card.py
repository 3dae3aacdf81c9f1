"""The folder that a training leaves, and the description of how its parts fit together.

model/   model.json (how the parts fit), unet/ and vae/ (config and safetensors, in the layout of diffusers),
conditioner/ (where a condition is read by weights that were trained with the unet)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from ldm import storage
from ldm.autoencoder.regularizer import LatentKind
from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.text import TextEncoderConfig
from ldm.config import Config, added_later, digest_of
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import ScheduleConfig
from ldm.latents import LatentSpace
from ldm.samplers.sample import SamplerConfig

MODEL_FILE = "model.json"
AUTOENCODER_FOLDER = "vae"
KEPT_FOLDER = "models"
"""Beside a model folder: models that it held before, by digest."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard(Config):
    """How the parts of a model fit together, and what it was made of."""

    format: int = FORMAT
    """Version of this description."""
    unet_digest: str
    """Digest of the denoiser's weights and configuration."""
    autoencoder_digest: str
    """Digest of the autoencoder's weights and configuration."""
    text: TextEncoderConfig
    """The text encoder, by kind and path."""
    text_digest: str
    """Digest of the text encoder's weights."""
    schedule: ScheduleConfig
    """The noise schedule of the training."""
    prediction: Prediction
    """What the denoiser puts out."""
    latent_mean: tuple[float, ...]
    """Mean of the raw latents, a number for each channel."""
    latent_std: tuple[float, ...]
    """Standard deviation of the raw latents, a number for each channel."""
    latent_size: tuple[int, int]
    """Rows and columns of the latents that it was trained on."""
    sampler: SamplerConfig
    """How it is sampled if nothing else is said."""
    guidance: float
    """Guidance scale if nothing else is said."""
    lineage: dict[str, str]
    """Digests and addresses of what it was made of: dataset, latents, configuration, code."""
    latent_kind: LatentKind = added_later(LatentKind.KL_MOMENTS)
    """What the moments are that it was trained on."""
    conditioning: ConditioningConfig = added_later(ConditioningConfig())
    """What the denoiser is told."""
    conditioner_digest: str = added_later("")
    """Digest of the weights that read conditions; empty where no condition is trained."""

    @property
    def space(self) -> LatentSpace:
        """Raw and scaled latents."""
        return LatentSpace(mean=self.latent_mean, std=self.latent_std, kind=self.latent_kind)


def save_card(card: ModelCard, folder: str) -> None:
    """Publish the description of a model whose networks already lie in the folder."""
    storage.write_text(storage.join(folder, MODEL_FILE), json.dumps(card.to_dict(), indent=1))


def keep_model(folder: str) -> None:
    """Copy the model that is about to be replaced to `models/DIGEST` beside it, where `find_model` finds it."""
    if not storage.exists(storage.join(folder, MODEL_FILE)):
        return
    kept = _kept(folder, model_digest(load_card(folder)))
    if storage.exists(storage.join(kept, MODEL_FILE)):
        return
    for name in sorted(storage.list_files(folder), key=lambda name: name == MODEL_FILE):  # it makes the folder whole
        storage.copy_file(storage.join(folder, name), storage.join(kept, name))


def find_model(folder: str, digest: str) -> str:
    """Return where the model of this digest lies: in the folder, or among those that it held before.

    Raises:
        ValueError: if it is in neither, showing what lies in the folder.
    """
    places = [place for place in (folder, _kept(folder, digest)) if storage.exists(storage.join(place, MODEL_FILE))]
    found = {model_digest(load_card(place)): place for place in reversed(places)}
    if digest not in found:
        raise ValueError(f"{folder} was registered as model {digest}, now there lies {next(iter(found), 'none')}")
    return found[digest]


def _kept(folder: str, digest: str) -> str:
    return storage.join(folder.rstrip("/").rpartition("/")[0], KEPT_FOLDER, digest[:16])


def load_card(folder: str) -> ModelCard:
    """Return the description of the model in a folder.

    Raises:
        ValueError: if there is none, or it is of another format.
    """
    path = storage.join(folder, MODEL_FILE)
    if not storage.exists(path):
        raise ValueError(f"{folder} holds no model: it has no {MODEL_FILE}. Train one with jobs/train_ldm.py")
    card = ModelCard.from_yaml(storage.read_text(path))  # JSON is YAML
    if card.format != FORMAT:
        raise ValueError(f"{path} has format {card.format}, this code reads {FORMAT}")
    return card


def model_digest(card: ModelCard) -> str:
    """Return what identifies a model for use: its weights and how they fit, not what it was made of."""
    return digest_of(replace(card, lineage={}).to_dict())
