"""The network of stage 2: a UNet, and where a condition is read by trained weights, those beside it in one module.

folder/   unet/ (config and safetensors in the layout of diffusers; where that can't say the network's shape to the
last field, unet.json says it in our own words), conditioner/ (safetensors, where a condition is trained)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import ConditionalDenoiser, Conditioner, ConditioningConfig, TextUse
from ldm.interop.diffusers import WEIGHTS_NAME, load_unet, save_unet, weights_digest
from ldm.interop.diffusers_unet import has_class, is_said_whole
from ldm.interop.weights import check_weights, fill, load_weights, save_weights
from ldm.storage import exists, join, read_text, remove_file, write_text
from ldm.unet.model import UNet, UNetConfig

UNET_FOLDER = "unet"
OWN_CONFIG = "unet.json"
CONDITIONER_FOLDER = "conditioner"
CONDITIONER_FILE = "model.safetensors"
UNET_PREFIX = "unet."
CONDITIONER_PREFIX = "conditioner."


def build_denoiser(unet: UNetConfig, conditioning: ConditioningConfig) -> nn.Module:
    """Return a fresh network (noisy, timestep, condition) → output; a bare UNet where no condition is trained."""
    network = UNet(unet)
    if not conditioning.is_trained:
        return network
    return ConditionalDenoiser(network, _conditioner(unet, conditioning))


def check_denoiser(
    unet: UNetConfig,
    conditioning: ConditioningConfig,
    *,
    latent_channels: int,
    text_width: int,
    pooled_width: int | None,
) -> None:
    """Refuse a UNet that does not fit its latents and conditions.

    Raises:
        ValueError: with both numbers.
    """
    beside = conditioning.spatial_channels(latent_channels)
    if unet.in_channels != latent_channels + beside or unet.out_channels != latent_channels:
        raise ValueError(
            f"latents of {latent_channels} channels with {beside} beside them ask for a UNet of "
            f"{latent_channels + beside} input and {latent_channels} output channels, "
            f"got {unet.in_channels} and {unet.out_channels}"
        )
    if conditioning.text is TextUse.FROZEN and unet.context_width != text_width:
        raise ValueError(f"the latents have text of width {text_width}, the unet takes {unet.context_width}")
    if conditioning.has_states != (unet.context_width is not None):
        raise ValueError(
            f"conditions of {'tokens' if conditioning.has_states else 'no tokens'} ask for a UNet "
            f"{'with' if conditioning.has_states else 'without'} context_width, got {unet.context_width}"
        )
    if unet.num_levels != conditioning.noise_levels:
        raise ValueError(
            f"{conditioning.noise_levels} noise_levels of small pictures are told, the unet hears {unet.num_levels}"
        )
    has_vectors = unet.pooled_width is not None
    if conditioning.has_sizes != has_vectors or (has_vectors and unet.pooled_width != pooled_width):
        raise ValueError(
            f"has_sizes is {conditioning.has_sizes} and the text's vector is {pooled_width or 0} wide, "
            f"the unet takes sizes and a vector of width {unet.pooled_width or 0}: both or none"
        )


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the UNet and those of the conditioner, under their own names."""
    if not any(name.startswith(CONDITIONER_PREFIX) for name in weights):
        return dict(weights), {}
    parts = [
        {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        for prefix in (UNET_PREFIX, CONDITIONER_PREFIX)
    ]
    return parts[0], parts[1]


def denoiser_digests(
    unet: UNetConfig, conditioning: ConditioningConfig, weights: Mapping[str, Tensor]
) -> tuple[str, str]:
    """Return the digests of the UNet and of the conditioner; the latter's is empty where there is none."""
    own, trained = split_weights(weights)
    return weights_digest(own, unet), weights_digest(trained, conditioning) if trained else ""


def save_denoiser(
    unet: UNetConfig, conditioning: ConditioningConfig, weights: Mapping[str, Tensor], folder: str
) -> None:
    """Publish a network's weights, which may be averaged ones, in its folders."""
    own, trained = split_weights(weights)
    place = join(folder, UNET_FOLDER)
    remove_file(join(place, OWN_CONFIG))
    if has_class(unet):
        save_unet(unet, own, place)
    else:
        with torch.device("meta"):
            check_weights(UNet(unet), own, "the mapping to save")
        save_weights(own, join(place, WEIGHTS_NAME))
    if not is_said_whole(unet):
        write_text(join(place, OWN_CONFIG), json.dumps(unet.to_dict(), indent=1))
    if trained:
        save_weights(trained, _conditioner_path(folder))


def load_denoiser(folder: str, conditioning: ConditioningConfig) -> nn.Module:
    """Return the network in a folder, as float32 on the CPU.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        ValueError: if it holds another network, or a part of one, naming what differs.
    """
    unet = _load_unet(join(folder, UNET_FOLDER))
    if not conditioning.is_trained:
        return unet
    with torch.device("meta"):
        conditioner = _conditioner(unet.config, conditioning)
    path = _conditioner_path(folder)
    fill(conditioner, load_weights(path), path)
    return ConditionalDenoiser(unet, conditioner)


def unet_config(network: nn.Module) -> UNetConfig:
    """Return the shape of a network's UNet."""
    unet = network.unet if isinstance(network, ConditionalDenoiser) else network
    return cast(UNet, unet).config


def _load_unet(folder: str) -> UNet:
    if not exists(join(folder, OWN_CONFIG)):
        return load_unet(folder)
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_yaml(read_text(join(folder, OWN_CONFIG))))  # JSON is YAML
    fill(unet, load_weights(join(folder, WEIGHTS_NAME)), folder)
    return unet


def _conditioner(unet: UNetConfig, conditioning: ConditioningConfig) -> Conditioner:
    return Conditioner(conditioning, unet.context_width or 0)


def _conditioner_path(folder: str) -> str:
    return join(folder, CONDITIONER_FOLDER, CONDITIONER_FILE)
