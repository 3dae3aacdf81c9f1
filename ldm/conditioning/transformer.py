"""The paper's own condition network: a transformer over token numbers, trained with the denoiser (table 17).

    h = token embedding + position embedding
    h = h + attention(norm(h));  h = h + feed_forward(norm(h))        `depth` times, then one more norm

It reads captions in the BERT tokenizer's numbers (depth 32, width 1280, 77 tokens) and layouts in numbers of their own
(depth 16, width 512, 92 tokens; `ldm.conditioning.layout`). Heads are 64 wide and eight, whatever the width is. All
tokens are attended to, padding too, as in the paper. The authors' files also hold an unused output layer; ours don't.

Letters: b batch, l token, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import Config
from ldm.types import TextStates, TokenNumbers

INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTransformerConfig(Config):
    """Shape of a trained transformer over tokens; its width is that of the denoiser's context."""

    vocab_size: int = 30_522
    """Numbers that a token may have: 30,522 for the BERT tokenizer, 8,192 for layouts."""
    max_tokens: int = 77
    """Tokens of every row, padding included."""
    depth: int = 32
    """Blocks."""
    num_heads: int = 8
    """Attention heads."""
    head_channels: int = 64
    """Width of a head."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_tokens", "depth", "num_heads", "head_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, added to them."""

    def __init__(self, width: int, num_heads: int, head_channels: int) -> None:
        super().__init__()
        inner = num_heads * head_channels
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, states: TextStates) -> TextStates:
        """Return the states plus what each gathers from all."""
        normed = self.norm(states)
        query, key, value = (self._heads(project(normed)) for project in (self.to_q, self.to_k, self.to_v))
        gathered = F.scaled_dot_product_attention(query, key, value)  # b heads l channels
        return states + self.to_out(gathered.transpose(1, 2).flatten(2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Expansion to four times the width through GELU, and back, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_hidden = nn.Linear(width, 4 * width)
        self.to_out = nn.Linear(4 * width, width)

    def forward(self, states: TextStates) -> TextStates:
        """Return the states plus what the layers make of each."""
        return states + self.to_out(F.gelu(self.to_hidden(self.norm(states))))


class TokenTransformer(nn.Module):
    """Token numbers to states of the denoiser's context width."""

    def __init__(self, config: TokenTransformerConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_tokens, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(SelfAttention(width, config.num_heads, config.head_channels), FeedForward(width))
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=INITIAL_STD)
        nn.init.normal_(self.position_embedding.weight, std=INITIAL_STD)

    def forward(self, tokens: TokenNumbers) -> TextStates:
        """Return a state for each token, shape (b, l, d).

        Raises:
            ValueError: if there are more tokens than positions.
        """
        length = tokens.shape[1]
        if length > self.config.max_tokens:
            raise ValueError(f"the transformer has {self.config.max_tokens} positions, got {length} tokens")
        states: Tensor = self.token_embedding(tokens) + self.position_embedding.weight[:length]
        for block in self.blocks:
            states = block(states)
        normed: Tensor = self.norm(states)
        return normed
