"""What diffusers' `config.json` says of a UNet, and ours, both ways.

`UNet2DConditionModel` has transformers, `UNet2DModel` plain attention. Parameter names are the same on both sides, so
only the config is translated; what one side can't be is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ldm.unet.attention import AttentionForm, ProjectionForm
from ldm.unet.blocks import Resampling, TimeForm
from ldm.unet.model import NUM_SIZES, UNetConfig

Facts = dict[str, Any]
"""The content of a `config.json`."""

CONDITIONAL_CLASS, PLAIN_CLASS = "UNet2DConditionModel", "UNet2DModel"
_COMMON: Facts = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
UNET_CONSTANTS: dict[str, Facts] = {
    CONDITIONAL_CLASS: {
        **_COMMON,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    PLAIN_CLASS: {**_COMMON, "add_attention": True, "mid_block_type": "UNetMidBlock2D"},
}
"""What our networks always are. A file may leave a fact out (these are the layout's defaults) but not contradict it."""
NEEDED = {
    CONDITIONAL_CLASS: ("in_channels", "out_channels", "cross_attention_dim"),
    PLAIN_CLASS: ("in_channels", "out_channels"),
}
"""Facts that a file may not leave out, besides those of every network of the layout."""

_TIME_FORMS = {"default": TimeForm.SHIFT, "scale_shift": TimeForm.SCALE_SHIFT}
_RESAMPLINGS = {"conv": Resampling.CONVOLUTION, "resnet": Resampling.RESIDUAL}
_SIZES_AND_VECTOR = "text_time"
_ATTENDING = {AttentionForm.TRANSFORMER: "CrossAttn", AttentionForm.PLAIN: "Attn"}
_SILENT = {Resampling.CONVOLUTION: "", Resampling.RESIDUAL: "Resnet"}


def unet_facts(config: UNetConfig) -> Facts:
    """Return what a `config.json` says of a network.

    Raises:
        ValueError: naming what no class of diffusers can be.
    """
    down, up = _block_types(config)
    facts = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.widths),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "resnet_time_scale_shift": _key_of(_TIME_FORMS, config.time_form),
        "num_class_embeds": config.num_levels or None,
    }
    match config.attention:
        case AttentionForm.TRANSFORMER:
            return {"_class_name": CONDITIONAL_CLASS, **UNET_CONSTANTS[CONDITIONAL_CLASS], **facts, **_own(config)}
        case AttentionForm.PLAIN:
            return {"_class_name": PLAIN_CLASS, **UNET_CONSTANTS[PLAIN_CLASS], **facts, **_plain_own(config)}


def has_class(config: UNetConfig) -> bool:
    """Say whether a class of diffusers can be the network."""
    try:
        unet_facts(config)
    except ValueError:
        return False
    return True


def is_said_whole(config: UNetConfig) -> bool:
    """Say whether a `config.json` read back is the very config, but for how activations are kept."""
    plain = replace(config, checkpoint_activations=False)
    return has_class(plain) and unet_config(unet_facts(plain), "") == plain


def unet_config(facts: Facts, folder: str) -> UNetConfig:
    """Return the shape that a `config.json` says, whose constants were checked.

    Raises:
        ValueError: if ours can't be that, naming the folder and what differs.
    """
    is_plain = facts["_class_name"] == PLAIN_CLASS
    form = AttentionForm.PLAIN if is_plain else AttentionForm.TRANSFORMER
    base, mult = base_and_mult(facts, folder)
    attends = [name == f"{_ATTENDING[form]}DownBlock2D" for name in facts["down_block_types"]]
    head_channels, num_heads = _plain_heads(facts) if is_plain else _heads(facts, folder)
    config = UNetConfig(
        in_channels=facts["in_channels"],
        out_channels=facts["out_channels"],
        base_channels=base,
        channel_mult=mult,
        num_res_blocks=facts["layers_per_block"],
        attention_factors=tuple(1 << level for level, here in enumerate(attends) if here),
        head_channels=head_channels,
        num_heads=num_heads,
        norm_groups=facts.get("norm_num_groups", 32),
        time_form=_one_of(_TIME_FORMS, facts, "resnet_time_scale_shift", "default", folder),
        resampling=_resampling(facts, folder),
        num_levels=facts.get("num_class_embeds") or 0,
        **({"context_width": None} if is_plain else _transformers(facts, attends, folder)),
    )
    expected = unet_facts(config)
    names = ["down_block_types", "up_block_types"]
    names += [name for name in ("downsample_type", "upsample_type") if is_plain and any(attends[:-1])]
    for name in names:
        refuse_other(folder, name, facts.get(name, expected[name]), expected[name])
    if is_plain and config.time_form is TimeForm.SCALE_SHIFT:  # there the layout's default is a middle without norm
        refuse_other(folder, "attn_norm_num_groups", facts.get("attn_norm_num_groups"), config.norm_groups)
    return config


def base_and_mult(facts: Facts, folder: str) -> tuple[int, tuple[int, ...]]:
    """Return the first level's width and all levels' in units of it.

    Raises:
        ValueError: if they are no multiples.
    """
    widths = facts["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{folder}: block_out_channels must be multiples of the first, got {widths}")
    return widths[0], tuple(width // widths[0] for width in widths)


def refuse_other(folder: str, name: str, found: Any, expected: Any) -> None:
    """Refuse a fact that contradicts what it must be.

    Raises:
        ValueError: saying what came.
    """
    if found != expected:
        raise ValueError(f"{folder}: {name} must be {expected!r}, got {found!r}")


def _block_types(config: UNetConfig) -> tuple[list[str], list[str]]:
    if (
        config.attention is AttentionForm.TRANSFORMER
        and config.resampling is Resampling.RESIDUAL
        and any(config.attends)
    ):
        raise ValueError(
            f"diffusers has no class for resampling {config.resampling} beside levels of transformers "
            f"(attention_factors {config.attention_factors})"
        )
    attending, silent = _ATTENDING[config.attention], _SILENT[config.resampling]
    down = [f"{attending}DownBlock2D" if here else f"{silent}Down{_long(silent)}Block2D" for here in config.attends]
    up = [f"{attending}UpBlock2D" if here else f"{silent}Up{_long(silent)}Block2D" for here in reversed(config.attends)]
    return down, up


def _long(silent: str) -> str:
    """Return the rest of `ResnetDownsampleBlock2D`, which is `DownBlock2D` without the first part."""
    return "sample" if silent else ""


def _own(config: UNetConfig) -> Facts:
    """Return what only the class with transformers knows."""
    facts: Facts = {
        # The layout's name for the number of heads of each level: an old mistake that its files keep.
        "attention_head_dim": list(config.head_counts) if config.num_heads is None else config.num_heads,
        "cross_attention_dim": config.context_width,
        "transformer_layers_per_block": config.transformer_depth,
        "use_linear_projection": config.projections is ProjectionForm.LINEAR,
        "addition_embed_type": None,
    }
    if not isinstance(config.transformer_depth, int):
        facts["transformer_layers_per_block"] = [max(depth, 1) for depth in config.transformer_depth]
    if config.pooled_width is None:
        return facts
    return facts | {
        "addition_embed_type": _SIZES_AND_VECTOR,
        "addition_time_embed_dim": config.size_width,
        "projection_class_embeddings_input_dim": config.pooled_width + NUM_SIZES * config.size_width,
    }


def _plain_own(config: UNetConfig) -> Facts:
    """Return what only the class with plain attention knows."""
    if config.pooled_width is not None:
        raise ValueError(f"{PLAIN_CLASS} has no pooled_width, got {config.pooled_width}")
    attending = [*config.attends[:-1], True]
    pairs = zip(config.widths, config.head_counts, attending, strict=True)
    head_widths = {width // count for width, count, here in pairs if here}
    if config.num_heads != 1 and len(head_widths) > 1:
        raise ValueError(
            f"{PLAIN_CLASS} has one width of head at all levels, or one head at each, "
            f"got num_heads {config.num_heads} and so widths {sorted(head_widths)}"
        )
    resampling = _key_of(_RESAMPLINGS, config.resampling)
    return {
        # Here it does mean the width of a head; none is one head of the level's width.
        "attention_head_dim": None if config.num_heads == 1 else head_widths.pop(),
        "attn_norm_num_groups": config.norm_groups,
        "downsample_type": resampling,
        "upsample_type": resampling,
    }


def _transformers(facts: Facts, attends: Sequence[bool], folder: str) -> Facts:
    """Return the fields of ours that only the class with transformers has."""
    form = ProjectionForm.LINEAR if facts.get("use_linear_projection") else ProjectionForm.CONVOLUTION
    widths = facts["cross_attention_dim"]
    if isinstance(widths, list):
        if len(set(widths)) != 1:
            raise ValueError(f"{folder}: cross_attention_dim must be the same at all levels, got {widths}")
        widths = widths[0]
    return {
        "context_width": widths,
        "transformer_depth": _depth(facts, attends, folder),
        "projections": form,
        **_pooled(facts, folder),
    }


def _pooled(facts: Facts, folder: str) -> Facts:
    kind = facts.get("addition_embed_type")
    if kind is None:
        return {}
    refuse_other(folder, "addition_embed_type", kind, _SIZES_AND_VECTOR)
    size_width, both = facts.get("addition_time_embed_dim"), facts.get("projection_class_embeddings_input_dim")
    if not isinstance(size_width, int) or not isinstance(both, int) or both <= NUM_SIZES * size_width:
        raise ValueError(
            f"{folder}: projection_class_embeddings_input_dim must be a vector's width and {NUM_SIZES} times "
            f"addition_time_embed_dim, got {both} and {size_width}"
        )
    return {"pooled_width": both - NUM_SIZES * size_width, "size_width": size_width}


def _heads(facts: Facts, folder: str) -> tuple[int | None, int | None]:
    """Return the width of a head or the number of heads, whichever is constant, and None for the other."""
    counts, widths = facts.get("attention_head_dim", 8), facts["block_out_channels"]
    if isinstance(counts, int):
        return None, counts
    head_widths = {width // count for width, count in zip(widths, counts, strict=True)}
    if len(head_widths) == 1:
        return head_widths.pop(), None
    if len(set(counts)) == 1:
        return None, counts[0]
    raise ValueError(f"{folder}: heads must be equally many or equally wide at all levels, got {counts} for {widths}")


def _plain_heads(facts: Facts) -> tuple[int | None, int | None]:
    width = facts.get("attention_head_dim", 8)
    return (None, 1) if width is None else (width, None)


def _depth(facts: Facts, attends: Sequence[bool], folder: str) -> int | tuple[int, ...]:
    """Return one depth where all agree that matter, else those of the levels, 0 where none attends."""
    depths = facts.get("transformer_layers_per_block", 1)
    if isinstance(depths, int):
        return depths
    if len(depths) != len(attends) or not all(isinstance(depth, int) for depth in depths):
        raise ValueError(f"{folder}: transformers must be as deep on the way up as on the way down, got {depths}")
    matters = [*attends[:-1], True]
    used = {depth for depth, here in zip(depths, matters, strict=True) if here}
    if len(used) == 1:
        return int(used.pop())
    return tuple(depth if here else 0 for depth, here in zip(depths, matters, strict=True))


def _resampling(facts: Facts, folder: str) -> Resampling:
    if any(name.startswith("Resnet") for name in facts["down_block_types"]):
        return Resampling.RESIDUAL
    return _one_of(_RESAMPLINGS, facts, "downsample_type", "conv", folder)


def _one_of(known: dict[str, Any], facts: Facts, name: str, default: str, folder: str) -> Any:
    found = facts.get(name, default)
    if found not in known:
        raise ValueError(f"{folder}: {name} must be {' or '.join(map(repr, known))}, got {found!r}")
    return known[found]


def _key_of(known: dict[str, Any], value: Any) -> str:
    return next(key for key, each in known.items() if each == value)
