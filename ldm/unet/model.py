"""The conditional UNet that predicts from a noisy latent, a time and a condition (Rombach et al. 2022, section 3.3).

Order: conv_in → levels down → middle → levels up, each reading what the way down kept → norm → SiLU → conv_out.
Parameter names are those of diffusers' `UNet2DConditionModel`.

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

from ldm.config import Config
from ldm.types import Condition, Latent, TextStates
from ldm.unet.attention import KeyMask
from ldm.unet.blocks import (
    NORM_EPSILON,
    DownLevel,
    LevelShape,
    MiddleLevel,
    TimeMLP,
    UpLevel,
    sinusoids,
    zero_initialise,
)


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
    """Downsampling factors whose levels have transformers; the middle always has one."""
    head_channels: int | None = None
    """Width of an attention head, the same at all levels; or set `num_heads`."""
    num_heads: int | None = None
    """Number of attention heads, the same at all levels; or set `head_channels`."""
    context_width: int
    """Width of the condition's tokens."""
    transformer_depth: int = 1
    """Blocks a transformer."""
    norm_groups: int = 32
    """Groups of every group normalisation; divides every level's width."""
    checkpoint_activations: bool = False
    """Whether to recompute each level in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        counts = ("in_channels", "out_channels", "base_channels", "num_res_blocks", "context_width")
        for name in (*counts, "transformer_depth", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.base_channels % 2:
            raise ValueError(f"base_channels must be even (half cosines, half sines), got {self.base_channels}")
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

    def _check_divisors(self) -> None:
        divisors = {"norm_groups": self.norm_groups, "head_channels": self.head_channels, "num_heads": self.num_heads}
        for name, divisor in divisors.items():
            if divisor is None:
                continue
            unfit = [width for width in self.widths if divisor < 1 or width % divisor]
            if unfit:
                raise ValueError(f"{name} must divide every level's width, got {divisor} and {unfit[0]}")

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
        """Attention heads of each level, finest first, whether or not the level has transformers."""
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
            noisy: the corrupted latent, with the channels of concatenated conditions if the config has such.
            timestep: a time for each row, whole or fractional.
            condition: the tokens to attend to, and which of them are real.

        Raises:
            ValueError: if the input's sides or channels, or the condition, do not fit the config.
        """
        context, mask = self._checked(noisy, condition)
        waves = sinusoids(timestep, self.config.base_channels).to(noisy.dtype)
        time = F.silu(self.time_embedding(waves))
        features = self.conv_in(noisy)
        kept: list[Tensor] = [features]
        for level in self.down_blocks:
            kept += self._run(level, kept[-1], time, context, mask)
        features = self._run(self.mid_block, kept[-1], time, context, mask)
        for level in self.up_blocks:
            skips = tuple(kept.pop() for _ in range(self.config.num_res_blocks + 1))
            features = self._run(level, features, skips, time, context, mask)
        prediction: Tensor = self.conv_out(F.silu(self.conv_norm_out(features)))
        return prediction

    def _run(self, level: Callable[..., Any], *inputs: Any) -> Any:
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            # Nothing in a level is random, so its recomputation needs no stored random state.
            return checkpoint(level, *inputs, use_reentrant=False, preserve_rng_state=False)
        return level(*inputs)

    def _checked(self, noisy: Tensor, condition: Condition) -> tuple[TextStates, KeyMask | None]:
        config, sides = self.config, tuple(noisy.shape[-2:])
        if noisy.shape[1] != config.in_channels:
            raise ValueError(f"the input must have {config.in_channels} channels, got {noisy.shape[1]}")
        if any(side % config.factor for side in sides):
            raise ValueError(f"the input's sides must be multiples of {config.factor}, got {sides}")
        if condition.states is None:
            raise ValueError(f"the condition must have token states of width {config.context_width}, got none")
        if condition.states.shape[-1] != config.context_width:
            raise ValueError(f"condition width must be {config.context_width}, got {condition.states.shape[-1]}")
        return condition.states, None if condition.mask is None else condition.mask[:, None, None, :]


def _shape(config: UNetConfig, level: int, *, always_attends: bool = False) -> LevelShape:
    has_transformers = always_attends or config.factors[level] in config.attention_factors
    return LevelShape(
        channels=config.widths[level],
        time_width=4 * config.widths[0],
        norm_groups=config.norm_groups,
        num_heads=config.head_counts[level] if has_transformers else None,
        context_width=config.context_width,
        depth=config.transformer_depth,
    )
