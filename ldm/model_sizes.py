"""Which sizes the model in a folder draws, from its configurations alone: no weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ldm.denoiser import OWN_CONFIG, UNET_FOLDER
from ldm.interop.diffusers import CONFIG_NAME
from ldm.model_card import AUTOENCODER_FOLDER, ModelCard
from ldm.storage import exists, join, read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """What a model draws.

    Attributes:
        trained: pixel rows and columns of the training.
        multiple: what pixel rows and columns must be multiples of.
    """

    trained: tuple[int, int]
    multiple: int


def model_sizes(folder: str, card: ModelCard) -> ModelSizes:
    """Return the sizes of the model that a card describes, as `TextToImage` has them once it is loaded."""
    factor = 2 ** (_num_levels(join(folder, AUTOENCODER_FOLDER)) - 1)
    shrinks = 2 ** (_num_levels(join(folder, UNET_FOLDER)) - 1)
    rows, columns = card.latent_size
    return ModelSizes(trained=(rows * factor, columns * factor), multiple=factor * shrinks)


def _num_levels(folder: str) -> int:
    """Return how many sizes a network's feature maps have: each level but the last halves their sides."""
    own = join(folder, OWN_CONFIG)
    if exists(own):
        return len(json.loads(read_text(own))["channel_mult"])
    return len(json.loads(read_text(join(folder, CONFIG_NAME)))["block_out_channels"])
