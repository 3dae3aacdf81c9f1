"""Networks in the folder layout of diffusers: `config.json` beside `diffusion_pytorch_model.safetensors`.

Parameter names are the same on both sides, so only the config is translated; what our networks cannot be is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ldm.autoencoder.model import IMAGE_CHANNELS, Autoencoder, AutoencoderConfig, quantized
from ldm.autoencoder.regularizer import Regularizer
from ldm.config import Config
from ldm.interop.diffusers_unet import (
    NEEDED,
    UNET_CONSTANTS,
    Facts,
    base_and_mult,
    refuse_other,
    unet_config,
    unet_facts,
)
from ldm.interop.weights import (
    check_weights,
    digest_of_weights,
    fill,
    load_weights,
    safetensors_files,
    save_weights,
)
from ldm.storage import exists, join, read_text, write_text
from ldm.unet.model import UNet, UNetConfig

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHTS_NAME = f"{WEIGHTS_STEM}.safetensors"
PICKLE_NAME = f"{WEIGHTS_STEM}.bin"
"""The weights of folders from before safetensors."""

KL_CLASS, VQ_CLASS = "AutoencoderKL", "VQModel"
_IMAGES: Facts = {"act_fn": "silu", "in_channels": IMAGE_CHANNELS, "out_channels": IMAGE_CHANNELS}
AUTOENCODER_CONSTANTS: dict[str, Facts] = {
    KL_CLASS: {**_IMAGES, "use_quant_conv": True, "use_post_quant_conv": True},
    VQ_CLASS: {**_IMAGES, "lookup_from_codebook": False, "norm_type": "group"},
}
OLD_ATTENTION_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of plain attention in files from before 2023, such as Stable Diffusion 1.5's, and what they are now."""


def save_autoencoder(model: Autoencoder, folder: str) -> None:
    """Publish an autoencoder's config and weights."""
    save_weights(model.state_dict(), join(folder, WEIGHTS_NAME))
    _write_facts(_autoencoder_facts(model.config), folder)


def load_autoencoder(folder: str) -> Autoencoder:
    """Return the autoencoder that a folder holds, KL or VQ, as float32 on the CPU.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        ValueError: if it holds another network, or a part of one, naming what differs.
    """
    return _autoencoder(join(folder, CONFIG_NAME), partial(_weights_in, folder), folder)


def load_autoencoder_files(config_path: str, weights_path: str, *, origin: str) -> Autoencoder:
    """Return the autoencoder of two files, which need not lie together; errors name it by `origin`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if they hold another network, or a part of one, naming what differs.
    """
    return _autoencoder(config_path, partial(load_weights, weights_path), origin)


def weights_path(folder: str) -> str:
    """Return where a folder's weights lie: safetensors where there are any, else a pickle."""
    pickled = join(folder, PICKLE_NAME)
    return pickled if not exists(join(folder, WEIGHTS_NAME)) and exists(pickled) else join(folder, WEIGHTS_NAME)


def save_unet(config: UNetConfig, weights: Mapping[str, Tensor], folder: str) -> None:
    """Publish a UNet's config and weights, which may be averaged ones.

    Raises:
        ValueError: if the weights are not those of a UNet of this config, or no class of diffusers can be it.
    """
    facts = unet_facts(config)
    with torch.device("meta"):
        check_weights(UNet(config), weights, "the mapping to save")
    save_weights(weights, join(folder, WEIGHTS_NAME))
    _write_facts(facts, folder)


def load_unet(folder: str) -> UNet:
    """Return the UNet that a folder holds, as float32 on the CPU.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        ValueError: if it holds another network, or a part of one, naming what differs.
    """
    facts = _read_facts(join(folder, CONFIG_NAME), folder, UNET_CONSTANTS)
    with torch.device("meta"):
        model = UNet(unet_config(facts, folder))
    fill(model, _renamed(_weights_in(folder)), folder)
    return model


def weights_digest(weights: Mapping[str, Tensor], config: Config) -> str:
    """Return what identifies a trained network: the sha256 over its config and every tensor.

    How activations are kept changes nothing a network computes, so it is left out.
    """
    if isinstance(config, UNetConfig):
        config = dataclasses.replace(config, checkpoint_activations=False)
    return digest_of_weights(weights, config.digest())


def _autoencoder_facts(config: AutoencoderConfig) -> Facts:
    class_name, own = _regularizer_facts(config)
    down, up = _block_types(config.factors, config.attention_factors)
    return {
        "_class_name": class_name,
        **AUTOENCODER_CONSTANTS[class_name],
        **own,
        "block_out_channels": list(config.widths),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        # Our latents are scaled outside of the autoencoder.
        "scaling_factor": 1.0,
    }


def _regularizer_facts(config: AutoencoderConfig) -> tuple[str, Facts]:
    match config.regularizer:
        case Regularizer.KL:
            return KL_CLASS, {"latent_channels": config.latent_channels}
        case Regularizer.VQ:  # where the layout says latent_channels it means those before quant_conv
            return VQ_CLASS, {
                "latent_channels": config.encoded_channels,
                "vq_embed_dim": config.latent_channels,
                "num_vq_embeddings": config.num_codes,
            }


def _block_types(factors: Sequence[int], attention_factors: Sequence[int]) -> tuple[list[str], list[str]]:
    attends = [factor in attention_factors for factor in factors]
    down = ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attends]
    return down, ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attends)]


def _autoencoder_config(facts: Facts, folder: str) -> AutoencoderConfig:
    base, mult = base_and_mult(facts, folder)
    named = enumerate(facts["down_block_types"])
    attention_factors = tuple(1 << level for level, name in named if name == "AttnDownEncoderBlock2D")
    down, up = _block_types([1 << level for level in range(len(mult))], attention_factors)
    refuse_other(folder, "down_block_types", facts["down_block_types"], down)
    refuse_other(folder, "up_block_types", facts["up_block_types"], up)
    shape = AutoencoderConfig(
        latent_channels=facts["latent_channels"],
        base_channels=base,
        channel_mult=mult,
        num_res_blocks=facts["layers_per_block"],
        mid_attention=facts.get("mid_block_add_attention", True),
        norm_groups=facts.get("norm_num_groups", 32),
        attention_factors=attention_factors,
    )
    if facts["_class_name"] == KL_CLASS:
        return shape
    return quantized(shape, num_codes=facts.get("num_vq_embeddings", 256), code_channels=facts.get("vq_embed_dim"))


def _write_facts(facts: Facts, folder: str) -> None:
    write_text(join(folder, CONFIG_NAME), json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _read_facts(path: str, folder: str, constants_of_class: Mapping[str, Facts]) -> Facts:
    try:
        facts = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(facts).__name__}")
    class_name = str(facts.get("_class_name"))
    if class_name not in constants_of_class:
        known = " or ".join(map(repr, constants_of_class))
        raise ValueError(f"{folder}: _class_name must be {known}, got {class_name!r}")
    for name, expected in constants_of_class[class_name].items():
        refuse_other(folder, name, facts.get(name, expected), expected)
    needed = ["block_out_channels", "down_block_types", "up_block_types", "layers_per_block"]
    needed += NEEDED.get(class_name, ("latent_channels",))
    missing = [name for name in needed if name not in facts]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return facts


def _autoencoder(config_path: str, read_weights: Callable[[], Mapping[str, Tensor]], origin: str) -> Autoencoder:
    facts = _read_facts(config_path, origin, AUTOENCODER_CONSTANTS)
    with torch.device("meta"):
        model = Autoencoder(_autoencoder_config(facts, origin))
    fill(model, _renamed(read_weights()), origin)  # the config is judged first: it says what is wrong sooner
    return model


def _weights_in(folder: str) -> dict[str, Tensor]:
    """Return a folder's weights, in one file or several, of a variant where there are no others."""
    files = safetensors_files(folder, WEIGHTS_STEM) or [weights_path(folder)]
    return {name: tensor for path in files for name, tensor in load_weights(path).items()}


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        for old, new in OLD_ATTENTION_NAMES.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found
