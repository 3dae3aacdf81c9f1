"""Attention over the positions of a feature map: transformers that also read a condition, or plain self-attention.

A transformer (Rombach et al. 2022, eq. 3): self-attention → cross-attention → gated feed-forward, each on a normalised
input and added to it. Plain: group norm → self-attention, added (Dhariwal and Nichol 2021, section 3).

Letters: b batch, c channel, h row, w column, n position (h times w), l token, d embedding width.
Attributes are named so that parameter names are those of diffusers.
"""

from __future__ import annotations

from enum import StrEnum
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ldm.remembered import Remembering
from ldm.types import TextStates

NORM_EPSILON = 1e-6
PLAIN_NORM_EPSILON = 1e-5

Tokens = Float[Tensor, "b n c"]
Features = Float[Tensor, "b c h w"]
Heads = Float[Tensor, "b heads n width"]
KeyMask = Bool[Tensor, "b 1 1 l"]
"""True where a token may be attended to, alike for all heads and positions."""


class AttentionForm(StrEnum):
    """What attends at a level."""

    TRANSFORMER = "transformer"
    """Self-attention, cross-attention, feed-forward: models that read tokens."""
    PLAIN = "plain"
    """Self-attention only: the paper's unconditional models, and those conditioned by what lies beside the latent."""


class ProjectionForm(StrEnum):
    """What leads into a transformer and out of it; the two compute the same and differ in their weights' shape."""

    CONVOLUTION = "convolution"
    """1x1 convolutions, (c, c, 1, 1): the paper and Stable Diffusion 1."""
    LINEAR = "linear"
    """Linear maps, (c, c): Stable Diffusion 2 and XL."""


class Attention(Remembering):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, channels: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, tokens: Tokens, context: TextStates, mask: KeyMask | None) -> Tokens:
        """Return what each token gathers from the context."""
        query = by_head(self.to_q(tokens), self.num_heads)
        # Tokens that attend to themselves are others at every call.
        read = partial(self._read, context)
        key, value = read() if context is tokens else self.remembered((context,), read)
        gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # b heads n width
        projected: Tensor = self.to_out[0](gathered.transpose(1, 2).flatten(2))
        return projected

    def _read(self, context: TextStates) -> tuple[Heads, Heads]:
        return by_head(self.to_k(context), self.num_heads), by_head(self.to_v(context), self.num_heads)


class GatedLinear(nn.Module):
    """GEGLU: one half of a projection times the GELU of the other (Shazeer 2020, eq. 6)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, tokens: Tokens) -> Float[Tensor, "b n e"]:
        """Return the gated projection."""
        hidden, gate = self.proj(tokens).chunk(2, dim=-1)
        gated: Tensor = hidden * F.gelu(gate)
        return gated


class FeedForward(nn.Module):
    """Gated expansion to four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The middle entry is where the layout counts its dropout.
        self.net = nn.ModuleList(
            [GatedLinear(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]
        )

    def forward(self, tokens: Tokens) -> Tokens:
        """Return tokens of the same width."""
        projected: Tensor = self.net[2](self.net[0](tokens))
        return projected


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each beside a shortcut."""

    def __init__(self, channels: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_width, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tokens, context: TextStates, mask: KeyMask | None) -> Tokens:
        """Return tokens of the same shape that have seen each other and the context."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, normed, None)
        tokens = tokens + self.attn2(self.norm2(tokens), context, mask)
        return torch.add(tokens, self.ff(self.norm3(tokens)))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that acts on tokens: the layout's weight, a matrix product's speed."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, input: Tokens) -> Tokens:
        """Return each token times the weight."""
        return F.linear(input, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over all positions of a feature map, added to it."""

    def __init__(
        self,
        channels: int,
        *,
        context_width: int,
        num_heads: int,
        depth: int,
        norm_groups: int,
        projections: ProjectionForm,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPSILON)
        self.proj_in = _projection(channels, projections)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, num_heads) for _ in range(depth)
        )
        self.proj_out = _projection(channels, projections)
        zero_initialise(self.proj_out)

    def forward(self, features: Features, context: TextStates, mask: KeyMask | None) -> Features:
        """Return features of the same shape that have seen each other and the context."""
        tokens = self.proj_in(as_tokens(self.norm(features)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        return added_to(features, self.proj_out(tokens))


class PlainAttention(nn.Module):
    """Multi-head self-attention over all positions of a feature map, added to it."""

    def __init__(self, channels: int, *, num_heads: int, norm_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=PLAIN_NORM_EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        zero_initialise(self.to_out[0])

    def forward(self, features: Features, context: None, mask: None) -> Features:
        """Return features of the same shape that have seen each other; no context comes in, as to a transformer."""
        tokens = as_tokens(self.group_norm(features))
        query, key, value = (by_head(each(tokens), self.num_heads) for each in (self.to_q, self.to_k, self.to_v))
        gathered = F.scaled_dot_product_attention(query, key, value)  # b heads n width
        return added_to(features, self.to_out[0](gathered.transpose(1, 2).flatten(2)))


def as_tokens(features: Features) -> Tokens:
    """Return the positions row by row; of channels_last features this is a view."""
    return features.flatten(2).transpose(1, 2)


def added_to(features: Features, tokens: Tokens) -> Features:
    """Return the features with a token added to each position, in the features' memory layout."""
    return torch.add(features, tokens.transpose(1, 2).reshape(features.shape))


def by_head(tokens: Tokens, num_heads: int) -> Heads:
    """Return each head's share of the width."""
    batch, length, width = tokens.shape
    return tokens.view(batch, length, num_heads, width // num_heads).transpose(1, 2)


def zero_initialise(layer: nn.Module) -> None:
    """Make a layer's output zero until it is trained, so that a fresh network is the identity beside its shortcuts."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _projection(channels: int, form: ProjectionForm) -> nn.Module:
    match form:
        case ProjectionForm.CONVOLUTION:
            return PointwiseConv(channels)
        case ProjectionForm.LINEAR:
            return nn.Linear(channels, channels)
