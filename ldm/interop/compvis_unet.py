"""UNets in the layout of CompVis' and Stability's checkpoints: one file, whose blocks are numbered through.

    input_blocks.N.{0,1}             down_blocks.L.{resnets,attentions}.I      N counts conv_in, blocks and halvings
    input_blocks.N.0.op              down_blocks.L.downsamplers.0.conv         a residual block where those resize
    middle_block.{0,1,2}             mid_block.{resnets.0,attentions.0,resnets.1}
    output_blocks.N.{0,1,2}          up_blocks.L.{resnets,attentions}.I, upsamplers.0 behind a level's last
    *.{in,emb,out}_layers            norm1, conv1, time_emb_proj, norm2, conv2
    *.{norm,qkv,proj_out}            group_norm, to_q to_k to_v, to_out.0      plain attention: 1x1 convolutions of rows
    time_embed, label_emb, out       time_embedding, add_embedding, conv_norm_out conv_out

A whole latent diffusion model's file has `model.diffusion_model.` before the names, and averaged weights under
`model_ema.diffusion_model` and the names without their dots.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from itertools import count

import torch
from torch import Tensor

from ldm.interop.compvis_unet_config import (
    HeadOrder,
    check_expressible,
    config_of_params,
    config_of_shapes,
    head_order,
    params_of_yaml,
    yaml_of,
)
from ldm.interop.weights import check_shapes, check_weights, fill, load_weights, save_weights
from ldm.storage import write_text
from ldm.unet.attention import AttentionForm
from ldm.unet.blocks import Resampling
from ldm.unet.model import UNet, UNetConfig

NETWORK = "model.diffusion_model."
AVERAGED = "model_ema."
AVERAGED_NETWORK = "diffusion_model"
"""What the averaged names go on with."""

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLAIN = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


class WeightKind(StrEnum):
    """Which weights of a checkpoint."""

    TRAINED = "trained"
    """Those that the optimiser stepped."""
    AVERAGED = "averaged"
    """Their moving average."""


def load_unet(path: str, config_text: str = "", *, kind: WeightKind = WeightKind.TRAINED, origin: str = "") -> UNet:
    """Return the UNet of a checkpoint as float32 on the CPU.

    Args:
        path: the checkpoint, `.safetensors`, or `.ckpt` or `.pt` that holds nothing but tensors.
        config_text: the YAML it was trained with; empty reads the shape from the tensors of the trained weights.
        kind: the trained weights or the averaged ones.
        origin: where the file came from, if `path` is a copy, for what is said of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, runs code, or holds no UNet that ours can be, naming what differs.
    """
    origin = origin or path
    trained = load_weights(path, NETWORK)
    if "input_blocks.0.0.weight" not in trained:
        raise ValueError(
            f"{origin} holds no UNet in the layout of CompVis: no input_blocks.0.0.weight, with or without {NETWORK} "
            f"before it, among its {len(trained)} names, such as {', '.join(sorted(trained)[:3])}"
        )
    if config_text:
        params = params_of_yaml(config_text, origin)
        config, order = config_of_params(params, origin), head_order(params)
    else:
        config = config_of_shapes({name: tuple(tensor.shape) for name, tensor in trained.items()}, origin)
        order = HeadOrder.BY_HEAD
    with torch.device("meta"):
        model = UNet(config)
    expected = to_compvis(config, model.state_dict(), order)
    weights = trained if kind is WeightKind.TRAINED else _averaged(path, expected, origin)
    check_shapes(expected, weights, origin, "UNet")
    fill(model, from_compvis(config, weights, order), origin)
    return model


def save_unet(
    config: UNetConfig, weights: Mapping[str, Tensor], path: str, averaged: Mapping[str, Tensor] | None = None
) -> None:
    """Publish a UNet as one safetensors file, and the YAML that describes it beside, named alike.

    Args:
        config: its shape.
        weights: its trained weights, or the only ones.
        path: the file, `.safetensors`.
        averaged: its averaged weights, if the file shall hold both.

    Raises:
        ValueError: if the weights are not those of a UNet of this config, or it can't be one in that layout.
    """
    text = yaml_of(config)
    stem, dot, suffix = path.rpartition(".")
    if suffix != "safetensors":
        raise ValueError(f"a checkpoint is written as .safetensors, got {path}")
    with torch.device("meta"):
        network = UNet(config)
    for each in (weights, averaged) if averaged is not None else (weights,):
        check_weights(network, each, "the mapping to save")
    named = {NETWORK + name: tensor for name, tensor in to_compvis(config, weights).items()}
    if averaged is not None:
        named |= {_flat(name): tensor for name, tensor in to_compvis(config, averaged).items()}
    save_weights(named, path)
    write_text(f"{stem}{dot}yaml", text)


def to_compvis(
    config: UNetConfig, weights: Mapping[str, Tensor], order: HeadOrder = HeadOrder.BY_HEAD
) -> dict[str, Tensor]:
    """Return a UNet's tensors by that layout's names.

    Raises:
        ValueError: if it can't be a UNet of that layout.
    """
    check_expressible(config)
    modules, heads = _modules(config), _heads(config)
    named = {}
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        theirs, plain = _theirs(modules, owner), _plain_owner(config, owner)
        if owner.endswith(".to_q") and plain:
            parts = [weights[f"{plain}.to_{part}.{leaf}"] for part in "qkv"]
            tensor = _joined(parts, heads[plain.split(".attentions")[0]], order)
        elif plain and owner.endswith((".to_k", ".to_v")):
            continue
        is_conv = plain and leaf == "weight" and not owner.endswith("group_norm")
        named[f"{theirs}.{leaf}"] = tensor[:, :, None] if is_conv else tensor
    return named


def from_compvis(config: UNetConfig, weights: Mapping[str, Tensor], order: HeadOrder) -> dict[str, Tensor]:
    """Return a UNet's tensors by our names from all that the layout has of it, whose shapes were checked."""
    modules, heads = _modules(config), _heads(config)
    with torch.device("meta"):
        names = list(UNet(config).state_dict())
    named = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        tensor, plain = weights[f"{_theirs(modules, owner)}.{leaf}"], _plain_owner(config, owner)
        if plain and tensor.dim() == 3:
            tensor = tensor[:, :, 0]
        if plain and owner.endswith((".to_q", ".to_k", ".to_v")):
            tensor = _split(tensor, heads[plain.split(".attentions")[0]], order)["qkv".index(owner[-1])]
        named[name] = tensor
    return named


def _modules(config: UNetConfig) -> dict[str, str]:
    """Return that layout's place of each of our blocks."""
    places, last = dict(_OUTER), len(config.widths) - 1
    number = count(1)
    for level in range(last + 1):
        ours = f"down_blocks.{level}"
        for index in range(config.num_res_blocks):
            block = f"input_blocks.{next(number)}"
            places |= {f"{ours}.resnets.{index}": f"{block}.0", f"{ours}.attentions.{index}": f"{block}.1"}
        if level < last:
            places |= _resampler(config, f"{ours}.downsamplers.0", f"input_blocks.{next(number)}.0", "op")
    number = count()
    for level in reversed(range(last + 1)):
        ours = f"up_blocks.{last - level}"
        for index in range(config.num_res_blocks + 1):
            block = f"output_blocks.{next(number)}"
            places |= {f"{ours}.resnets.{index}": f"{block}.0", f"{ours}.attentions.{index}": f"{block}.1"}
        if level:
            behind = 2 if config.attends[level] else 1
            places |= _resampler(config, f"{ours}.upsamplers.0", f"{block}.{behind}", "conv")
    return places


def _resampler(config: UNetConfig, ours: str, theirs: str, convolution: str) -> dict[str, str]:
    match config.resampling:
        case Resampling.CONVOLUTION:
            return {f"{ours}.conv": f"{theirs}.{convolution}"}
        case Resampling.RESIDUAL:
            return {ours: theirs}


def _theirs(places: Mapping[str, str], module: str) -> str:
    """Return that layout's name of one of our modules: the place of its block and its own name there."""
    block = module
    while block not in places:
        assert block, f"{module} is no module of ours"
        block = block.rpartition(".")[0]
    own = module[len(block) + 1 :]
    if not own:
        return places[block]
    if own in _RESIDUAL:
        own = _RESIDUAL[own]
    elif own in _PLAIN:
        own = _PLAIN[own]
    return f"{places[block]}.{own}"


def _plain_owner(config: UNetConfig, module: str) -> str:
    """Return the layer of plain attention that a module is part of, empty where none."""
    if config.attention is not AttentionForm.PLAIN or ".attentions." not in module:
        return ""
    block, _, rest = module.partition(".attentions.")
    return f"{block}.attentions.{rest.partition('.')[0]}"


def _heads(config: UNetConfig) -> dict[str, int]:
    """Return the heads of each of our levels, by its name."""
    counts, last = config.head_counts, len(config.widths) - 1
    named = {f"down_blocks.{level}": heads for level, heads in enumerate(counts)}
    return (
        named | {f"up_blocks.{last - level}": heads for level, heads in enumerate(counts)} | {"mid_block": counts[last]}
    )


def _joined(parts: list[Tensor], num_heads: int, order: HeadOrder) -> Tensor:
    """Return query, key and value as the rows of one tensor."""
    match order:
        case HeadOrder.BY_HEAD:
            by_head = [part.unflatten(0, (num_heads, -1)) for part in parts]
            return torch.stack(by_head, dim=1).flatten(0, 2)  # (head part width) ...
        case HeadOrder.BY_PART:
            return torch.cat(parts)


def _split(rows: Tensor, num_heads: int, order: HeadOrder) -> tuple[Tensor, ...]:
    """Return query, key and value of the rows of one tensor."""
    match order:
        case HeadOrder.BY_HEAD:
            by_head = rows.unflatten(0, (num_heads, 3, -1))
            return tuple(part.flatten(0, 1).contiguous() for part in by_head.unbind(1))
        case HeadOrder.BY_PART:
            return tuple(part.contiguous() for part in rows.chunk(3))


def _averaged(path: str, expected: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return a checkpoint's averaged weights by their names with dots."""
    found = {AVERAGED + name: tensor for name, tensor in load_weights(path, AVERAGED).items()}
    dotted = {_flat(name): name for name in expected}
    weights = {dotted[name]: tensor for name, tensor in found.items() if name in dotted}
    if not weights:
        raise ValueError(f"{origin} holds no averaged weights of the network: no {AVERAGED}{AVERAGED_NETWORK}...")
    return weights


def _flat(name: str) -> str:
    return AVERAGED + AVERAGED_NETWORK + name.replace(".", "")
