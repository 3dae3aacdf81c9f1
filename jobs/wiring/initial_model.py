"""The finished model that a stage-2 training begins with: what must be equal, its weights, its latents' scale.

A network makes sense of latents, captions and noise as it was trained on them. So autoencoder, text encoder, schedule
and prediction must be the model's own, and its statistics of latents take the place of the cache's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.config import Config
from ldm.denoiser import build_denoiser, denoiser_digests, load_denoiser, unet_config
from ldm.interop.weights import fill
from ldm.latents import LatentSpace
from ldm.model_card import ModelCard, load_card, model_digest
from ldm.storage import is_same_place
from ldm.training.diffusion_task import ObjectiveConfig
from ldm.training.page import DataInput
from ldm.unet.model import UNetConfig
from pipeline.latent_summary import latent_space
from pipeline.store.manifest import Manifest

_SHOWN_DIGITS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialModel:
    """A finished model and where it lies.

    Attributes:
        folder: folder or URL.
        card: its description.
    """

    folder: str
    card: ModelCard

    @property
    def digest(self) -> str:
        """What identifies it."""
        return model_digest(self.card)

    def lineage(self) -> dict[str, str]:
        """Return what a model that was trained on from it says of it."""
        return {"initial_uri": self.folder, "initial_digest": self.digest}


class Beginning(Protocol):
    """What of a training's configuration a model can be the beginning of."""

    @property
    def initial(self) -> str:
        """Folder or URL of the model; empty for none."""
        ...

    @property
    def model_folder(self) -> str:
        """Where the training leaves its own."""
        ...

    @property
    def unet(self) -> UNetConfig:
        """The denoiser."""
        ...

    @property
    def conditioning(self) -> ConditioningConfig:
        """What it is told."""
        ...

    @property
    def objective(self) -> ObjectiveConfig:
        """What it learns."""
        ...


def initial_model(config: Beginning) -> InitialModel | None:
    """Return the model that a training begins with; None for drawn weights.

    Raises:
        ValueError: if there is none, or it lies where the training's own model will.
    """
    if not config.initial:
        return None
    if is_same_place(config.initial, config.model_folder):
        raise ValueError(f"initial {config.initial} is where this training's own model will lie: take another --root")
    return InitialModel(folder=config.initial, card=load_card(config.initial))


def check_initial(initial: InitialModel, config: Beginning, manifest: Manifest) -> None:
    """Refuse a training that the model is not the beginning of.

    Raises:
        ValueError: naming everything that differs, there and here, or a weight that is not the model's.
    """
    card = initial.card
    facts: dict[str, tuple[object, object]] = {
        "objective.prediction": (card.prediction.value, config.objective.prediction.value),
        "autoencoder": (card.autoencoder_digest, manifest.identity["autoencoder"]),
        "latent_kind": (card.latent_kind.value, manifest.identity["latent_kind"]),
    }
    if card.conditioning.text is not TextUse.NONE:
        facts["text encoder"] = card.text_digest, manifest.identity["text_encoder"]
        facts["max_tokens"] = card.text.max_tokens, manifest.identity["max_tokens"]
    differing = [f"{name} {there!r} there, {here!r} here" for name, (there, here) in facts.items() if there != here]
    differing += _differing("objective.schedule", card.schedule, config.objective.schedule)
    differing += _differing("conditioning", _undropped(card.conditioning), _undropped(config.conditioning))
    if not differing:
        differing += _differing("unet", _plain(unet_config(_network(initial))), _plain(config.unet))
    if differing:
        raise ValueError(f"initial {initial.folder} is another model than this training's: {'; '.join(differing)}")


def first_network(initial: InitialModel | None, unet: UNetConfig, conditioning: ConditioningConfig) -> nn.Module:
    """Return the network that a training begins with, as float32 on the CPU: the model's, or one with drawn weights.

    Raises:
        ValueError: if the model's weights are not those that it names, or of another shape.
    """
    if initial is None:
        return build_denoiser(unet, conditioning)
    with torch.device("meta"):
        network = build_denoiser(unet, conditioning)
    fill(network, _network(initial).state_dict(), initial.folder)
    return network


def trained_space(initial: InitialModel | None, manifest: Manifest) -> LatentSpace:
    """Return raw and scaled latents of a training: the model's that it begins with, or else the cache's own."""
    return latent_space(manifest) if initial is None else initial.card.space


def initial_notice(initial: InitialModel, manifest: Manifest) -> str:
    """Return the sentence that says what a training begins with, and whose statistics scale its latents."""
    own, cached = initial.card.space, latent_space(manifest)
    begun = f"begins with the weights of model {initial.digest[:12]} in {initial.folder}"
    if own == cached:
        return begun
    return (
        f"{begun}, and scales latents by its mean {_shown(own.mean)} and deviation {_shown(own.std)}; "
        f"those of the cache, {_shown(cached.mean)} and {_shown(cached.std)}, are not used"
    )


def initial_inputs(initial: InitialModel | None) -> list[DataInput]:
    """Return the model as one of the things that a run was fed; none without it."""
    if initial is None:
        return []
    return [DataInput(name="initial model", uri=initial.folder, digest=initial.digest, context="initial", profile={})]


def _network(initial: InitialModel) -> nn.Module:
    card = initial.card
    network = load_denoiser(initial.folder, card.conditioning)
    found = denoiser_digests(unet_config(network), card.conditioning, network.state_dict())
    named = card.unet_digest, card.conditioner_digest
    if found != named:
        raise ValueError(f"initial {initial.folder} names weights {named}, but what is there has the digests {found}")
    return network


def _undropped(conditioning: ConditioningConfig) -> ConditioningConfig:
    """Return what a denoiser is told without how often it is not: that is of the training, not of the model."""
    return replace(conditioning, class_dropout=0.0, layout_dropout=0.0, map_dropout=0.0)


def _plain(unet: UNetConfig) -> UNetConfig:
    return replace(unet, checkpoint_activations=False)


def _differing(name: str, there: Config, here: Config) -> list[str]:
    """Return a part of a sentence for each field in which two configurations of one kind differ."""
    both = there.flat(), here.flat()
    names = sorted({*both[0], *both[1]})
    return [
        f"{name}.{field} {both[0].get(field, 'default')} there, {both[1].get(field, 'default')} here"
        for field in names
        if both[0].get(field) != both[1].get(field)
    ]


def _shown(numbers: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{number:.{_SHOWN_DIGITS}g}" for number in numbers) + ")"
