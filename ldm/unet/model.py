"""The UNet that predicts from a noisy latent, a time and a condition (Rombach et al. 2022, section 3.3).

Order: latent and what lies beside it → conv_in → levels down → middle → levels up, each reading what the way down kept
→ norm → SiLU → conv_out. Parameter names are those of diffusers' `UNet2DConditionModel` and `UNet2DModel`.

Letters: b batch, i input channel, c latent channel, h latent row, w latent column, l token, d embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import Config, added_later
from ldm.types import Condition, Latent, TextStates
from ldm.unet.attention import AttentionForm, ProjectionForm, zero_initialise
from ldm.unet.blocks import (
    NORM_EPSILON,
    DownLevel,
    LevelShape,
    MiddleLevel,
    Resampling,
    TimeEmbedding,
    TimeForm,
    TimeMLP,
    UpLevel,
    sinusoids,
)

NUM_SIZES = 6
"""Numbers of `Condition.sizes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig(Config):
    """Shape of a UNet."""

    in_channels: int
    """Channels of the input: the latent's, plus those of conditions given by concatenation."""
    out_channels: int
    """Channels of the prediction: the latent's."""
    base_channels: int
    """Width of the first level."""
    channel_mult: tuple[int, ...]
    """Width of each level in units of `base_channels`, finest first; each level but the last halves the sides."""
    num_res_blocks: int = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_factors: tuple[int, ...]
    """Downsampling factors whose levels attend; the middle always does."""
    head_channels: int | None = None
    """Width of an attention head, the same at all levels; or set `num_heads`."""
    num_heads: int | None = None
    """Number of attention heads, the same at all levels; or set `head_channels`."""
    context_width: int | None
    """Width of the condition's tokens; none for plain attention in place of transformers, without condition."""
    transformer_depth: int | tuple[int, ...] = 1
    """Blocks a transformer, or of each level, finest first: 0 where none attends; the last is the middle's too."""
    norm_groups: int = 32
    """Groups of every group normalisation; divides every level's width."""
    checkpoint_activations: bool = False
    """Whether to recompute each level in the backward pass instead of keeping its activations."""
    projections: ProjectionForm = added_later(ProjectionForm.CONVOLUTION)
    """What leads into a transformer and out of it: convolution or linear; only files differ."""
    time_form: TimeForm = added_later(TimeForm.SHIFT)
    """How residual blocks hear of the time: shift or scale_shift."""
    resampling: Resampling = added_later(Resampling.CONVOLUTION)
    """How levels halve and double the sides: convolution or residual."""
    pooled_width: int | None = added_later(None)
    """Width of the whole caption's vector, heard with six sizes of the picture beside the time; none for neither."""
    size_width: int = added_later(256)
    """Sinusoids of each of the six sizes; only with `pooled_width`."""
    num_levels: int = added_later(0)
    """Levels of noise over what lies beside the latent, a vector of each heard beside the time; 0 for none."""

    def __post_init__(self) -> None:
        counts = ("in_channels", "out_channels", "base_channels", "num_res_blocks", "norm_groups")
        for name in (*counts, "context_width", "pooled_width"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if self.num_levels < 0:
            raise ValueError(f"num_levels can't be negative, got {self.num_levels}")
        for name in ("base_channels", "size_width"):
            if getattr(self, name) % 2 or getattr(self, name) < 2:
                raise ValueError(f"{name} must be even (half cosines, half sines), got {getattr(self, name)}")
        if not self.channel_mult or self.channel_mult[0] != 1 or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must start with 1 and be positive, got {self.channel_mult}")
        unknown = sorted(set(self.attention_factors) - set(self.factors))
        if unknown:
            raise ValueError(f"attention_factors must be among the levels' {self.factors}, got {unknown} besides")
        if (self.head_channels is None) == (self.num_heads is None):
            raise ValueError(
                f"set exactly one of head_channels and num_heads, got {self.head_channels}, {self.num_heads}"
            )
        self._check_divisors()
        self._check_depth()
        self._check_plain()

    def _check_divisors(self) -> None:
        divisors = {"norm_groups": self.norm_groups, "head_channels": self.head_channels, "num_heads": self.num_heads}
        for name, divisor in divisors.items():
            if divisor is None:
                continue
            unfit = [width for width in self.widths if divisor < 1 or width % divisor]
            if unfit:
                raise ValueError(f"{name} must divide every level's width, got {divisor} and {unfit[0]}")

    def _check_depth(self) -> None:
        if isinstance(self.transformer_depth, int):
            if self.transformer_depth < 1:
                raise ValueError(f"transformer_depth must be at least 1, got {self.transformer_depth}")
            return
        needed = [*self.attends[:-1], True]
        fits = [(depth > 0) == need for depth, need in zip(self.transformer_depth, needed, strict=False)]
        if len(self.transformer_depth) != len(needed) or min(self.transformer_depth) < 0 or not all(fits):
            raise ValueError(
                "transformer_depth must be one number for each level, 0 where none attends and at least 1 elsewhere "
                f"and last, got {self.transformer_depth} for attention at {self.attention_factors} of {self.factors}"
            )

    def _check_plain(self) -> None:
        if self.context_width is not None:
            return
        transformers_own = {"transformer_depth": 1, "projections": ProjectionForm.CONVOLUTION}
        for name, default in transformers_own.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} belongs to transformers, got {getattr(self, name)} without context_width")

    @property
    def attention(self) -> AttentionForm:
        """What attends."""
        return AttentionForm.PLAIN if self.context_width is None else AttentionForm.TRANSFORMER

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level attends, finest first."""
        return tuple(factor in self.attention_factors for factor in self.factors)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks a transformer of each level, finest first; the last is the middle's."""
        if isinstance(self.transformer_depth, int):
            return (self.transformer_depth,) * len(self.channel_mult)
        return self.transformer_depth

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * mult for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """Downsampling factor of each level, finest first."""
        return tuple(1 << level for level in range(len(self.channel_mult)))

    @property
    def factor(self) -> int:
        """What both sides of the input must be multiples of."""
        return self.factors[-1]

    @property
    def head_counts(self) -> tuple[int, ...]:
        """Attention heads of each level, finest first, whether or not the level attends."""
        if self.head_channels is None:
            assert self.num_heads is not None
            return (self.num_heads,) * len(self.widths)
        return tuple(width // self.head_channels for width in self.widths)


class UNet(nn.Module):
    """The denoising network. Freshly made, it predicts zero."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, blocks, last = config.widths, config.num_res_blocks, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeMLP(widths[0], 4 * widths[0])
        if config.pooled_width is not None:
            self.add_embedding = TimeMLP(config.pooled_width + NUM_SIZES * config.size_width, 4 * widths[0])
        if config.num_levels:
            self.class_embedding = nn.Embedding(config.num_levels, 4 * widths[0])
        self.down_blocks = nn.ModuleList(
            DownLevel(widths[max(level - 1, 0)], _shape(config, level), num_blocks=blocks, is_last=level == last)
            for level in range(last + 1)
        )
        self.mid_block = MiddleLevel(_shape(config, last, always_attends=True))
        self.up_blocks = nn.ModuleList(
            UpLevel(
                widths[min(level + 1, last)],
                (widths[level],) * blocks + (widths[max(level - 1, 0)],),
                _shape(config, level),
                is_last=level == 0,
            )
            for level in reversed(range(last + 1))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        zero_initialise(self.conv_out)

    def forward(self, noisy: Float[Tensor, "b i h w"], timestep: Float[Tensor, "b"], condition: Condition) -> Latent:
        """Return the prediction for each row.

        Args:
            noisy: the corrupted latent.
            timestep: a time for each row, whole or fractional.
            condition: what the config has a use for: the tokens to attend to and which of them are real, what lies
                beside the latent and how much noise over it, the caption's vector and the sizes. Vector, sizes and
                level without use are not heard.

        Raises:
            ValueError: if the input's sides or channels, or the condition, do not fit the config.
        """
        check_fit(self.config, noisy, condition)
        mask = None if condition.mask is None else condition.mask[:, None, None, :]
        level_inputs = (F.silu(self._embedded(timestep, condition, noisy.dtype)), condition.states, mask)
        if condition.spatial is not None:
            noisy = torch.cat([noisy, condition.spatial], dim=1)
        kept: list[Tensor] = [self.conv_in(noisy)]
        for level in self.down_blocks:
            kept += self._run(level, kept[-1], *level_inputs)
        features = self._run(self.mid_block, kept[-1], *level_inputs)
        for level in self.up_blocks:
            skips = tuple(kept.pop() for _ in range(self.config.num_res_blocks + 1))
            features = self._run(level, features, skips, *level_inputs)
        prediction: Tensor = self.conv_out(F.silu(self.conv_norm_out(features)))
        return prediction

    def _embedded(self, timestep: Float[Tensor, "b"], condition: Condition, dtype: torch.dtype) -> TimeEmbedding:
        """Return the embedding of the time, to which SDXL's adds vector and sizes (Podell et al. 2023, section 2.2)."""
        embedding: Tensor = self.time_embedding(sinusoids(timestep, self.config.base_channels).to(dtype))
        if self.config.num_levels:
            embedding = embedding + self.class_embedding(condition.level)
        if self.config.pooled_width is None:
            return embedding
        assert condition.pooled is not None
        assert condition.sizes is not None
        waves = sinusoids(condition.sizes.flatten(), self.config.size_width).view(len(timestep), -1)  # b 6*width
        added: Tensor = self.add_embedding(torch.cat([condition.pooled, waves.to(dtype)], dim=1))
        return embedding + added

    def _run(self, level: Callable[..., Any], *inputs: Any) -> Any:
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            # Nothing in a level is random, so its recomputation needs no stored random state.
            return checkpoint(level, *inputs, use_reentrant=False, preserve_rng_state=False)
        return level(*inputs)


def check_fit(config: UNetConfig, noisy: Float[Tensor, "b i h w"], condition: Condition) -> None:
    """Refuse an input that a network of this config can't take.

    Raises:
        ValueError: naming what was expected and what came.
    """
    sides, spatial = tuple(noisy.shape[-2:]), condition.spatial
    num_beside = 0 if spatial is None else spatial.shape[1]
    if noisy.shape[1] + num_beside != config.in_channels:
        raise ValueError(
            f"the noisy latent and what lies beside it must have {config.in_channels} channels together, "
            f"got {noisy.shape[1]} and {num_beside}"
        )
    if spatial is not None and tuple(spatial.shape[-2:]) != sides:
        raise ValueError(
            f"what lies beside a latent of sides {sides} must have its sides, got {tuple(spatial.shape[-2:])}"
        )
    if any(side % config.factor for side in sides):
        raise ValueError(f"the input's sides must be multiples of {config.factor}, got {sides}")
    _check_states(config.context_width, condition.states)
    if condition.states is None and condition.mask is not None:
        raise ValueError(
            f"the condition must have no mask where it has no tokens, got one of {condition.mask.shape[-1]}"
        )
    if config.num_levels and condition.level is None:
        raise ValueError(f"the condition must have a level of noise for each row, below {config.num_levels}, got none")
    if config.pooled_width is None:
        return
    if condition.pooled is None or condition.pooled.shape[-1] != config.pooled_width:
        came = "none" if condition.pooled is None else f"one of width {condition.pooled.shape[-1]}"
        raise ValueError(f"the condition must have a pooled vector of width {config.pooled_width}, got {came}")
    if condition.sizes is None:
        raise ValueError(f"the condition must have {NUM_SIZES} sizes a row beside its pooled vector, got none")


def _check_states(width: int | None, states: TextStates | None) -> None:
    if width is None and states is not None:
        raise ValueError(
            f"the network has no cross-attention and no use for token states, got some of width {states.shape[-1]}"
        )
    if width is not None and states is None:
        raise ValueError(f"the condition must have token states of width {width}, got none")
    if states is not None and states.shape[-1] != width:
        raise ValueError(f"condition width must be {width}, got {states.shape[-1]}")


def _shape(config: UNetConfig, level: int, *, always_attends: bool = False) -> LevelShape:
    return LevelShape(
        channels=config.widths[level],
        time_width=4 * config.widths[0],
        norm_groups=config.norm_groups,
        num_heads=config.head_counts[level] if always_attends or config.attends[level] else None,
        context_width=config.context_width,
        depth=config.depths[level],
        projections=config.projections,
        time_form=config.time_form,
        resampling=config.resampling,
    )
