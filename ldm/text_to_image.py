"""A whole text-to-image model: the folder that a training leaves and what turns prompts into images.

    model/   model.json (how the parts fit), unet/ and vae/ (config and safetensors, in the layout of diffusers),
             conditioner/ (where a condition is read by weights that were trained with the unet)

Order: prompts → token states → guided denoising of seeded noise → raw latent → decoder → pixels.

Letters: n number of prompts, b batch, c latent channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8

from ldm import storage
from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.regularizer import LatentKind
from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.rows import null_condition
from ldm.conditioning.text import TextEncoder, TextEncoderConfig, text_encoder_digest
from ldm.conditioning.text_embedding import condition_of, numbered_condition
from ldm.config import Config, added_later, digest_of
from ldm.denoiser import denoiser_digests, load_denoiser, unet_config
from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.interop.diffusers import load_autoencoder, weights_digest
from ldm.latents import LatentSpace
from ldm.samplers.guidance import Network, guided_denoiser
from ldm.samplers.sample import SamplerConfig, initial_noise, sample, step_noise
from ldm.types import Condition, Image, Latent

MODEL_FILE = "model.json"
AUTOENCODER_FOLDER = "vae"
KEPT_FOLDER = "models"
"""Beside a model folder: models that it held before, by digest."""
FORMAT = 1

Pixels = UInt8[np.ndarray, "n y x 3"]


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


class TextToImage:
    """A loaded model.

    Args:
        unet: the denoiser, any network of its signature.
        autoencoder: what decodes its latents.
        text_encoder: what its prompts go through.
        card: how they fit together.
        device: where they lie.
    """

    def __init__(
        self,
        *,
        unet: Network,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        card: ModelCard,
        device: torch.device,
    ) -> None:
        self.card = card
        self._unet = unet
        self._autoencoder = autoencoder
        self._text_encoder = text_encoder
        self._schedule = Schedule(card.schedule)
        self.device = device

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance: Sequence[float] | None = None,
        sampler: SamplerConfig | None = None,
        batch_size: int = 16,
        on_images: Callable[[int], None] | None = None,
    ) -> Pixels:
        """Return one image for each prompt.

        Args:
            prompts: n texts.
            seeds: n seeds; an image depends on its own prompt, seed and guidance, not on the others.
            guidance: n guidance scales; the card's where not given.
            sampler: how to sample; the card's where not given.
            batch_size: images sampled together.
            on_images: called with the number of images done.

        Raises:
            ValueError: for no prompts, or another number of seeds or scales than of prompts.
        """
        if not prompts:
            raise ValueError("there are no prompts to draw")
        scales = list(guidance) if guidance is not None else [self.card.guidance] * len(prompts)
        if not len(prompts) == len(seeds) == len(scales):
            raise ValueError(
                f"prompts, seeds and guidance must be equally many, got {len(prompts)}, {len(seeds)} and {len(scales)}"
            )
        condition = self.condition(prompts)
        parts: list[Pixels] = []
        for start in range(0, len(prompts), batch_size):
            stop = min(start + batch_size, len(prompts))
            images = self.images(
                condition.rows(start, stop), seeds[start:stop], scales[start:stop], sampler or self.card.sampler
            )
            parts.append(pixels_of(images))
            if on_images is not None:
                on_images(stop)
        return np.concatenate(parts)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Return the prompts as the denoiser sees them."""
        encoder = self._text_encoder
        match self.card.conditioning.text:
            case TextUse.FROZEN:
                told = condition_of(encoder.encode(list(prompts)), encoder.max_tokens)
            case TextUse.TRAINED:
                told = numbered_condition(encoder.token_ids(list(prompts)), encoder.max_tokens)
            case TextUse.NONE:
                told = Condition()
        return told.to(self.device, torch.float32)

    @torch.no_grad()
    def images(
        self, condition: Condition, seeds: Sequence[int], scales: Sequence[float], sampler: SamplerConfig
    ) -> Image:
        """Return one batch of images, shape (b, 3, y, x), about in [-1, 1]."""
        latent = self.latents(condition, seeds, scales, sampler)
        image: Image = self._autoencoder.decode(self.card.space.unscaled(latent))
        return image

    @torch.no_grad()
    def latents(
        self, condition: Condition, seeds: Sequence[int], scales: Sequence[float], sampler: SamplerConfig
    ) -> Latent:
        """Return one batch of scaled latents, shape (b, c, h, w)."""
        size = self.card.latent_size if condition.spatial is None else condition.spatial.shape[-2:]
        shape = (self.card.space.num_channels, int(size[0]), int(size[1]))
        denoise = guided_denoiser(
            self._unet,
            self._schedule,
            self.card.prediction,
            condition,
            null_condition(self.card.conditioning, condition, self.condition([""])),
            torch.tensor(scales, device=self.device),
        )
        # The seed is the row's place in the stream of noises: one image does not move with its batch.
        noise = initial_noise(0, seeds, shape).to(self.device)
        return sample(denoise, noise, self._schedule, sampler, step_noise(0, seeds, shape))


def pixels_of(images: Image) -> Pixels:
    """Return uint8 pixels, channels last, of images in [-1, 1]."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: Pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return pixels


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


def load_text_to_image(folder: str, device: torch.device) -> TextToImage:
    """Return the model in a folder or at a URL.

    Raises:
        ValueError: if a part is missing or is not the one that the description names, showing both digests.
    """
    card = load_card(folder)
    denoiser = load_denoiser(folder, card.conditioning)
    autoencoder = load_autoencoder(storage.join(folder, AUTOENCODER_FOLDER))
    unet, conditioner = denoiser_digests(unet_config(denoiser), card.conditioning, denoiser.state_dict())
    found = {
        "unet": (card.unet_digest, unet),
        "conditioner": (card.conditioner_digest, conditioner),
        "autoencoder": (card.autoencoder_digest, weights_digest(autoencoder.state_dict(), autoencoder.config)),
        "text encoder": (card.text_digest, text_encoder_digest(card.text)),
    }
    _refuse_other_parts(found, folder)
    return TextToImage(
        unet=denoiser.to(device).eval().requires_grad_(False),
        autoencoder=autoencoder.to(device).eval().requires_grad_(False),
        text_encoder=TextEncoder(card.text, device),
        card=card,
        device=device,
    )


def _refuse_other_parts(found: Mapping[str, tuple[str, str]], folder: str) -> None:
    for part, (named, there) in found.items():
        if named != there:
            raise ValueError(f"{folder} names {part} {named}, but what is there has digest {there}")
