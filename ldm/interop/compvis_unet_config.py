"""What the configurations and tensors of CompVis' and Stability's checkpoints say of a UNet, and ours, both ways.

The shape is read from `unet_config.params` of a training's YAML (`network_config.params` in Stability's later ones)
where there is one, else from the tensors, which tell all of it but the number of heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import yaml

from ldm.unet.attention import AttentionForm, ProjectionForm
from ldm.unet.blocks import Resampling, TimeForm
from ldm.unet.model import NUM_SIZES, UNetConfig

NORM_GROUPS = 32
"""Of every normalisation of that layout; no file says so."""
SIZE_WIDTH = 256
"""Sinusoids of each size in front of `label_emb`; they are made outside of that layout's network."""
STABILITY_HEAD_CHANNELS = 64
"""Of all networks with linear projections: Stable Diffusion 2 and XL."""
STABILITY_NUM_HEADS, STABILITY_BASE_CHANNELS, STABILITY_CONTEXT_WIDTHS = 8, 320, (768, 1280)
"""Of Stable Diffusion 1, and of the paper's text to image of 1.4 billion parameters."""

UNET_CONSTANTS: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "conv_resample": (True,),
    "n_embed": (None,),
    "disable_self_attentions": (None,),
    "num_attention_blocks": (None,),
    "disable_middle_self_attn": (False,),
    "num_classes": (None, "sequential"),
    "num_heads_upsample": (-1, None),
}
"""What our networks can be; a YAML may leave a fact out (the first one is the layout's default)."""
NEEDED = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions")

Shapes = Mapping[str, tuple[int, ...]]


class HeadOrder(StrEnum):
    """How the rows of a `qkv` tensor lie."""

    BY_HEAD = "by_head"
    """Query, key and value of the first head, then of the next: what a YAML means that doesn't say."""
    BY_PART = "by_part"
    """The queries of all heads, then the keys, then the values: `use_new_attention_order`."""


def params_of_yaml(text: str, origin: str) -> Mapping[str, Any]:
    """Return the network's parameters in a training's YAML.

    Raises:
        ValueError: if there are none, naming `origin`.
    """
    try:
        outer = _mapping(_mapping(_mapping(yaml.safe_load(text)).get("model")).get("params"))
    except yaml.YAMLError as error:
        raise ValueError(f"{origin}: what lies beside it is no YAML: {error}") from error
    found = _mapping(outer.get("unet_config") or outer.get("network_config"))
    params = _mapping(found.get("params"))
    missing = [name for name in NEEDED if name not in params]
    if missing:
        raise ValueError(
            f"{origin}: its YAML must describe the network under model.params.unet_config.params, or network_config "
            f"there; it lacks {', '.join(missing)}"
        )
    return params


def head_order(params: Mapping[str, Any]) -> HeadOrder:
    """Return how plain attention's tensors lie."""
    return HeadOrder.BY_PART if params.get("use_new_attention_order") else HeadOrder.BY_HEAD


def config_of_params(params: Mapping[str, Any], origin: str) -> UNetConfig:
    """Return the shape that a YAML's parameters describe.

    Raises:
        ValueError: if ours can't be that, naming `origin` and what differs.
    """
    for name, possible in UNET_CONSTANTS.items():
        if params.get(name, possible[0]) not in possible:
            choices = " or ".join(map(repr, possible))
            raise ValueError(f"{origin}: unet_config.{name} must be {choices}, got {params[name]!r}")
    mult = tuple(int(each) for each in params.get("channel_mult", (1, 2, 4, 8)))
    factors = tuple(1 << level for level in range(len(mult)))
    attention_factors = tuple(factor for factor in factors if factor in set(params["attention_resolutions"]))
    head_channels, num_heads = _heads_of_params(params, origin)
    if not isinstance(params["num_res_blocks"], int):
        raise ValueError(f"{origin}: num_res_blocks must be one number, got {params['num_res_blocks']}")
    return UNetConfig(
        in_channels=int(params["in_channels"]),
        out_channels=int(params["out_channels"]),
        base_channels=int(params["model_channels"]),
        channel_mult=mult,
        num_res_blocks=params["num_res_blocks"],
        attention_factors=attention_factors,
        head_channels=head_channels,
        num_heads=num_heads,
        norm_groups=NORM_GROUPS,
        time_form=TimeForm.SCALE_SHIFT if params.get("use_scale_shift_norm") else TimeForm.SHIFT,
        resampling=Resampling.RESIDUAL if params.get("resblock_updown") else Resampling.CONVOLUTION,
        **_attention_of_params(params, [factor in attention_factors for factor in factors], origin),
        **_pooled_of(params.get("adm_in_channels") if params.get("num_classes") else None, origin),
    )


def yaml_of(config: UNetConfig) -> str:
    """Return a YAML from which that layout's code would build the network.

    Raises:
        ValueError: naming what it can't be there.
    """
    check_expressible(config)
    params: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.base_channels,
        "attention_resolutions": list(config.attention_factors),
        "num_res_blocks": config.num_res_blocks,
        "channel_mult": list(config.channel_mult),
        "use_scale_shift_norm": config.time_form is TimeForm.SCALE_SHIFT,
        "resblock_updown": config.resampling is Resampling.RESIDUAL,
    }
    params |= (
        {"num_head_channels": config.head_channels} if config.num_heads is None else {"num_heads": config.num_heads}
    )
    if config.attention is AttentionForm.TRANSFORMER:
        depth = config.transformer_depth
        params |= {
            "use_spatial_transformer": True,
            "transformer_depth": depth if isinstance(depth, int) else list(depth),
            "context_dim": config.context_width,
            "use_linear_in_transformer": config.projections is ProjectionForm.LINEAR,
            "legacy": False,
        }
    if config.pooled_width is not None:
        params |= {"num_classes": "sequential", "adm_in_channels": config.pooled_width + NUM_SIZES * config.size_width}
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return yaml.safe_dump({"model": {"params": {"unet_config": {"target": target, "params": params}}}}, sort_keys=False)


def check_expressible(config: UNetConfig) -> None:
    """Refuse what that layout's network can't be.

    Raises:
        ValueError: naming it.
    """
    if config.norm_groups != NORM_GROUPS:
        raise ValueError(f"norm_groups must be {NORM_GROUPS} in the layout of CompVis, got {config.norm_groups}")
    if config.pooled_width is not None and config.size_width != SIZE_WIDTH:
        raise ValueError(f"size_width must be {SIZE_WIDTH} in the layout of CompVis, got {config.size_width}")


def config_of_shapes(shapes: Shapes, origin: str) -> UNetConfig:
    """Return the shape that a network's tensors show.

    Raises:
        ValueError: if they show none, or leave open how many heads it has, naming `origin`.
    """
    shown = fields_of_shapes(shapes, origin)
    return UNetConfig(**shown, **_known_heads(shown, origin))


def fields_of_shapes(shapes: Shapes, origin: str) -> dict[str, Any]:
    """Return all fields of a config that tensors show, which is all but the heads.

    Raises:
        ValueError: if they are those of no UNet, naming `origin`.
    """
    try:
        return _fields_of_shapes(shapes, origin)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{origin} has no YAML beside it, and its tensors show no UNet: {error}") from error


def _fields_of_shapes(shapes: Shapes, origin: str) -> dict[str, Any]:
    base, in_channels = shapes["input_blocks.0.0.weight"][0], shapes["input_blocks.0.0.weight"][1]
    num_blocks, num_levels = _blocks_and_levels(shapes)
    firsts = [1 + level * (num_blocks + 1) for level in range(num_levels)]
    widths = [shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts]
    if any(width % base for width in widths):
        raise ValueError(f"{origin}: widths of levels must be multiples of the first, got {widths}")
    is_plain = "middle_block.1.qkv.weight" in shapes
    is_residual = num_levels > 1 and f"input_blocks.{firsts[1] - 1}.0.op.weight" not in shapes
    label = shapes.get("label_emb.0.0.weight")
    is_film = shapes["middle_block.0.emb_layers.1.bias"][0] == 2 * widths[-1]
    return {
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "base_channels": base,
        "channel_mult": tuple(width // base for width in widths),
        "num_res_blocks": num_blocks,
        "attention_factors": tuple(
            1 << level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.norm.weight" in shapes
        ),
        "norm_groups": NORM_GROUPS,
        "time_form": TimeForm.SCALE_SHIFT if is_film else TimeForm.SHIFT,
        "resampling": Resampling.RESIDUAL if is_residual else Resampling.CONVOLUTION,
        **(_PLAIN_OWN if is_plain else _transformers_of_shapes(shapes, firsts)),
        **_pooled_of(None if label is None else label[1], origin),
    }


_PLAIN_OWN: dict[str, Any] = {"context_width": None}


def _blocks_and_levels(shapes: Shapes) -> tuple[int, int]:
    """Return residual blocks a level and levels; a level on the way up ends where something doubles the sides."""
    doubling = r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.0)\.weight$"
    ends = sorted(int(found[1]) for name in shapes if (found := re.match(doubling, name)))
    blocks = [int(found[1]) for name in shapes if (found := re.match(r"output_blocks\.(\d+)\.", name))]
    if not blocks:
        raise KeyError("output_blocks.0.0.in_layers.0.weight")
    return (ends[0] if ends else max(blocks)), len(ends) + 1


def _transformers_of_shapes(shapes: Shapes, firsts: list[int]) -> dict[str, Any]:
    middle = _depth_of_shapes(shapes, "middle_block.1")
    levels = [_depth_of_shapes(shapes, f"input_blocks.{first}.1") for first in firsts]
    is_linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    return {
        "context_width": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_depth": _one_or_each((*levels[:-1], middle)),
        "projections": ProjectionForm.LINEAR if is_linear else ProjectionForm.CONVOLUTION,
    }


def _depth_of_shapes(shapes: Shapes, prefix: str) -> int:
    pattern = re.escape(prefix) + r"\.transformer_blocks\.\d+\.norm1\.weight$"
    return sum(re.match(pattern, name) is not None for name in shapes)


def _one_or_each(depths: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return the one depth of all levels that have any, or those of each."""
    used = {depth for depth in depths if depth}
    return used.pop() if len(used) == 1 else depths


def _known_heads(shown: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the heads of the families whose number of heads is known, since tensors are the same for any number."""
    if shown.get("projections") is ProjectionForm.LINEAR:
        return {"head_channels": STABILITY_HEAD_CHANNELS}
    if shown["base_channels"] == STABILITY_BASE_CHANNELS and shown["context_width"] in STABILITY_CONTEXT_WIDTHS:
        return {"num_heads": STABILITY_NUM_HEADS}
    raise ValueError(
        f"{origin} has no YAML beside it, and its tensors don't show how many heads attend: give the YAML that it was "
        "trained with"
    )


def _heads_of_params(params: Mapping[str, Any], origin: str) -> tuple[int | None, int | None]:
    """Return the width of a head or the number of heads, and None for the other; -1 is unset there."""
    head_channels, num_heads = (params.get(name, -1) for name in ("num_head_channels", "num_heads"))
    if head_channels not in (-1, None):
        return int(head_channels), None
    if num_heads in (-1, None):
        raise ValueError(f"{origin}: its YAML must have num_heads or num_head_channels")
    return None, int(num_heads)


def _attention_of_params(params: Mapping[str, Any], attends: list[bool], origin: str) -> dict[str, Any]:
    if not params.get("use_spatial_transformer"):
        return _PLAIN_OWN
    width, depth = params.get("context_dim"), params.get("transformer_depth", 1)
    if isinstance(width, list):
        width = width[0] if len(set(width)) == 1 else None
    if not isinstance(width, int):
        raise ValueError(f"{origin}: context_dim must be one width of tokens, got {params.get('context_dim')}")
    if isinstance(depth, list):
        if len(depth) != len(attends):
            raise ValueError(
                f"{origin}: transformer_depth must be one number for each of {len(attends)} levels, got {depth}"
            )
        middle = params.get("transformer_depth_middle") or depth[-1]
        depth = _one_or_each(
            (*(each if here else 0 for each, here in zip(depth[:-1], attends[:-1], strict=True)), middle)
        )
    is_linear = params.get("use_linear_in_transformer")
    return {
        "context_width": width,
        "transformer_depth": depth,
        "projections": ProjectionForm.LINEAR if is_linear else ProjectionForm.CONVOLUTION,
    }


def _pooled_of(label_width: int | None, origin: str) -> dict[str, Any]:
    if label_width is None:
        return {}
    pooled_width = label_width - NUM_SIZES * SIZE_WIDTH
    if pooled_width < 1:
        raise ValueError(
            f"{origin}: label_emb must take a vector beside {NUM_SIZES} times {SIZE_WIDTH} sinusoids of sizes, as "
            f"Stable Diffusion XL's does, got {label_width} in all"
        )
    return {"pooled_width": pooled_width}


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}
