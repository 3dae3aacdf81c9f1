"""Autoencoders in the layout of CompVis' checkpoints: one file, whose names and shapes differ from diffusers'.

    encoder.down.L.block.I.nin_shortcut     encoder.down_blocks.L.resnets.I.conv_shortcut
    encoder.down.L.attn.I.{norm,q,k,v}      encoder.down_blocks.L.attentions.I.{group_norm,to_q,to_k,to_v}
    decoder.up.L ...                        decoder.up_blocks.(last - L) ...         finest is 0 there, last here
    *.mid.{block_1,attn_1,block_2}          *.mid_block.{resnets.0,attentions.0,resnets.1}

Attention is of 1x1 convolutions there, (c, c, 1, 1), and of linear maps here, (c, c). The file is the autoencoder's own
or a whole latent diffusion model's (`first_stage_model.*`). The shape is read from the YAML where there is one, else
from the tensors, which tell all of it but what `INVISIBLE` names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.autoencoder.model import IMAGE_CHANNELS, Autoencoder, AutoencoderConfig, quantized
from ldm.interop.weights import fill, load_weights

logger = logging.getLogger(__name__)

FIRST_STAGE = "first_stage_model."
NORM_GROUPS = 32
"""Of every normalisation of that layout; no file says so."""
TRAINING_ONLY = ("loss.", "model_ema.")
"""Names of a checkpoint that are no part of the network: discriminator and perceptual net, and averaged weights."""
INVISIBLE = "32 groups a normalisation, no tanh behind the decoder, attention over pixels of one head"
"""What a checkpoint without YAML is taken to have, since its tensors are the same either way."""

DDCONFIG_CONSTANTS: dict[str, tuple[Any, ...]] = {
    "in_channels": (IMAGE_CHANNELS,),
    "out_ch": (IMAGE_CHANNELS,),
    "resamp_with_conv": (True,),
    "give_pre_end": (False,),
    "tanh_out": (False,),
    "use_linear_attn": (False,),
    "attn_type": ("vanilla", "vanilla-xformers", "none"),
}
"""What our networks can be; a YAML may leave a fact out (the first one is the layout's default)."""

_PARTS = (
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"(\.attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(\.attentions\.\d+\.)([qkv])\.", r"\1to_\2."),
    (r"(\.attentions\.\d+\.)proj_out\.", r"\1to_out.0."),
)


def load_autoencoder(path: str, config_text: str = "", origin: str = "") -> Autoencoder:
    """Return the autoencoder of a checkpoint, KL or VQ, as float32 on the CPU.

    Args:
        path: the checkpoint, `.safetensors`, or `.ckpt` or `.pt` that holds nothing but tensors.
        config_text: the YAML it was trained with; empty reads the shape from the tensors.
        origin: where the file came from, if `path` is a copy, for what is said of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, runs code, or holds no autoencoder that ours can be, naming what differs.
    """
    named, origin = load_weights(path, FIRST_STAGE), origin or path
    weights = {name: tensor for name, tensor in named.items() if not name.startswith(TRAINING_ONLY)}
    if any(name.startswith("model_ema.encoder") for name in named):
        logger.warning("%s also holds averaged weights of the autoencoder; the plain ones are taken", origin)
    if "encoder.conv_in.weight" not in weights:
        raise ValueError(
            f"{origin} holds no autoencoder in the layout of CompVis: no encoder.conv_in.weight, with or without "
            f"{FIRST_STAGE} before it, among its {len(named)} names, such as {', '.join(sorted(named)[:3])}"
        )
    if config_text:
        config = config_of_yaml(config_text, origin)
    else:
        config = config_of_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, origin)
        _say_what_is_unknown(origin)
    with torch.device("meta"):
        model = Autoencoder(config)
    last = len(config.widths) - 1
    fill(model, {renamed(name, last): _linear(name, tensor) for name, tensor in weights.items()}, origin)
    return model


@cache
def _say_what_is_unknown(origin: str) -> None:
    """Say it once in a process, however often the checkpoint is loaded."""
    logger.warning(
        "%s has no YAML beside it: its shape is read from its tensors, which do not show that it has what is taken for "
        "granted: %s",
        origin,
        INVISIBLE,
    )


def renamed(name: str, last_level: int) -> str:
    """Return our name of a tensor; levels of the decoder are counted from the other end."""
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda found: f"decoder.up_blocks.{last_level - int(found[1])}.", name)
    for theirs, ours in _PARTS:
        name = re.sub(theirs, ours, name)
    return name


def config_of_yaml(text: str, origin: str) -> AutoencoderConfig:
    """Return the shape that a training's YAML describes, of the autoencoder alone or of a latent diffusion model.

    Raises:
        ValueError: if it describes none, or one that ours can't be, naming `origin` and what differs.
    """
    try:
        model = _mapping(_mapping(yaml.safe_load(text)).get("model"))
    except yaml.YAMLError as error:
        raise ValueError(f"{origin}: what lies beside it is no YAML: {error}") from error
    outer = _mapping(model.get("params"))
    if "first_stage_config" in outer:
        model = _mapping(outer["first_stage_config"])
    params = _mapping(model.get("params"))
    ddconfig = _mapping(params.get("ddconfig"))
    needed = ("ch", "ch_mult", "num_res_blocks", "z_channels")
    missing = [f"ddconfig.{name}" for name in needed if name not in ddconfig]
    missing += [name for name in ("embed_dim",) if name not in params]
    if missing:
        raise ValueError(
            f"{origin}: its YAML must describe the autoencoder under model.params, or under first_stage_config there; "
            f"it lacks {', '.join(missing)}"
        )
    for name, possible in DDCONFIG_CONSTANTS.items():
        if ddconfig.get(name, possible[0]) not in possible:
            raise ValueError(f"{origin}: ddconfig.{name} must be {_choices(possible)}, got {ddconfig[name]!r}")
    is_vq = "n_embed" in params
    if bool(ddconfig.get("double_z", True)) is is_vq:
        raise ValueError(f"{origin}: double_z goes with KL and n_embed with VQ, got {sorted(params)} and {ddconfig}")
    return _config(
        z_channels=int(ddconfig["z_channels"]),
        embed_dim=int(params["embed_dim"]),
        num_codes=int(params["n_embed"]) if is_vq else 0,
        widths=[int(ddconfig["ch"]) * int(mult) for mult in ddconfig["ch_mult"]],
        num_res_blocks=int(ddconfig["num_res_blocks"]),
        attention_factors=_attention_factors(ddconfig, origin),
        mid_attention=ddconfig.get("attn_type") != "none",
        origin=origin,
    )


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]], origin: str) -> AutoencoderConfig:
    """Return the shape that an autoencoder's tensors show; for what they don't see `INVISIBLE`.

    Raises:
        ValueError: if they aren't those of an autoencoder in this layout, naming `origin` and what is missing.
    """
    try:
        z_channels = shapes["decoder.conv_in.weight"][1]
        embed_dim = shapes["post_quant_conv.weight"][1]
        encoded = shapes["encoder.conv_out.weight"][0]
        codebook = shapes.get("quantize.embedding.weight")
        num_levels = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"encoder\.down\.(\d+)\.", name)))
        levels = range(num_levels)
        widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{origin} has no YAML beside it, and its tensors show no autoencoder: {error}") from error
    expected = z_channels if codebook else 2 * z_channels
    if encoded != expected:
        raise ValueError(
            f"{origin}: an encoder of {'VQ' if codebook else 'KL'} ends with {expected} channels, got {encoded}"
        )
    attends = [level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in shapes]
    return _config(
        z_channels=z_channels,
        embed_dim=embed_dim,
        num_codes=codebook[0] if codebook else 0,
        widths=widths,
        num_res_blocks=sum(f"encoder.down.0.block.{i}.conv1.weight" in shapes for i in range(len(shapes))),
        attention_factors=tuple(1 << level for level in attends),
        mid_attention="encoder.mid.attn_1.q.weight" in shapes,
        origin=origin,
    )


def _config(
    *,
    z_channels: int,
    embed_dim: int,
    num_codes: int,
    widths: list[int],
    num_res_blocks: int,
    attention_factors: tuple[int, ...],
    mid_attention: bool,
    origin: str,
) -> AutoencoderConfig:
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{origin}: widths of levels must be multiples of the first, got {widths}")
    shape = AutoencoderConfig(
        latent_channels=z_channels,
        base_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=num_res_blocks,
        mid_attention=mid_attention,
        norm_groups=NORM_GROUPS,
        attention_factors=attention_factors,
    )
    if num_codes:
        return quantized(shape, num_codes=num_codes, code_channels=embed_dim)
    if embed_dim != z_channels:
        raise ValueError(f"{origin}: embed_dim must be z_channels for KL, got {embed_dim} and {z_channels}")
    return shape


def _attention_factors(ddconfig: Mapping[str, Any], origin: str) -> tuple[int, ...]:
    """Return the levels whose resolution is listed: level L of images of `resolution` has resolution // 2^L."""
    listed = set(ddconfig.get("attn_resolutions") or ())
    if not listed or ddconfig.get("attn_type") == "none":
        return ()
    if "resolution" not in ddconfig:
        raise ValueError(f"{origin}: its YAML lacks ddconfig.resolution, which attn_resolutions are measured by")
    resolution = int(ddconfig["resolution"])
    return tuple(1 << level for level in range(len(ddconfig["ch_mult"])) if resolution >> level in listed)


def _linear(name: str, tensor: Tensor) -> Tensor:
    """Return a 1x1 convolution's weight as the linear map that it is, where ours is one: inside attention."""
    is_attention = re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) is not None
    return tensor[:, :, 0, 0] if is_attention and tensor.shape[2:] == (1, 1) else tensor


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}


def _choices(possible: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, possible))
